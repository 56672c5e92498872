"""The gated sum against the plain network and the plain method: outputs, gradients and BatchNorm's buffers."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import reference
import torch
from reference import (
    assert_close,
    assert_same,
    buffers,
    conv_net,
    copied,
    counted_calls,
    every_pattern,
    gradients,
    images,
    linear_net,
    loss_of,
    mlp,
    pattern_prob,
    residuals_of,
    training_factors,
    vectors,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import stochastic_depth as sd

SURVIVAL_PROBS = [0.9, 0.7, 0.5, 0.3]
NETS = {"mlp": (mlp, vectors), "conv": (conv_net, images)}
both_nets = pytest.mark.parametrize(("make", "inputs"), NETS.values(), ids=NETS)
both_granularities = pytest.mark.parametrize("granularity", ["batch", "sample"])
all_rescales = pytest.mark.parametrize("rescale", ["eval", "train", "none"])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
both_skipped_grads = pytest.mark.parametrize("skipped_grad", ["zero", "none"])

Make = Callable[..., nn.Module]


def assert_equal_steps(
    ours: nn.Module,
    theirs: nn.Module,
    our_forward: Callable[[], Tensor],
    their_forward: Callable[[], Tensor],
    compare: Callable[..., None],
    *,
    after_backward: Callable[[], None] = lambda: None,
) -> None:
    """One forward and backward each: the same outputs, gradients and buffers."""
    results = []
    for net, forward in ((ours, our_forward), (theirs, their_forward)):
        net.zero_grad()
        output = forward()
        loss_of(output).backward()
        if net is theirs:
            after_backward()
        results.append(({"output": output.detach()}, gradients(net), buffers(net)))
    for our_part, their_part in zip(*results, strict=True):
        compare(our_part, their_part)


# ---------------------------------------------------------------------------------------------- exact


@both_nets
@both_granularities
@pytest.mark.parametrize("rescale", ["eval", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["forced", "survival 1"])
def test_all_gates_open_is_the_plain_network_bit_for_bit(
    make: Make, inputs: Make, granularity: str, rescale: str, dtype: torch.dtype, how: str
) -> None:
    plain = make(dtype=dtype)
    net = copied(plain)
    probs = SURVIVAL_PROBS if how == "forced" else [1.0] * 4
    depth = sd.make_stochastic_(net, probs, granularity=granularity, rescale=rescale)
    x = inputs(7, dtype=dtype)

    def forward() -> Tensor:
        if how == "survival 1":
            return net(x)
        with depth.gates([True] * 4):
            return net(x)

    for _ in range(2):  # a second step: the first has changed the buffers
        assert_equal_steps(net, plain, forward, lambda: plain(x), assert_same)


def test_all_samples_open_is_the_plain_network_bit_for_bit() -> None:
    plain = conv_net()
    net, x = copied(plain), images(7)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    with depth.gates([torch.ones(7, dtype=torch.bool)] * 4):
        assert_equal_steps(net, plain, lambda: net(x), lambda: plain(x), assert_same)


@both_nets
@both_granularities
@all_rescales
def test_evaluation_is_the_plain_rule(make: Make, inputs: Make, granularity: str, rescale: str) -> None:
    plain = make().eval()
    net, x = copied(plain), inputs(5)
    sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, rescale=rescale)
    assert_equal_steps(
        net, plain, lambda: net(x), lambda: reference.evaluate(plain, x, SURVIVAL_PROBS, rescale), assert_close
    )


def test_evaluation_follows_changed_survival_probs() -> None:
    net, x = mlp().eval(), vectors(5)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    depth.set_survival_probs([0.2, 0.4, 0.6, 0.8])
    plain = mlp().eval()
    assert_close({"output": net(x)}, {"output": reference.evaluate(plain, x, [0.2, 0.4, 0.6, 0.8], "eval")})


@both_nets
@both_granularities
@all_rescales
@both_modes
@both_skipped_grads
def test_forced_gates_follow_the_training_rule(
    make: Make, inputs: Make, granularity: str, rescale: str, training: bool, skipped_grad: str
) -> None:
    """All sixteen subnetworks in either mode: an open branch has factor 1 or 1/p, a closed one is not run."""
    plain = make().train(training)
    net, x = copied(plain), inputs(3)
    depth = sd.make_stochastic_(
        net, SURVIVAL_PROBS, granularity=granularity, rescale=rescale, skipped_grad=skipped_grad
    )
    factors = training_factors(SURVIVAL_PROBS, rescale)
    for gates in every_pattern(4):
        with depth.gates(gates):
            assert_equal_steps(
                net,
                plain,
                lambda: net(x),
                lambda gates=gates: reference.forward(plain, x, gates, factors),
                assert_close,
                after_backward=lambda gates=gates: reference.fill_skipped_gradients(plain, gates, skipped_grad),
            )


@both_nets
@all_rescales
def test_drawn_gates_follow_the_training_rule(make: Make, inputs: Make, rescale: str) -> None:
    plain = make()
    net, x = copied(plain), inputs(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, rescale=rescale)
    factors = training_factors(SURVIVAL_PROBS, rescale)
    seen = set()
    for _ in range(40):
        with counted_calls(net) as calls:
            net.zero_grad()
            output = net(x)
        gates = tuple(bool(sizes) for sizes in calls)
        seen.add(gates)
        assert depth.last_gates == [float(gate) for gate in gates]
        loss_of(output).backward()
        plain.zero_grad()
        theirs = reference.forward(plain, x, gates, factors)
        loss_of(theirs).backward()
        reference.fill_skipped_gradients(plain, gates, "zero")
        assert_close({"output": output.detach()}, {"output": theirs.detach()})
        assert_close(gradients(net), gradients(plain))
        assert_close(buffers(net), buffers(plain))
    assert len(seen) >= 8


# ---------------------------------------------------------------------------------------------- enumerated


@both_granularities
@pytest.mark.parametrize("rescale", ["eval", "train"])
def test_mean_over_all_subnetworks(granularity: str, rescale: str) -> None:
    """With linear branches the expectation over gates is the evaluation ("eval") or the plain network ("train")."""
    plain, x = linear_net(), vectors(3)
    net = copied(plain)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, rescale=rescale)
    mean, total = torch.zeros(3, 3, dtype=torch.float64), 0.0
    for gates in every_pattern(4):
        prob = pattern_prob(gates, SURVIVAL_PROBS)
        with depth.gates(gates), torch.no_grad():
            mean += prob * net(x)
        total += prob
    assert total == pytest.approx(1, abs=1e-12)
    expected = net.eval()(x).detach()
    assert_close({"output": mean}, {"output": expected}, atol=1e-12)
    assert_close(
        {"output": expected}, {"output": reference.evaluate(plain, x, SURVIVAL_PROBS, rescale).detach()}, atol=1e-12
    )


def test_mean_over_all_masks_of_one_sample() -> None:
    """Granularity "sample": the same expectation for one sample while the others' gates are whatever they are."""
    x = vectors(3)
    net = linear_net()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample", rescale="train")
    mean = torch.zeros(3, dtype=torch.float64)
    for gates in every_pattern(4):
        masks = [torch.tensor([index % 2 == 0, gate, True]) for index, gate in enumerate(gates)]
        with depth.gates(masks), torch.no_grad():
            mean += pattern_prob(gates, SURVIVAL_PROBS) * net(x)[1]
    assert_close({"output": mean}, {"output": net.eval()(x).detach()[1]}, atol=1e-12)


