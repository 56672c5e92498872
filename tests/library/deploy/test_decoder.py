"""Subnetworks of decoders: plain checkpoints of fewer layers, which transformers loads and generates with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import FAMILIES, LEAVE_EARLY, NUM_LAYERS, class_of, decoder, layers_of, mask_layers, token_ids

import stochastic_depth as sd

PROMPT = token_ids(1)
OPTIONS = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 6, "do_sample": False}


def stochastic(family: str, **options: Any) -> Any:
    model = decoder(family, use_cache=True).eval()
    model.generation_config.eos_token_id = None
    sd.make_stochastic_(model, sd.layerskip(0.5), layers=[FAMILIES[family][1]], **options)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("keep", [[0, 1], [0, 2]], ids=["first", "others"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_saves_and_loads_as_a_plain_checkpoint(family: str, keep: list[int], tmp_path: Path) -> None:
    model = stochastic(family)
    before = copy.deepcopy(model.config.to_dict())
    plain = decoder(family, use_cache=True).eval()
    mask_layers(layers_of(family, plain), [[index in keep] for index in range(NUM_LAYERS)])
    small = sd.subnetwork(model, keep, inputs={"input_ids": token_ids()})
    assert type(small) is class_of(family)
    assert len(layers_of(family, small)) == small.config.num_hidden_layers == 2
    assert model.config.to_dict() == before
    small.save_pretrained(tmp_path)
    loaded = class_of(family).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    assert loaded.config.num_hidden_layers == 2
    expected = plain(token_ids(), use_cache=False).logits
    for made in (small, loaded):
        torch.testing.assert_close(made(token_ids()).logits, expected, rtol=1e-6, atol=1e-6)
        # With a cache, in which each layer has its own entry.
        made.generation_config.eos_token_id = None
        generated = made.generate(PROMPT, **OPTIONS)
        assert generated.shape[1] == 13
        for length in range(PROMPT.shape[1], 13):
            best = plain(generated[:, :length], use_cache=False).logits[:, -1].argmax(-1)
            assert torch.equal(best, generated[:, length])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LEAVE_EARLY])
def test_as_the_assistant_of_a_model_that_cannot_leave_early(family: str) -> None:
    model = stochastic(family)
    small = sd.subnetwork(model, [0, 1], inputs={"input_ids": token_ids()})
    sd.fold_(model, inputs={"input_ids": token_ids()})
    assert torch.equal(model.generate(PROMPT, assistant_model=small, **OPTIONS), model.generate(PROMPT, **OPTIONS))


def test_entries_of_the_configuration_for_each_layer_go_along() -> None:
    model = stochastic("Gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    small = sd.subnetwork(model, [1, 2], inputs={"input_ids": token_ids()})
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_with_the_papers_factor_a_warning_says_that_the_checkpoint_lacks_it() -> None:
    model = stochastic("Llama", rescale="eval")
    expected = model(token_ids()).logits
    with pytest.warns(UserWarning, match=r"cannot go into weights[^\n]*its state_dict does not contain"):
        small = sd.subnetwork(model, range(NUM_LAYERS), inputs={"input_ids": token_ids()})
    torch.testing.assert_close(small(token_ids()).logits, expected)


def test_by_a_number_of_blocks_the_first_are_kept() -> None:
    small = sd.subnetwork(stochastic("Llama"), num_blocks=1, inputs={"input_ids": token_ids()})
    assert small.config.num_hidden_layers == len(small.model.layers) == 1
    assert torch.equal(small.model.layers[0].mlp.up_proj.weight, decoder().model.layers[0].mlp.up_proj.weight)
