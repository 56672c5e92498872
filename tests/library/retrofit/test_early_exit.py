"""Losses of early exits against a plain version that keeps all hidden states."""

import copy
from typing import Any

import pytest
import torch
from decoders import FAMILIES, NUM_LAYERS, VOCABULARY, decoder, layers_of, token_ids
from process_group import group_of_one
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

LAST = NUM_LAYERS - 1


def stochastic(family: str = "Llama", granularity: str = "sample") -> tuple[Any, sd.Controller]:
    model = decoder(family).train()
    depth = sd.make_stochastic_(model, sd.layerdrop(0.5), layers=[FAMILIES[family][1]], granularity=granularity)
    return model, depth


def plain_losses(model: Any, labels: list[Tensor], layers: nn.ModuleList, gates: Any) -> list[Tensor]:
    """After layer k: the plain model of the first k layers, computed anew for each."""
    losses = []
    for count in range(1, NUM_LAYERS + 1):
        shorter = copy.deepcopy(model)
        for parameter, own in zip(shorter.parameters(), model.parameters(), strict=True):
            parameter.data = own.data
        hooks = []
        for index, layer in enumerate(layers_of_copy(shorter, layers, model)):

            def keep(_m: Any, args: Any, kwargs: Any, output: Any, index: int = index, count: int = count) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                own = output[0] if isinstance(output, tuple) else output
                kept = torch.where(gates[index].view(-1, 1, 1) & (index < count), own, hidden)
                return (kept, *output[1:]) if isinstance(output, tuple) else kept

            hooks.append(layer.register_forward_hook(keep, with_kwargs=True))
        logits = shorter(input_ids=token_ids()).logits.float()
        own_labels = labels[count - 1]
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), own_labels[:, 1:].flatten()))
        losses[-1].model = shorter  # type: ignore[attr-defined]
    return losses


def layers_of_copy(shorter: Any, layers: nn.ModuleList, model: Any) -> nn.ModuleList:
    path = next(name for name, module in model.named_modules() if module is layers)
    return shorter.get_submodule(path)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2", "OPT"])  # scores capped, a bias, a projection behind
def test_losses_and_gradients_are_those_of_shorter_models(family: str) -> None:
    plain = decoder(family).train()
    model, depth = stochastic(family)
    gates = [torch.tensor(gate) for gate in ([True, True, True], [True, False, True], [False, True, True])]
    labels = [token_ids().masked_fill(~gate[:, None], -100) for gate in gates]
    labels[LAST] = token_ids()  # the whole model's loss is that of all samples
    expected = plain_losses(plain, labels, layers_of(family, plain), gates)
    with depth.gates(gates):
        losses = sd.early_exit_losses(model, {"input_ids": token_ids(), "labels": token_ids()}, range(NUM_LAYERS))
    assert list(losses) == [0, 1, 2]
    for loss, other in zip(losses.values(), expected, strict=True):
        torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-6)
    with depth.gates(gates):
        sd.early_exit_loss(
            model, {"input_ids": token_ids(), "labels": token_ids()}, range(NUM_LAYERS), scale=0.5
        ).backward()
    weights = [0.0, 0.5, 2.5]
    gradients: dict[str, Any] = dict.fromkeys((name for name, _ in plain.named_parameters()), 0.0)
    for loss, weight in zip(expected, weights, strict=True):
        (loss * (weight / 3.0)).backward()
        for name, parameter in loss.model.named_parameters():  # type: ignore[attr-defined]
            gradients[name] = gradients[name] + (0.0 if parameter.grad is None else parameter.grad)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad / largest, gradients[name] / largest, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_closed_layers_give_no_loss_and_run_nothing() -> None:
    model, depth = stochastic(granularity="batch")
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    with depth.gates([True, False, True]):
        losses = sd.early_exit_losses(model, inputs, [0, 1])
        assert list(losses) == [0, 2]
        own = model(**inputs).loss
        assert torch.equal(losses[LAST], own)
        # Its weight goes to the others: with layer 0's weight of 0, all of it to the last.
        torch.testing.assert_close(sd.early_exit_loss(model, inputs, [0, 1]), own)
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    with depth.gates([True, False, True]):
        loss = sd.early_exit_loss(model, inputs, [0, 1, 2])
    loss.backward()
    assert calls == [0, 2]


def test_the_gates_are_those_of_the_step_and_only_it_counts() -> None:
    model, depth = stochastic()
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    for step in range(6):
        losses = sd.early_exit_losses(model, inputs, range(NUM_LAYERS))
        assert depth.state_dict()["counter"] == step + 1
        shares = depth.last_gates
        assert shares is not None
        open_layers = {index for index, share in enumerate(shares) if share > 0} | {LAST}
        assert set(losses) == open_layers
        torch.stack(list(losses.values())).sum().backward()
        assert depth.last_gates == shares
        assert depth.passes.forced is None