# ---------------------------------------------------------------------------------------------- the saving is real


def saved_bytes(net: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward keeps for its backward, beyond the network's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(kept.values())
    del output
    return total


@both_skipped_grads
@both_granularities
def test_a_closed_branch_is_not_called_and_its_statistics_stay(granularity: str, skipped_grad: str) -> None:
    net, x = conv_net(), images(5)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, skipped_grad=skipped_grad)
    for gates in every_pattern(4):
        before = buffers(net)
        with depth.gates(gates), counted_calls(net) as calls:
            loss_of(net(x)).backward()
        assert calls == [[5] if gate else [] for gate in gates]
        after = buffers(net)
        for index, gate in enumerate(gates):
            names = [name for name in before if name.startswith(f"blocks.{index}.residual.branch.")]
            assert len(names) == 6
            unchanged = [torch.equal(before[name], after[name]) for name in names]
            assert unchanged == [not gate] * 6, names


@both_skipped_grads
def test_a_closed_branch_stores_nothing(skipped_grad: str) -> None:
    residual = sd.Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    depth = sd.make_stochastic_(residual, [0.5], skipped_grad=skipped_grad)
    x = torch.randn(4, 6, requires_grad=True)
    with depth.gates([False]):
        assert saved_bytes(residual, lambda: residual(x)) == 0
    with depth.gates([True]):
        assert saved_bytes(residual, lambda: residual(x)) == 4 * 6 * 4 * 2  # x and tanh(...)


