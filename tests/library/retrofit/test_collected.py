"""Outputs that transformers collects by hooks inside branches: as many as there are layers, and of all samples."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import stochastic_depth as sd

TOKENS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
MASKED = "transformers collects outputs of its modules in this call"


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).double()


def gated_bert(model: Any, gates: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Hidden states and attention maps, by Bert's formulas; `gates` (6, N)."""
    hidden = model.embeddings(TOKENS)
    maps: list[Tensor] = []
    for index, layer in enumerate(model.encoder.layer):
        of_attention, of_mlp = gates[2 * index, :, None, None], gates[2 * index + 1, :, None, None]
        mixed, attention = layer.attention.self(hidden)
        maps.append(attention)
        output = layer.attention.output
        hidden = output.LayerNorm(hidden + of_attention * output.dense(mixed))
        hidden = layer.output.LayerNorm(hidden + of_mlp * layer.output.dense(layer.intermediate(hidden)))
    return hidden, maps


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_attention_maps_of_all_layers_and_samples(granularity: Any) -> None:
    model = bert()
    reference = copy.deepcopy(model)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), granularity=granularity)
    gates = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    if granularity == "sample":
        gates[2], gates[5] = torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0, 0, 1, 1]).bool()
    expected, maps = gated_bert(reference, gates)
    with depth.gates(gates if granularity == "sample" else gates[:, 0].tolist()):
        with pytest.warns(sd.MaskedBranchWarning, match=MASKED):
            outputs = model(TOKENS, output_attentions=True, output_hidden_states=True)
        plain = model(TOKENS).last_hidden_state
    assert len(outputs.attentions) == 3
    for found, attention in zip(outputs.attentions, maps, strict=True):
        torch.testing.assert_close(found, attention, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-12)
    assert depth.verify(TOKENS, output_attentions=True).num_masked == 6


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_router_s_loss_is_that_of_masks(granularity: Any) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1.0,
        experts_implementation="eager",
    )  # fmt: skip
    model: Any = transformers.MixtralForCausalLM(config).double()
    closed = [1, 3, 4]
    depth = sd.make_stochastic_(model, sd.uniform(0.5), granularity=granularity)
    reference = copy.deepcopy(model)
    sd.restore_(reference)
    parts = [part for layer in reference.model.layers for part in (layer.self_attn, layer.mlp)]
    for index in closed:

        def zeros(_module: Any, _args: Any, output: Any) -> Any:
            return (output[0] * 0.0, *output[1:]) if isinstance(output, tuple) else output * 0.0

        parts[index].register_forward_hook(zeros)
    expected = reference(TOKENS, labels=TOKENS, use_cache=False)
    with pytest.warns(sd.MaskedBranchWarning, match=MASKED), depth.gates([index not in closed for index in range(6)]):
        found = model(TOKENS, labels=TOKENS, use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-10, atol=1e-12)
    assert len(found.router_logits) == 3
    found.loss.backward()
    expected.loss.backward()
    for (name, own), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_a_layer_that_is_a_branch_gives_its_maps_too() -> None:
    model = bert()
    depth = sd.make_stochastic_(model, sd.uniform(0.5), layers=["encoder.layer.*"])
    with depth.gates([True, False, True]):
        outputs = model(TOKENS, output_attentions=True)
    assert [attention.shape for attention in outputs.attentions] == [(4, 2, 7, 7)] * 3