def test_logits_of_several_exits_are_never_kept_together() -> None:
    """What the backward keeps grows by hidden states with each exit, not by logits."""
    model, depth = stochastic()
    inputs = {"input_ids": token_ids(), "labels": token_ids()}

    def kept(exits: list[int]) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t),
            depth.gates([True] * NUM_LAYERS),
        ):
            sd.early_exit_losses(model, inputs, exits)
        return [shape for shape in shapes if VOCABULARY in shape and len(shape) > 1 and shape != (VOCABULARY, 16)]

    assert len(kept([])) > 0
    assert kept([0, 1]) == kept([])


def test_in_evaluation_and_in_a_wrapper() -> None:
    model, _ = stochastic()
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    model.eval()
    with torch.no_grad():
        losses = sd.early_exit_losses(model, inputs, range(NUM_LAYERS))
    assert torch.equal(losses[LAST], model(**inputs).loss)
    assert len(losses) == NUM_LAYERS
    with group_of_one():
        wrapped = DistributedDataParallel(model.train())
        for _ in range(3):
            sd.early_exit_loss(wrapped, inputs, [1]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_in_shards() -> None:
    """The head runs again in the backward, on parameters that FSDP2 gathers."""
    model, _ = stochastic(granularity="batch")
    plain = copy.deepcopy(model)
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    with group_of_one():
        sd.shard_(model, torch.distributed.init_device_mesh("cpu", (1,)))
        for _ in range(3):
            for each in (model, plain):
                sd.early_exit_loss(each, inputs, [1]).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad.full_tensor(), theirs.grad)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_with_gradient_checkpointing() -> None:
    model, depth = stochastic()
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    gates = [torch.tensor(gate) for gate in ([True, True, False], [True, False, True], [False, True, True])]
    found = []
    for _ in range(2):
        model.zero_grad()
        with depth.gates(gates):
            sd.early_exit_loss(model, inputs, [1]).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_samples_without_labels_give_no_loss() -> None:
    """None of the samples for which the layer is open has a label: there must be no mean over nothing."""
    model, depth = stochastic()
    labels = token_ids()
    labels[1] = -100
    with depth.gates([torch.tensor([True] * 3), torch.tensor([False, True, False]), torch.tensor([True] * 3)]):
        losses = sd.early_exit_losses(model, {"input_ids": token_ids(), "labels": labels}, [0, 1])
    assert list(losses) == [0, 2]
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("num_layers", [1, 2, 5, 24])
@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_weights_are_the_formula(num_layers: int, scale: float) -> None:
    expected = [scale * sum(range(layer + 1)) for layer in range(num_layers - 1)]
    expected.append(num_layers - 1 + scale * sum(range(num_layers - 1)))
    assert sd.early_exit_weights(num_layers, scale) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("every", [1, 3, 4, 9])
def test_rotation_reaches_each_layer_once_in_a_turn(every: int) -> None:
    turn = [sd.rotating_exits(8, every=every, step=step) for step in range(5 * every, 6 * every)]
    reached = sorted(layer for exits in turn for layer in exits if layer != 7)
    assert reached == list(range(7))
    assert all(7 in exits for exits in turn)
    assert max(map(len, turn)) <= -(-8 // every) + 1


def test_the_loss_of_a_single_layer_is_that_of_the_model() -> None:
    model = decoder()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    sd.make_stochastic_(model, sd.uniform(1.0), layers=["model.layers.*"])
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    assert torch.equal(sd.early_exit_loss(model, inputs, [0]), model(**inputs).loss)


def test_bad_inputs() -> None:
    model, _ = stochastic()
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    for layer in (NUM_LAYERS, -1, 1.0, True):
        with pytest.raises(ValueError, match=rf"^An exit must be a layer in 0\.\.2, but is {layer}\. Layer 2 is"):
            sd.early_exit_loss(model, inputs, [layer])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^The inputs have no labels: without them the model computes no loss\.$"):
        sd.early_exit_losses(model, {"input_ids": token_ids()}, [0])
    with pytest.raises(ValueError, match="is not stochastic"):
        sd.early_exit_loss(decoder(), inputs, [0])
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, but is 0"):
        sd.rotating_exits(4, every=0, step=0)
    with pytest.raises(ValueError, match="num_layers must be a whole number of at least 1, but is 0"):
        sd.rotating_exits(0, every=1, step=0)
    with pytest.raises(ValueError, match=r"step must be a whole number of at least 0, but is 1\.5"):
        sd.rotating_exits(4, every=1, step=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be a number of at least 0, but is -1"):
        sd.early_exit_loss(model, inputs, [0], scale=-1)
    some = decoder()
    sd.make_stochastic_(some, sd.uniform(0.5), layers=["model.layers.[12]"])
    with pytest.raises(ValueError, match=r"^Early exits need all layers as branches, but 0 of 3 are none: [^\n]*$"):
        sd.early_exit_loss(some, inputs, [1])
    sums = decoder()
    sd.make_stochastic_(sums, sd.uniform(0.5))
    with pytest.raises(ValueError, match=r"^Early exits need the layers of one decoder as the only branches[^\n]*$"):
        sd.early_exit_loss(sums, inputs, [1])
    base = decoder().model
    sd.make_stochastic_(base, sd.uniform(1.0), layers=["layers.*"])
    with pytest.raises((ValueError, TypeError), match=r"returns no loss for these inputs|unexpected keyword"):
        sd.early_exit_losses(base, inputs, [0])