@both_nets
@both_skipped_grads
def test_activations_are_those_of_the_open_branches(make: Make, inputs: Make, skipped_grad: str) -> None:
    plain = make()
    net, x = copied(plain), inputs(5)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, skipped_grad=skipped_grad)
    for gates in every_pattern(4):
        theirs = saved_bytes(plain, lambda gates=gates: reference.forward(plain, x, gates))
        with depth.gates(gates):
            ours = saved_bytes(net, lambda: net(x))
        assert ours == theirs, gates


def test_activations_of_a_subset_are_those_of_its_samples() -> None:
    net = sd.Residual(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    depth = sd.make_stochastic_(net, [0.5], granularity="sample")
    x = torch.randn(16, 64, requires_grad=True)
    for num_open in range(17):
        with depth.gates([torch.arange(16) < num_open]):
            # Two activations of `num_open` rows, and the indices of the samples.
            assert abs(saved_bytes(net, lambda: net(x)) - 2 * num_open * 64 * 4) <= 2 * 16 * 8


@both_granularities
def test_promised_gradient_of_the_skipped(granularity: str) -> None:
    x = vectors(4)
    for skipped_grad in ("zero", "none"):
        net = mlp()
        depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, skipped_grad=skipped_grad)
        with depth.gates([True, False, True, True]):
            loss_of(net(x)).backward()
        for parameter in residuals_of(net)[1].branch.parameters():
            if skipped_grad == "none":
                assert parameter.grad is None
            else:
                assert parameter.grad.dtype == parameter.dtype
                assert torch.equal(parameter.grad, torch.zeros_like(parameter))
        for parameter in residuals_of(net)[0].branch.parameters():
            assert parameter.grad.abs().max() > 0


@both_skipped_grads
def test_an_existing_gradient_survives_the_skipped_step(skipped_grad: str) -> None:
    """Accumulation: zeros add nothing, "none" does not even touch the tensor."""
    net, x = mlp(), vectors(4)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, skipped_grad=skipped_grad)
    loss_of(net.eval()(x)).backward()
    branch = residuals_of(net)[1].branch
    kept = [(parameter.grad, parameter.grad.clone(), parameter.grad._version) for parameter in branch.parameters()]
    with depth.gates([True, False, True, True]):
        loss_of(net(x)).backward()
    for parameter, (grad, value, version) in zip(branch.parameters(), kept, strict=True):
        assert torch.equal(parameter.grad, value)
        if skipped_grad == "none":
            assert parameter.grad is grad
            assert grad._version == version


@both_skipped_grads
@both_granularities
def test_gradient_accumulation(granularity: str, skipped_grad: str) -> None:
    """Three micro-batches with different gates: the sum of the three plain gradients."""
    plain = mlp()
    net = copied(plain)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, skipped_grad=skipped_grad)
    patterns = [(True, False, False, True), (False, False, True, True), (True, False, True, False)]
    for step, gates in enumerate(patterns):
        with depth.gates(gates):
            loss_of(net(vectors(3, seed=step))).backward()
        loss_of(reference.forward(plain, vectors(3, seed=step), gates)).backward()
    reference.fill_skipped_gradients(plain, (True, False, True, True), skipped_grad)
    assert_close(gradients(net), gradients(plain))


# ---------------------------------------------------------------------------------------------- autograd


def mask(*bits: int) -> Tensor:
    return torch.tensor([bool(bit) for bit in bits])


GATES = {"open": True, "closed": False, "subset": mask(1, 0, 1), "one": mask(0, 1, 0)}
all_gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


@all_gates
@all_rescales
@both_skipped_grads
def test_first_and_second_derivatives(gate: bool | Tensor, rescale: str, skipped_grad: str) -> None:
    torch.manual_seed(0)
    residual = sd.Residual(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), nn.Linear(2, 2)).double()
    depth = sd.make_stochastic_(residual, [0.5], granularity="sample", rescale=rescale, skipped_grad=skipped_grad)
    names = [name for name, _ in residual.named_parameters() if not name.startswith("branch") or gate is not False]
    values = [dict(residual.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        with depth.gates([gate]):
            return torch.func.functional_call(residual, dict(zip(names, values, strict=True)), (x,)) ** 2

    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))


