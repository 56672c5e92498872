"""Whole layers of decoders: each family equals its masked self, generates as before and trains with the usual tools."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from decoders import FAMILIES, LEAVE_EARLY, NUM_LAYERS, decoder, layers_of, mask_layers, token_ids

import stochastic_depth as sd

BATCH = [True, False, True], [False, True, True], [True, True, False]
SAMPLE = ([torch.tensor(gate) for gate in ([True, False, True], [False, False, True], [True, True, False])],)


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = token_ids()
    output = model(input_ids=ids)
    logits = output.logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_masked_self(model: Any, depth: sd.Controller, plain: Any, family: str, gates: Any) -> None:
    reference = copy.deepcopy(plain)
    mask_layers(layers_of(family, reference), gates)
    expected, expected_gradients = loss_and_gradients(reference)
    with depth.gates(gates):
        logits, gradients = loss_and_gradients(model)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for name, gradient in expected_gradients.items():
        # Their norms compute in float32 whatever the model's precision: sums over samples are as exact as that.
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=0, atol=1e-6, msg=name)
    assert not torch.allclose(logits, loss_and_gradients(plain)[0])  # the gates matter


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_its_masked_self(family: str, granularity: str) -> None:
    plain = decoder(family).train()
    model = copy.deepcopy(plain)
    depth = sd.make_stochastic_(model, sd.layerdrop(0.5), layers=[FAMILIES[family][1]], granularity=granularity)
    assert len(depth.names) == NUM_LAYERS
    for gates in BATCH if granularity == "batch" else SAMPLE:
        assert_equals_masked_self(model, depth, plain, family, gates)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "Gemma2"])  # Gemma2's scores are capped: eager only
def test_with_sdpa_too(family: str) -> None:
    plain = decoder(family, attention="sdpa").train()
    model = copy.deepcopy(plain)
    depth = sd.make_stochastic_(model, sd.layerdrop(0.5), layers=[FAMILIES[family][1]], granularity="sample")
    assert_equals_masked_self(model, depth, plain, family, SAMPLE[0])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_with_gradient_checkpointing(family: str) -> None:
    plain = decoder(family).train()
    model = copy.deepcopy(plain)
    depth = sd.make_stochastic_(model, sd.layerdrop(0.5), layers=[FAMILIES[family][1]], granularity="sample")
    model.gradient_checkpointing_enable()
    runs: list[int] = []
    for index, layer in enumerate(layers_of(family, model)):
        next(m for m in layer.modules() if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))) \
            .register_forward_hook(lambda *_, index=index: runs.append(index))  # fmt: skip
    assert_equals_masked_self(model, depth, plain, family, SAMPLE[0])
    assert runs == [0, 1, 2, 2, 1, 0]
    # Drawn gates are those of the recomputation too: it would not fit the gradients otherwise.
    for _ in range(4):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_of_blocks_with_branches() -> None:
    """Without `layers=` the sums inside of a layer are branches; the layer is checkpointed with them."""
    model = decoder().train()
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    gates = [True, False, False, True, True, True]
    with depth.gates(gates):
        expected, expected_gradients = loss_and_gradients(model)
    model.gradient_checkpointing_enable()
    runs: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate_proj.register_forward_hook(lambda *_, index=index: runs.append(index))
    with depth.gates(gates):
        logits, gradients = loss_and_gradients(model)
    assert runs == [1, 2, 2, 1]
    assert torch.equal(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_the_plain_model(family: str) -> None:
    """With a cache, in evaluation; and by its first layers, where transformers can leave early."""
    plain = decoder(family, use_cache=True).eval()
    model = copy.deepcopy(plain)
    sd.make_stochastic_(model, sd.layerskip(0.5), layers=[FAMILIES[family][1]])
    prompt = token_ids(1)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    plain.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    expected = plain.generate(prompt, **options)
    assert expected.shape == (1, 15)
    assert torch.equal(model.generate(prompt, **options), expected)
    sd.fold_(model, inputs={"input_ids": prompt})
    calls = dict.fromkeys(range(NUM_LAYERS), 0)
    for index, layer in enumerate(layers_of(family, model)):
        layer.register_forward_hook(lambda *_, index=index: calls.update({index: calls[index] + 1}))
    if family in LEAVE_EARLY:
        assert torch.equal(model.generate(prompt, assistant_early_exit=2, **options), expected)
        assert calls[0] == calls[1] > calls[2]
        assert calls[2] <= 8
    else:  # transformers 5.23 runs all layers of these, whatever the configuration says
        with pytest.raises(IndexError):
            model.generate(prompt, assistant_early_exit=2, **options)


@pytest.mark.parametrize("closed", range(1, NUM_LAYERS))
def test_a_closed_layer_leaves_the_cache_of_the_others_alone(closed: int) -> None:
    """In evaluation gates may be forced and the cache be used: a subnetwork generates."""
    plain = decoder(use_cache=True).eval()
    model = copy.deepcopy(plain)
    depth = sd.make_stochastic_(model, sd.layerdrop(0.5), layers=["model.layers.*"])
    gates = [index != closed for index in range(NUM_LAYERS)]
    mask_layers(plain.model.layers, [[gate] for gate in gates])
    prompt = token_ids(2)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    with depth.gates(gates):
        output = model.generate(prompt, **options)
    assert torch.equal(output, plain.generate(prompt, **options))


def test_trainer(tmp_path: Path) -> None:
    """It sets `use_cache`; each step draws, and layers that never run do not change."""
    model = decoder("Llama", use_cache=True).float()
    depth = sd.make_stochastic_(model, [1.0, 1.0, 1e-9], layers=["model.layers.*"], rescale="none", skipped_grad="none")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(6)]
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert depth.last_gates == [1.0, 1.0, 0.0]
    assert depth.state_dict()["counter"] == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("model.layers.2."), name


def test_accelerate() -> None:
    plain = decoder("Llama").train()
    model = copy.deepcopy(plain)
    depth = sd.make_stochastic_(model, sd.layerdrop(0.5), layers=["model.layers.*"])
    tool = accelerate.Accelerator(cpu=True)
    prepared, optimizer = tool.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = token_ids()
    tool.backward(prepared(input_ids=ids, labels=ids).loss)
    optimizer.step()
    gates = [[share == 1.0] for share in depth.last_gates or ()]
    mask_layers(plain.model.layers, gates)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(input_ids=ids, labels=ids).loss.backward()
    theirs.step()
    for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


def test_a_cache_in_training_is_refused() -> None:
    model = decoder("Llama", use_cache=True)
    depth = sd.make_stochastic_(model, sd.layerskip(0.5), layers=["model.layers.*"])
    message = (
        r"^The layer model\.layers\.1 may be dropped in training, but receives a key-value cache[^\n]*use_cache = F"
    )
    for call in (lambda: model.train()(token_ids()), lambda: model.train().generate(token_ids(), max_new_tokens=2)):
        with pytest.raises(ValueError, match=message):
            call()
    model.train()(token_ids(), use_cache=False)
    depth.set_survival_probs([1.0] * NUM_LAYERS)
    model(token_ids())


def test_layers_that_cannot_be_found() -> None:
    with pytest.raises(
        ValueError, match=r"^layers: the pattern 'h\.\*' matches no module of LlamaForCausalLM \(tried: "
    ) as e:
        sd.make_stochastic_(decoder("Llama"), sd.layerskip(0.2), layers=["h.*", "blocks.*"])
    assert "(tried: 'h.*', 'blocks.*'). Its lists of layers are model.layers.* (3 LlamaDecoderLayer)." in str(e.value)
    assert "\n" not in str(e.value)


def test_layerdrop_of_the_model_itself() -> None:
    model = decoder("OPT")
    model.config.layerdrop = 0.1
    with pytest.raises(
        ValueError, match=r"^The model itself skips layers too, with a rate of 0\.1[^\n]*layerdrop = 0\.0"
    ):
        sd.make_stochastic_(model, sd.layerskip(0.2), layers=["model.decoder.layers.*"])