class _View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape)


SHORTCUTS = {"none": lambda: None, "identity": nn.Identity, "view": _View, "module": lambda: nn.Linear(4, 4)}


@all_gates
@pytest.mark.parametrize("mode", ["training", "no_grad", "evaluation"])
@pytest.mark.parametrize("shortcut", SHORTCUTS.values(), ids=SHORTCUTS)
@pytest.mark.parametrize("source", ["leaf", "user's", "saved result"])
@both_skipped_grads
def test_in_place_code_after_the_sum(
    gate: bool | Tensor, shortcut: Callable[[], nn.Module | None], source: str, mode: str, skipped_grad: str
) -> None:
    """torchvision's ResNets: `out += identity; relu_(out)`. Nobody else's tensor changes and the backward is right."""
    torch.manual_seed(0)
    plain = sd.Residual(nn.Linear(4, 4), shortcut())
    net = copied(plain)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample", skipped_grad=skipped_grad)
    net.train(mode == "training")
    leaf = torch.randn(3, 4, requires_grad=source != "user's")
    results = []
    for ours in (True, False):
        leaf.grad = None
        with torch.set_grad_enabled(mode != "no_grad"):
            x = leaf.tanh() if source == "saved result" else leaf  # tanh's backward needs its result as it was
            before = x.detach().clone()
            if ours:
                with depth.gates([gate]):
                    y = net(x)
                y += 1
                y.relu_()
            else:
                carried = x if plain.shortcut is None else plain.shortcut(x)
                y = (reference.plain_sum(carried, plain.branch, x, gate, 1.0) + 1).relu()
        assert torch.equal(x, before)
        if y.requires_grad:
            loss_of(y).backward()
        results.append(({"y": y.detach()}, {"x": leaf.grad}))
    for our_part, their_part in zip(*results, strict=True):
        assert_close(our_part, their_part, atol=1e-5)


@all_gates
@both_skipped_grads
def test_an_input_that_requires_no_gradient(gate: bool | Tensor, skipped_grad: str) -> None:
    torch.manual_seed(0)
    net = sd.Residual(nn.Linear(4, 4))
    depth = sd.make_stochastic_(net, [0.5], granularity="sample", skipped_grad=skipped_grad)
    x = torch.randn(3, 4)
    with depth.gates([gate]):
        y = net(x)
    closed = gate is False
    assert y.requires_grad == (not closed or skipped_grad == "zero")
    if y.requires_grad:
        y.sum().backward()
        assert all((parameter.grad.abs().max() == 0) == closed for parameter in net.parameters())
    assert x.grad is None


@all_gates
@both_skipped_grads
def test_frozen_parameters_get_no_gradient(gate: bool | Tensor, skipped_grad: str) -> None:
    net = mlp(1)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample", skipped_grad=skipped_grad)
    frozen = residuals_of(net)[0].branch[0]
    frozen.requires_grad_(False)
    with depth.gates([gate]):
        loss_of(net(vectors(3))).backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    open_parameter = residuals_of(net)[0].branch[2].weight
    assert (open_parameter.grad is None) == (gate is False and skipped_grad == "none")
    assert net.stem.weight.grad.abs().max() > 0


def test_a_wholly_frozen_branch_costs_no_graph() -> None:
    net = sd.Residual(nn.Linear(4, 4)).requires_grad_(False)
    depth = sd.make_stochastic_(net, [0.5])
    for gate in (True, False):
        with depth.gates([gate]):
            assert not net(torch.randn(2, 4)).requires_grad


@both_granularities
def test_training_mode_without_gradients_follows_the_gates(granularity: str) -> None:
    plain = conv_net()
    net, x = copied(plain), images(4)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity)
    with torch.no_grad():
        for gates in every_pattern(4):
            with depth.gates(gates):
                ours = net(x)
            theirs = reference.forward(plain, x, gates)
            assert not ours.requires_grad
            assert_close({"output": ours}, {"output": theirs})
            assert_close(buffers(net), buffers(plain))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_inference_mode() -> None:
    net, x = conv_net(), images(4)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    with torch.inference_mode():
        for gate in (True, False, mask(1, 0, 1, 1)):
            with depth.gates([gate] * 4):
                assert net(x).shape == (4, 4)
        net(x)


# ---------------------------------------------------------------------------------------------- number formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@all_gates
@all_rescales
def test_half_precision_modules(dtype: torch.dtype, gate: bool | Tensor, rescale: str) -> None:
    plain = mlp(dtype=dtype)
    net, x = copied(plain), vectors(3, dtype=dtype)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample", rescale=rescale)
    with depth.gates([gate] * 4):
        ours = net(x)
    loss_of(ours).backward()
    theirs = reference.forward(plain, x, [gate] * 4, training_factors(SURVIVAL_PROBS, rescale))
    loss_of(theirs).backward()
    reference.fill_skipped_gradients(plain, [gate] * 4, "zero")
    assert ours.dtype == dtype
    assert {parameter.grad.dtype for parameter in net.parameters()} == {dtype}
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    for our_grad, their_grad in zip(gradients(net).values(), gradients(plain).values(), strict=True):
        scale = max(their_grad.abs().max().item(), 1.0)
        torch.testing.assert_close(our_grad, their_grad, atol=tolerance * scale, rtol=tolerance)
    assert torch.isfinite(net.eval()(x)).all()


@all_gates
@both_skipped_grads
def test_autocast(gate: bool | Tensor, skipped_grad: str) -> None:
    plain = conv_net(dtype=torch.float32)
    net, x = copied(plain), images(3, dtype=torch.float32)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample", skipped_grad=skipped_grad)
    results = []
    for ours in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if ours:
                with depth.gates([gate] * 4):
                    output = net(x)
            else:
                output = reference.forward(plain, x, [gate] * 4)
            loss = loss_of(output)
        loss.backward()
        results.append(output)
    reference.fill_skipped_gradients(plain, [gate] * 4, skipped_grad)
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    torch.testing.assert_close(results[0], results[1], atol=0.05, rtol=0.05)
    for (name, ours), theirs in zip(gradients(net).items(), gradients(plain).values(), strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == torch.float32
            scale = max(theirs.abs().max().item(), 1.0)
            torch.testing.assert_close(ours, theirs, atol=0.05 * scale, rtol=0.05)


def test_autocast_all_open_is_the_plain_network_bit_for_bit() -> None:
    plain = conv_net(dtype=torch.float32)
    net, x = copied(plain), images(3, dtype=torch.float32)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with depth.gates([True] * 4):
            ours = net(x)
        theirs = plain(x)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@all_gates
def test_memory_format_is_that_of_the_plain_network(memory_format: torch.memory_format, gate: bool | Tensor) -> None:
    plain = conv_net().to(memory_format=memory_format)
    net = copied(plain)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    x = images(3).to(memory_format=memory_format)
    seen = []
    hooks = [residual.register_forward_hook(lambda _m, _i, y: seen.append(y)) for residual in residuals_of(net)]
    with depth.gates([gate] * 4):
        ours = net(x)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in seen)
    theirs = reference.forward(plain, x, [gate] * 4)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


# ---------------------------------------------------------------------------------------------- sharing and nesting


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.residual = sd.Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.residual(x).sin())


@pytest.mark.parametrize("gate", [True, False], ids=["open", "closed"])
@both_granularities
def test_one_residual_used_twice(gate: bool, granularity: str) -> None:
    """Shared weights are one branch with one gate, and their gradients add up."""
    torch.manual_seed(0)
    plain = _Twice().double()
    net, x = copied(plain), torch.randn(3, 4, dtype=torch.float64)
    depth = sd.make_stochastic_(net, [0.5], granularity=granularity, rescale="train")
    assert depth.names == ["residual"]
    with depth.gates([gate]), counted_calls(net) as calls:
        y = net(x)
    assert calls == [[3, 3] if gate else []]
    y.sum().backward()
    f = plain.residual.branch
    once = reference.plain_sum(x, f, x, gate, 2.0).sin()
    theirs = reference.plain_sum(once, f, once, gate, 2.0)
    if gate:
        theirs.sum().backward()
    else:
        plain.zero_grad()
        for parameter in plain.parameters():
            parameter.grad = torch.zeros_like(parameter)
    assert_close({"y": y.detach()}, {"y": theirs.detach()})
    assert_close(gradients(net), gradients(plain))


@both_granularities
def test_one_residual_used_twice_draws_once(granularity: str) -> None:
    net, x = _Twice(), torch.randn(6, 4)
    sd.make_stochastic_(net, [0.5], granularity=granularity)
    for _ in range(20):
        with counted_calls(net) as calls:
            net(x)
        sizes = calls[0]
        assert sizes in ([], [6, 6]) if granularity == "batch" else sizes == [3, 3]
    assert sd.controller(net).state_dict()["counter"] == 20


@pytest.mark.parametrize("gates", every_pattern(2), ids=str)
def test_two_residuals_that_share_a_branch(gates: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    net = nn.Sequential(nn.Linear(4, 4).double(), sd.Residual(shared), nn.Tanh(), sd.Residual(shared))
    plain, x = copied(net), torch.randn(3, 4, dtype=torch.float64)
    depth = sd.make_stochastic_(net, [0.5, 0.5])
    assert depth.names == ["1", "3"]
    with depth.gates(gates):
        net(x).sum().backward()
    h = plain[0](x)
    h = reference.plain_sum(h, plain[1].branch, h, gates[0], 1.0).tanh()
    reference.plain_sum(h, plain[3].branch, h, gates[1], 1.0).sum().backward()
    if gates == (False, False):
        for parameter in plain[1].branch.parameters():
            parameter.grad = torch.zeros_like(parameter)
    assert_close(gradients(net), gradients(plain))


@pytest.mark.parametrize("gates", every_pattern(2), ids=str)
@both_skipped_grads
def test_a_residual_inside_a_branch(gates: tuple[bool, bool], skipped_grad: str) -> None:
    torch.manual_seed(0)
    net = sd.Residual(nn.Sequential(nn.Linear(4, 4), sd.Residual(nn.Linear(4, 4)), nn.Tanh())).double()
    plain, x = copied(net), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    depth = sd.make_stochastic_(net, [0.5, 0.25], rescale="train", skipped_grad=skipped_grad)
    outer, inner = gates
    with depth.gates(gates), counted_calls(net) as calls:
        y = net(x)
    assert calls == [[3] if outer else [], [3] if outer and inner else []]
    y.sum().backward()
    first, residual, last = plain.branch
    theirs = x
    if outer:
        h = first(x)
        theirs = x + 2 * last(reference.plain_sum(h, residual.branch, h, inner, 4.0))
    theirs.sum().backward()
    assert_close({"y": y.detach()}, {"y": theirs.detach()})
    expected = gradients(plain)
    if skipped_grad == "zero":
        expected = {
            name: torch.zeros_like(parameter) if expected[name] is None else expected[name]
            for name, parameter in plain.named_parameters()
        }
    assert_close(gradients(net), expected)


# ---------------------------------------------------------------------------------------------- the plain module


def test_the_plain_residual_is_the_sum_and_nothing_more() -> None:
    torch.manual_seed(0)
    branch, shortcut, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    residual = sd.Residual(branch, shortcut)
    assert torch.equal(residual(x), shortcut(x) + branch(x))
    assert [name for name, _ in residual.named_children()] == ["branch", "shortcut"]
    assert list(residual.state_dict()) == ["branch.weight", "branch.bias", "shortcut.weight", "shortcut.bias"]
    square = nn.Linear(3, 3)
    assert torch.equal(sd.Residual(square)(x), x + square(x))
    assert sd.Residual(square).shortcut is None


def test_a_step_leaves_no_graph_behind() -> None:
    """A pass must not keep activations alive."""
    net = mlp()
    sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    loss_of(net(vectors(4))).backward()
    gc.collect()
    before = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    for step in range(10):
        net.zero_grad()
        loss_of(net(vectors(4, seed=step))).backward()
    gc.collect()
    assert sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()) <= before


def test_functional_transforms_give_the_same_gradients() -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    x = vectors(4)
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(net, values, (x,)))

    gates = [torch.tensor([True, False, True, False]), False, True, torch.tensor([False, True, True, True])]
    with depth.gates(gates):
        functional = torch.func.grad(loss)(parameters)
        loss_of(net(x)).backward()
    assert_close(functional, gradients(net))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_derivatives(*, gate: bool) -> None:
    net = mlp(1)
    reference = copied(net)
    depth = sd.make_stochastic_(net, [0.5])
    x, v = vectors(3), vectors(3, seed=2)
    residual = reference.blocks[0].residual

    def by_hand(x: Tensor) -> Tensor:
        h = reference.stem(x)
        return reference.head((h + gate * residual.branch(h)).relu())

    with depth.gates([gate]), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, v))).tangent
    jacobian = torch.autograd.functional.jvp(by_hand, x, v)[1]
    torch.testing.assert_close(tangent, jacobian, rtol=1e-12, atol=1e-12)
