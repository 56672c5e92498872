"""What the proof of a block at its first call must not miss.

The reference is each block's own formula with its gates written into it, in float64.
"""

import copy
import dataclasses
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd


class Block(nn.Module):
    """A block with one branch, in which something happens to the output of its linear map."""

    def __init__(self, inside: Callable[[Tensor], Tensor] = lambda y: y, *, drop_path: bool = False) -> None:
        super().__init__()
        self.f, self.inside, self.drop_path = linear(), inside, DropPath() if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.inside(self.f(x)))


def without_gradients(y: Tensor) -> Tensor:
    with torch.no_grad():
        shift = y.mean(-1, keepdim=True)
    return y - shift


@torch.no_grad()
def decorated(y: Tensor) -> Tensor:
    return y * 2


def switched(y: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    shift = y.mean(-1, keepdim=True)
    torch.set_grad_enabled(True)
    return y - shift


@pytest.mark.parametrize(
    "inside", [without_gradients, lambda y: y + decorated(y), switched], ids=["with", "decorator", "switch"]
)
@pytest.mark.parametrize("drop_path", [False, True])
def test_gradients_are_on_after_a_block_that_turns_them_off(
    inside: Callable[[Tensor], Tensor], *, drop_path: bool
) -> None:
    net, x = nn.Sequential(Block(inside, drop_path=drop_path), Block(inside, drop_path=drop_path)).double(), data(4)
    plain = [copy.deepcopy(block.f) for block in net]
    depth = sd.make_stochastic_(net, *([] if drop_path else [sd.uniform(0.5)]), rescale="none", inputs=[x])
    with depth.gates([True, True]):
        for _ in range(2):
            output = net(x)
            assert torch.is_grad_enabled()
            net.zero_grad()
            output.sum().backward()
    expected = x
    for f in plain:
        expected = expected + inside(f(expected))
    expected.sum().backward()
    assert_same(output.detach(), expected.detach())
    for block, f in zip(net, plain, strict=True):
        assert_same(block.f.weight.grad, f.weight.grad)
    assert depth.masked == []


class Reversed(torch.autograd.Function):
    """Passes on its input, and the gradient with another sign."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Reversing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(Reversed.apply(x)))


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_a_proof_without_gradients_of_the_input_holds_for_no_other() -> None:
    net, x = nn.Sequential(Reversing(), Reversing(), Reversing()).double(), data(4)
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, rescale="none")
    with depth.gates([torch.ones(4, dtype=torch.bool)] * 3):
        net(x).sum().backward()
    y = x
    for block in plain:
        y = y + block.f(Reversed.apply(y))
    y.sum().backward()
    for ours, theirs in zip(net, plain, strict=True):
        assert_same(ours.f.weight.grad, theirs.f.weight.grad)


class Mixing(nn.Module):
    """Subtracts the mean over samples, from some time on or for some samples on."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on, self.amount, self.least = False, 0.0, 2
        self.register_buffer("gain", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_on and len(x) >= self.least:
            x = x - x.mean(0)
        return x - (self.amount + self.gain) * x.mean(0)


class Permuting(nn.Module):
    def __init__(self, *, by_sorting: bool) -> None:
        super().__init__()
        self.by_sorting = by_sorting

    def forward(self, x: Tensor) -> Tensor:
        order = torch.rand(len(x)).argsort() if self.by_sorting else torch.randperm(len(x))
        return x + x[order]


class AroundChild(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.f, self.child, self.drop_path = linear(), child, DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.child(self.f(x)))


CHANGES: dict[str, Callable[[Mixing], object]] = {
    "flag": lambda child: setattr(child, "is_on", True),
    "number": lambda child: setattr(child, "amount", 1.0),
    "buffer": lambda child: child.gain.fill_(1.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_mixing_that_begins_later_is_seen(change: str) -> None:
    net, x = nn.Sequential(AroundChild(Mixing())).double(), data(4)
    depth = sd.make_stochastic_(net, rescale="none")
    gate = torch.tensor([True, False, True, True])
    with depth.gates([gate]):
        net(x)
        CHANGES[change](net[0].child)
        for _ in range(3):
            assert_same(net(x), x + gate[:, None] * net[0].child(net[0].f(x)))


@pytest.mark.parametrize(
    "child", [Permuting(by_sorting=False), Permuting(by_sorting=True)], ids=["randperm", "argsort"]
)
def test_a_permutation_is_not_taken_for_the_identity(child: nn.Module) -> None:
    net, x = nn.Sequential(AroundChild(child)).double(), data(4)
    depth = sd.make_stochastic_(net)
    with pytest.warns(sd.MaskedBranchWarning, match="not one of independent samples"):
        net(x)
    assert [name for name, _ in depth.masked] == ["0.drop_path"]


def test_mixing_of_many_samples_is_seen() -> None:
    net, x = nn.Sequential(AroundChild(Mixing())).double(), data(40)
    net[0].child.is_on, net[0].child.least = True, 16
    depth = sd.make_stochastic_(net)
    with pytest.warns(sd.MaskedBranchWarning, match="not one of independent samples"):
        net(x)
    assert [name for name, _ in depth.masked] == ["0.drop_path"]


class Flipping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(0)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max()


@pytest.mark.parametrize("child", [Flipping(), Largest()], ids=["flip", "max"])
@pytest.mark.parametrize("num_samples", [2, 4, 5, 12, 39])
def test_mixing_is_seen_for_any_number_of_samples(child: nn.Module, num_samples: int) -> None:
    net, x = nn.Sequential(AroundChild(child)).double(), data(num_samples)
    depth = sd.make_stochastic_(net)
    with pytest.warns(sd.MaskedBranchWarning, match="not one of independent samples"):
        net(x)
    assert [name for name, _ in depth.masked] == ["0.drop_path"]


class MixingMany(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) >= 16 else x


def test_a_proof_for_few_samples_holds_for_no_more() -> None:
    net = nn.Sequential(AroundChild(MixingMany())).double()
    depth = sd.make_stochastic_(net)
    net(data(5))
    assert depth.masked == []
    with pytest.warns(sd.MaskedBranchWarning, match="not one of independent samples"):
        net(data(20))


def test_mixing_that_nothing_announces_is_noticed() -> None:
    net, x = nn.Sequential(AroundChild(ByConfig())).double(), data(4)
    depth = sd.make_stochastic_(net)
    net(x)
    net[0].child.config["mixes"] = True
    with pytest.warns(sd.MaskedBranchWarning, match="not one of independent samples"):
        net(x)
    assert [name for name, _ in depth.masked] == ["0.drop_path"]


class ByConfig(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"mixes": False}

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.config["mixes"] else x


class Switching(nn.Module):
    """Changes its child, calls it, and changes it back."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop, self.drop_path = linear(), nn.Dropout(0.5), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        self.drop.p = 0.0
        y = self.drop(self.f(x))
        self.drop.p = 0.5
        return x + self.drop_path(y)


def test_a_child_that_is_changed_for_its_call_is_called_so() -> None:
    net, x = nn.Sequential(Switching(), Switching()).double(), data(4)
    depth = sd.make_stochastic_(net, rescale="none")
    with depth.gates([True, True]), pytest.warns(sd.MaskedBranchWarning, match="it changes drop.p"):
        output = net(x)
    expected = x + net[0].f(x)
    assert_same(output, expected + net[1].f(expected))


class Measuring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.size = linear(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        self.size = y.mean().item()
        return y


class UsingMeasured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = Measuring(), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + self.drop_path(y * self.f.size)


def test_a_number_that_a_child_sets_is_that_of_the_call() -> None:
    net = nn.Sequential(UsingMeasured(), UsingMeasured()).double()
    depth = sd.make_stochastic_(net, rescale="none")
    with pytest.warns(sd.MaskedBranchWarning, match="f.size, which f sets"):
        net(data(4))
    with depth.gates([True, True]):
        for seed in (0, 1):
            x = data(4, seed=seed)
            output, expected = net(x), x
            for block in net:
                y = block.f.f(expected)
                expected = expected + y * y.mean()
            assert_same(output, expected)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_child_that_moves_its_buffers_is_no_other_in_a_proof(granularity: str) -> None:
    net, x = nn.Sequential(Block(drop_path=True)).double(), data(4)
    torch.nn.utils.parametrizations.spectral_norm(net[0].f)
    depth = sd.make_stochastic_(net, granularity=granularity, rescale="none")
    with depth.gates([True]):
        output = net(x)
    assert depth.masked == []
    assert_same(output, x + net.eval()[0].f(x))


class InPlace(nn.Module):
    def __init__(self, add: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.f, self.add = linear(), add

    def forward(self, x: Tensor) -> Tensor | None:
        return self.add(x, self.f(x))


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def test_sums_in_place_of_what_requires_gradients_are_skipped() -> None:
    net, x = nn.Sequential(linear(), InPlace(add_in_place), InPlace(lambda x, y: x.add_(y))).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x])
    assert depth.names == ["1#1", "2#1"]
    for gates in ([True, True], [False, True], [True, False], [False, False]):
        with depth.gates(gates):
            expected = net[0](x)
            for block, gate in zip(net[1:], gates, strict=True):
                expected = expected + block.f(expected) if gate else expected
            assert_same(net(x), expected)
    assert depth.masked == []


class Adding(nn.Module):
    """Calls blocks that return nothing and add to what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.block = InPlace(lambda x, y: (x.add_(y), None)[1])

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        self.block(x)
        return x


@pytest.mark.parametrize("by_example", [False, True])
def test_a_block_that_returns_nothing_changes_its_argument(*, by_example: bool) -> None:
    net, x = Adding().double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None, rescale="none")
    for is_open in (True, False):
        with torch.no_grad(), depth.gates([is_open]):
            assert_same(net(x), x + is_open * net.block.f(x))
    assert depth.masked == []


def profiled(y: Tensor) -> Tensor:
    with torch.profiler.record_function("branch"):
        return y * 2


def test_marks_for_a_profiler_are_no_obstacle() -> None:
    net, x = nn.Sequential(Block(profiled, drop_path=True)).double(), data(4)
    depth = sd.make_stochastic_(net, rescale="none")
    with depth.gates([True]):
        assert_same(net(x), x + 2 * net[0].f(x))
    assert depth.masked == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_a_scripted_child_may_be_masked() -> None:
    net, x = nn.Sequential(Block(drop_path=True)).double(), data(4)
    net[0].f = torch.jit.script(net[0].f)
    depth = sd.make_stochastic_(net, rescale="none")
    for gate in (True, False):
        with depth.gates([gate]):
            assert_same(net(x), x + gate * net[0].f(x))


class Wider(nn.Module):
    """Adds a branch of another type than its shortcut."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.f, self.dtype, self.drop_path = linear(), dtype, DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x.float() + self.drop_path(self.f(x)).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_closed_sum_has_the_type_of_an_open_one(granularity: str, dtype: torch.dtype) -> None:
    net, x = nn.Sequential(Wider(dtype)).double(), data(4)
    depth = sd.make_stochastic_(net, granularity=granularity)
    for gate in (True, False):
        with depth.gates([gate]):
            assert net(x).dtype is dtype


def test_an_iterator_that_is_given_is_not_used_up() -> None:
    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.drop_path = linear(), DropPath()

        def forward(self, x: Tensor, skips: Iterator[Tensor]) -> Tensor:
            return x + self.drop_path(self.f(x) + next(skips))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Fed()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, (each for each in [x, 2 * x]))

    net, x = Net().double(), data(4)
    depth = sd.make_stochastic_(net, rescale="none")
    with depth.gates([True]), pytest.warns(sd.MaskedBranchWarning, match="iterator"):
        assert_same(net(x), x + net.block.f(x) + x)


class Checkpointing(nn.Module):
    def __init__(self, *, around_child: bool) -> None:
        super().__init__()
        self.f, self.drop_path, self.around_child = linear(), DropPath(), around_child

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(checkpoint(self.f, x, use_reentrant=False) if self.around_child else self.f(x))


class CheckpointingNet(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("around_child", [False, True])
def test_verify_passes_on_checkpoints(granularity: str, *, around_child: bool) -> None:
    blocks = [Checkpointing(around_child=around_child) for _ in range(2)]
    net = (nn.Sequential if around_child else CheckpointingNet)(*blocks).double()
    depth = sd.make_stochastic_(net, granularity=granularity)
    report = depth.verify(data(4))
    assert (report.num_branches, report.num_masked) == (2, 0)


class Averaging(nn.Module):
    """Updates a buffer in its own forward, which masks its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath()
        self.register_buffer("average", torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x + self.drop_path(self.f(x) * self.average)


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_verify_passes_on_a_masked_block_that_updates_a_buffer() -> None:
    net, x = nn.Sequential(Averaging()).double(), data(4)
    depth = sd.make_stochastic_(net)
    assert depth.verify(x).num_masked == 1
    assert_same(net[0].average, torch.ones(D).double())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own use
@pytest.mark.parametrize("gate", [False, True])
def test_forward_mode_and_gradients_of_each_sample(gate: bool) -> None:
    net, x = nn.Sequential(Block(drop_path=True)).double(), data(4)
    f = copy.deepcopy(net[0].f)
    depth = sd.make_stochastic_(net, granularity="batch", rescale="none")
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, (sample[None],)).square().sum()

    with depth.gates([gate]):
        output, tangent = torch.func.jvp(net, (x,), (torch.ones_like(x),))
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert_same(output, x + gate * f(x))
    assert_same(tangent, torch.ones_like(x) + gate * f.weight.sum(1))
    assert_same(gradients["0.f.bias"], gate * 2 * (x + f(x)))


# ---------------------------------------- branches that drop themselves


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1), 0.5, dtype=x.dtype)) if self.training else x


@pytest.mark.parametrize(
    "inside",
    [Dropping(), lambda y: y * nn.functional.dropout(torch.ones(y.shape[0], 1, dtype=y.dtype), 0.5)],
    ids=["child", "dropout of ones"],
)
def test_a_branch_that_drops_itself_is_told(inside: Any) -> None:
    net = nn.Sequential(Block(inside), Block(inside)).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    with pytest.warns(UserWarning, match="may drop its branches itself") as told:
        net(data(4))
    assert len(told) == 1


@dataclasses.dataclass
class State:
    h: Tensor
    count: int = 0


class OfState(nn.Module):
    """Uses one drop path twice, in code that makes a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.drop_path = linear(), linear(), DropPath()

    def forward(self, state: State) -> State:
        h = state.h + self.drop_path(self.f(state.h))
        return State(h + self.drop_path(self.g(h)), state.count + 1)


class StateNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = OfState()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(State(x)).h


def test_a_dataclass_is_read_like_other_code() -> None:
    net, x = StateNet().double(), data(4)
    depth = sd.make_stochastic_(net, granularity="batch", rescale="none")
    assert depth.names == ["block.drop_path#1", "block.drop_path#2"]
    with depth.gates([False, True]):
        assert_same(net(x), x + net.block.g(x))
    with depth.gates([True, False]):
        assert_same(net(x), x + net.block.f(x))


# ---------------------------------------- whole layers


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, position: Tensor, x: Tensor) -> Tensor:
        return x + self.f(x + position)


class LayerNet(nn.Module):
    def __init__(self, *, by_name: bool) -> None:
        super().__init__()
        self.layers, self.by_name = nn.ModuleList([Layer(), Layer()]), by_name

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(position=position, x=x) if self.by_name else layer(position, x)
        return x


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_closed_layer_hands_on_its_hidden_states(granularity: str, *, by_name: bool) -> None:
    net, x, position = LayerNet(by_name=by_name).double(), data(4), data(4, seed=1)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["layers.*"], granularity=granularity, rescale="none")
    with depth.gates([False, False]):
        assert_same(net(x, position), x)
    with depth.gates([False, True]):
        assert_same(net(x, position), x + net.layers[1].f(x + position))


class Making(OrderedDict[str, type[nn.Module]]):
    """Makes a module of the class that it holds, as the table of activations in transformers does."""

    def __getitem__(self, name: str) -> nn.Module:  # type: ignore[override]
        return super().__getitem__(name)()


ACTIVATIONS = Making(relu=nn.ReLU)


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.act, self.drop_path = linear(), ACTIVATIONS["relu"], DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x).relu() if "relu" in ACTIVATIONS else x)


def test_a_dictionary_that_makes_its_values_stays_what_it_is() -> None:
    net, x = nn.Sequential(Looking()).double(), data(4)
    depth = sd.make_stochastic_(net, rescale="none")
    with depth.gates([True]):
        for _ in range(3):
            assert_same(net(x), x + net[0].f(x).relu())
    assert len(net[0]._stochastic_depth_branch.forms.prepared) == 1
    depth.verify(x)
    assert dict.__getitem__(ACTIVATIONS, "relu") is nn.ReLU


class MixingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop = linear(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.drop(self.f(x))
        return y - y.mean(0)


def test_a_layer_that_mixes_samples_is_refused() -> None:
    net, x = nn.Sequential(MixingLayer()).double(), data(8)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["0"], granularity="sample")
    state = torch.get_rng_state()
    with depth.gates([torch.arange(8) < 5]), pytest.raises(RuntimeError, match="mixes samples"):
        net(x)
    assert torch.equal(torch.get_rng_state(), state)


class OfSamples(nn.Module):
    """A branch whose output for one sample depends on what the others are given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = linear(), kind

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        if self.kind == "lengths":
            scale = (torch.arange(x.shape[1]) / given.max())[None, :, None]
        elif self.kind == "positions":
            scale = given[0].double().cos()[None, :, None]
        else:
            scale = (given.any(0) if self.kind == "used" else given.all(0))[None, :, None]
        return x + self.f(x * scale)


class OfSamplesNet(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.block = OfSamples(kind)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.block(x, given)


EQUAL = {
    "lengths": torch.full((5,), 4),
    "positions": torch.arange(4).expand(5, 4).clone(),
    "used": (torch.arange(4) < 3).expand(5, 4).clone(),
    "used by all": (torch.arange(4) < 3).expand(5, 4).clone(),
}


@pytest.mark.parametrize("kind", list(EQUAL))
def test_equal_numbers_and_masks_do_not_hide_that_samples_are_mixed(kind: str) -> None:
    net = OfSamplesNet(kind).double()
    f = copy.deepcopy(net.block.f)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    gate = torch.tensor([False, True, False, True, False])
    x = data(5, 4)
    # Numbers and masks of samples that do not run count too: the branch is given all of them.
    others = {"lengths": torch.tensor([9, 4, 4, 4, 4]), "positions": EQUAL["positions"].flip(1)}
    for given in (EQUAL[kind], others.get(kind, EQUAL[kind] & (torch.arange(5) > 0)[:, None])):
        plain = OfSamples(kind)
        plain.f = f
        with depth.gates([gate]):
            assert_same(net(x, given), x + gate[:, None, None] * (plain(x, given) - x))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_batch_without_samples_passes(granularity: Any) -> None:
    net = nn.Sequential(Block(), Block()).double()
    plain = copy.deepcopy(net)
    sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
    for num in (5, 0, 3):
        x = data(num).requires_grad_()
        net(x).sum().backward()
        assert net(x).shape == plain(x).shape
    assert all(parameter.grad is not None for parameter in net.parameters())


class Routed(nn.Module):
    """Stores a loss for the model on itself, as mixtures of experts do."""

    def __init__(self, *, normalized: bool) -> None:
        super().__init__()
        self.gate, self.f, self.loss = nn.Linear(D, 2), linear(), torch.zeros(())
        if normalized:
            nn.utils.weight_norm(self.f)
        self.stores = not normalized

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        if self.stores:
            self.loss = (weights.mean(0) ** 2).sum()
        return self.f(x) * weights[..., :1]


class RoutedBlock(nn.Module):
    def __init__(self, *, normalized: bool) -> None:
        super().__init__()
        self.experts = Routed(normalized=normalized)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x)


def test_a_loss_that_a_child_stores_is_always_computed() -> None:
    net = nn.Sequential(RoutedBlock(normalized=False)).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    for seed in range(3):
        x = data(4, seed=seed)
        with depth.gates([False]), pytest.warns(sd.MaskedBranchWarning) if seed == 0 else nullcontext():
            assert_same(net(x), x)
        plain(x)
        assert_same(net[0].experts.loss, plain[0].experts.loss)
        net[0].experts.loss.backward()
    assert "experts.loss" in str(depth)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_computed_anew_is_no_loss() -> None:
    net = nn.Sequential(RoutedBlock(normalized=True)).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    calls = count_calls(net[0].experts)
    with depth.gates([False]):
        net(data(4))
    calls.clear()
    with depth.gates([False]):
        net(data(4))
    assert calls == []


def count_calls(module: nn.Module) -> list[nn.Module]:
    calls: list[nn.Module] = []
    module.register_forward_hook(lambda module, *_: calls.append(module))
    return calls


def pair_layer(name: str) -> type[nn.Module]:
    """A layer whose first part, of a class of this name, also gives something for the next layer."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.bias = linear(), nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            bias = self.bias if bias is None else bias
            return self.f(x) + bias, bias * 2

    Part.__name__ = name

    class PairLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.g = Part(), linear()

        def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            y = self.part(x, bias)
            x = x + y[0]
            return x + self.g(x), y[1]

    return PairLayer


class PairNet(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
@pytest.mark.parametrize("name", ["SelfAttention", "TimeMix"])
def test_a_branch_that_gives_more_is_found_whatever_its_class_is_called(name: str) -> None:
    net = PairNet(pair_layer(name)).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert len(depth) == 4
    x = data(3)
    with depth.gates([False, True, True, False]):
        y = net(x)
    first, second = net.layers
    hidden = x + first.g(x)
    bias = first.part(x, None)[1]
    assert_same(y, hidden + second.part(hidden, bias)[0])


class PairBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = linear()

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mixer(residual), residual


class PairModel(nn.Module):
    """Each layer gets what the one before has computed and has not added, as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PairBlock() for _ in range(4)])

    def forward(self, hidden: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


def test_the_last_sum_of_a_model_is_its_last_branch() -> None:
    net = PairModel().double()
    depth = sd.make_stochastic_(net, sd.linear_decay(0.6), inputs=[data(3)])
    assert len(depth) == 4
    for index, layer in enumerate(net.layers):
        calls = count_calls(layer.mixer)
        for _ in range(2):  # The first call of a form proves.
            calls.clear()
            with depth.gates([other != index for other in range(4)]):
                net(data(3))
        assert calls == []


class InTime(nn.Module):
    """Mixes the frames, which are samples here, in the layer with number 1 only."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.f = layer_idx, linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x - x.mean(0) if self.layer_idx == 1 else x)


class OfFrames(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.attention = InTime(layer_idx)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def test_layers_whose_code_reads_their_number_are_proven_one_by_one() -> None:
    net = nn.Sequential(OfFrames(0), OfFrames(2), OfFrames(1)).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    with pytest.raises(RuntimeError, match=r"The block 2 .* its first dimension is not one of independent samples"):
        net(data(8))


class LaterMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x - x.mean(0) if getattr(self.f, "mixes", False) else x)


class LaterMixingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = LaterMixing()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(x)


def test_equal_blocks_are_looked_at_again_in_turn() -> None:
    net = nn.Sequential(LaterMixingBlock(), LaterMixingBlock(), LaterMixingBlock()).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    net(data(8))
    net[2].g.f.mixes = True
    for _ in range(2):  # In the second call it is the turn of block 1, in the fourth of block 2.
        net(data(8))
    with pytest.raises(RuntimeError, match="its first dimension is not one of independent samples"):
        net(data(8))


class AddingTo(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_a_branch_that_changes_the_shortcut_in_place_is_named() -> None:
    branch = nn.Sequential(nn.ReLU(inplace=True), linear())
    net = nn.Sequential(AddingTo(branch)).double()
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(RuntimeError, match="branch changes what it is given in place"):
        net(data(4).requires_grad_() * 1)


class Chunking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([self.f(part) for part in x.chunk(4)])


def test_a_branch_that_splits_the_batch_is_refused() -> None:
    net = nn.Sequential(Chunking()).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", inputs=[data(8)])
    with pytest.raises(RuntimeError, match="its code changes with the number of samples"):
        net(data(8))


class Shared(nn.Module):
    """The first argument is one that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return x + self.f(x + positions)


class SharedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Shared()

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return self.block(positions, x)


def test_the_first_argument_may_be_one_that_all_samples_share() -> None:
    net = SharedNet().double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    positions, x = data(3), data(8, 3, seed=1)
    gate = torch.arange(8) % 3 == 0
    with depth.gates([gate]):
        assert_same(net(positions, x), x + gate.double().view(-1, 1, 1) * (plain(positions, x) - x))


class Capacity(nn.Module):
    """Leaves out what does not fit, which depends on the other samples once one kind is frequent."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.router = linear(), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x)[..., 0] > 40
        return self.f(x) * (chosen.cumsum(0) <= len(x) * 3 // 4)[..., None]


def test_mixing_that_training_leads_to_is_seen() -> None:
    net = nn.Sequential(AddingTo(Capacity())).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    net(data(8))
    with torch.no_grad():
        net[0].branch.router.bias += 100
    with pytest.raises(RuntimeError, match="its first dimension is not one of independent samples"):
        net(data(8))


class BranchFirst(nn.Module):
    """A sum that has the memory layout of its branch."""

    def __init__(self, *, in_place: bool = False, drop_path: bool = False) -> None:
        super().__init__()
        self.f, self.in_place, self.drop_path = linear(), in_place, DropPath() if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.f(x))
        if self.in_place:
            y += x
            return y
        return y + x


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("drop_path", [False, True])
def test_a_sum_lies_in_memory_as_the_blocks_own_does(granularity: Any, *, in_place: bool, drop_path: bool) -> None:
    net = nn.Sequential(BranchFirst(in_place=in_place, drop_path=drop_path)).double()
    depth = sd.make_stochastic_(net, None if drop_path else sd.uniform(0.5), granularity=granularity)
    x = torch.randn(4, D, 3).double().transpose(1, 2)
    for gate in (True, False) if granularity == "batch" else (torch.tensor([True, False, True, False]),):
        with depth.gates([gate]):
            y = net(x)
        assert y.is_contiguous()
        factor = torch.as_tensor(gate).double().view(-1, 1, 1) * (2 if drop_path else 1)
        assert_same(y, x + factor * net[0].f(x))


class WithLengths(nn.Module):
    """Also returns whole numbers, which have no rounding error."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(BranchFirst(), BranchFirst())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x) / 3, torch.arange(len(x))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_verify_compares_each_output_by_its_own_rounding(granularity: Any) -> None:
    net = WithLengths()
    depth = sd.make_stochastic_(net, sd.uniform(0.3), granularity=granularity)
    assert depth.verify(data(8).float())


class LayerResult(nn.Module):
    """Returns the branch's output beside the sum, as fairseq's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.f(x)
        result = self.g(x)
        return x + result, result


def test_an_addition_without_a_gate_is_told() -> None:
    depth = sd.make_stochastic_(LayerResult(), sd.uniform(0.5))
    assert len(depth) == 1
    assert "(LayerResult): an addition has no gate, the branch's output is used outside the sum" in str(depth)


class Sparse(nn.Module):
    """Experts that run only if a token is sent to them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 8), nn.ModuleList([linear() for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]))
        return y


def test_experts_that_no_sample_is_sent_to_are_no_failure() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(AddingTo(Sparse()), AddingTo(Sparse())).double()
        depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
        for step in range(3):
            net(data(5, seed=step)).sum().backward()
        assert depth.verify(data(5))


class Attending(nn.Module):
    """Cuts a mask that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        num = x.shape[1]
        return x + (self.f(x) @ x.transpose(1, 2) + mask[:num, :num]).softmax(-1) @ x


class AttendingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Attending()
        self.register_buffer("mask", torch.full((8, 8), -10.0).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.mask)


def test_a_mask_may_have_a_multiple_of_the_samples() -> None:
    net = AttendingNet().double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    for num in (3, 4, 2, 8):
        x, gate = data(num, 5), torch.arange(num) % 2 == 0
        with depth.gates([gate]):
            assert_same(net(x), x + gate.double().view(-1, 1, 1) * (plain(x) - x))


class Drawing(nn.Module):
    """Draws in a way that is seldom used."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = linear(), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "python":
            return self.f(x) * random.random()
        if self.kind == "numpy":
            return self.f(x) * float(np.random.rand())
        if self.kind == "gumbel":
            return nn.functional.gumbel_softmax(self.f(x), hard=True) @ self.f.weight
        return self.f.weight[torch.multinomial(self.f(x).softmax(-1), 1)[:, 0]] * x


@pytest.mark.parametrize("kind", ["python", "numpy", "gumbel", "multinomial"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_noise_of_children_does_not_make_a_proof_fail(kind: str, granularity: Any) -> None:
    net = nn.Sequential(AddingTo(Drawing(kind)), AddingTo(Drawing(kind))).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
    before = random.getstate()
    for seed in range(8):
        net(data(6, seed=seed)).sum().backward()
    assert kind == "python" or random.getstate() == before


class Projected(nn.Module):
    """Both operands of its sum are one child each."""

    def __init__(self) -> None:
        super().__init__()
        self.function = nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), linear())
        self.shortcut = nn.Sequential(linear())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + self.shortcut(x)


def test_layers_are_counted_inside_of_children() -> None:
    net = nn.Sequential(Projected()).double()
    depth, x = sd.make_stochastic_(net, sd.uniform(0.5)), data(4)
    with depth.gates([False]):
        assert_same(net(x), net[0].shortcut(x))


class WithSparse(nn.Module):
    """Holds a sparse buffer, as Whisper's alignment heads are."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()
        self.register_buffer("heads", torch.eye(3).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_sparse_buffers_are_no_obstacle() -> None:
    net = nn.Sequential(WithSparse()).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert depth.verify(data(4))
    assert depth.cost(data(4)).flops_share < 1


class SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.f = nn.Embedding(10, D, sparse=True), linear()

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return x + self.f(x) * self.embedding(words)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = SparseEmbedding()

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.block(x, words)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_sparse_gradients_are_compared(granularity: Any) -> None:
    net = Embedded().double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    x, words = data(4), torch.tensor([3, 1, 3, 7])
    with depth.gates([True]):
        net(x, words).sum().backward()
    gradient = net.block.embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    expected = torch.zeros(10, D, dtype=torch.float64).index_add(0, words, net.block.f(x).detach())
    assert_same(gradient.to_dense(), expected)
    depth.verify(x, words)


class NormInFloat32(nn.Module):
    """Normalizes in float32, as Gemma does in models of any type."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x)
        return x + self.g(torch.tanh(self.f(y)))


def test_rounding_in_a_coarser_type_than_that_of_the_output() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(NormInFloat32() for _ in range(2))).double()
    plain, x = copy.deepcopy(net), torch.randn(64, 8, dtype=torch.float64)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    some = torch.arange(64) % 3 > 0
    expected = x
    for block, gate in zip(plain, (some, ~some), strict=True):
        expected = torch.where(gate[:, None], block(expected), expected)
    with depth.gates([some, ~some]):
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    depth.verify(x)


class ComplexBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8, dtype=torch.complex128)
        self.decay = nn.Parameter(torch.rand(8, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x * self.decay)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_complex_values_have_the_tolerance_of_their_parts(granularity: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(ComplexBlock() for _ in range(3)))
    plain, x = copy.deepcopy(net), torch.randn(33, 8, dtype=torch.complex128)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    some = torch.arange(33) % 3 > 0
    gates = [some, ~some, some] if granularity == "sample" else [True, False, True]
    expected = x
    for block, gate in zip(plain, gates, strict=True):
        rows = gate[:, None] if isinstance(gate, Tensor) else torch.tensor(gate)
        expected = torch.where(rows, block(expected), expected)
    with depth.gates(gates):
        torch.testing.assert_close(net(x), expected)
    depth.verify(x)


class Attention(nn.Module):
    """Attention whose key has a bias, of which nothing depends: its gradient is what rounding leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rescale", ["train", "eval"])
def test_a_gradient_of_rounding_is_no_difference_in_half_precision(rescale: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net, x = nn.Sequential(*(Attention() for _ in range(3))), torch.randn(4, 6, 16)
    depth = sd.make_stochastic_(net, sd.uniform(0.7), rescale=rescale)
    with torch.autocast("cpu", torch.bfloat16):
        net(x).sum().backward()
        net.eval()(x)
    assert depth.masked == []


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=True)


def test_verify_says_that_reentrant_checkpoints_stand_in_its_way() -> None:
    net = nn.Sequential(linear(), Reentrant()).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(
        RuntimeError, match=r"^verify computes gradients in a way that reentrant .* do not support: use "
    ):
        depth.verify(data(4))


class Force(nn.Module):
    """The gradient of an energy, by a transform that allows no hooks on saved tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(linear(), nn.Tanh(), nn.Linear(D, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: self.energy(row).sum()))(x)


class Moved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.force, self.f = Force(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.force(x))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_child_may_differentiate_by_a_transform(granularity: Any) -> None:
    net, x = nn.Sequential(Moved()).double(), data(4)
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    with depth.gates([True]):
        actual = net(x)
    assert_same(actual, plain(x))
    actual.square().sum().backward()
    plain(x).square().sum().backward()
    for mine, its in zip(net.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        if its.grad is not None:
            assert_same(mine.grad, its.grad)
    with depth.gates([False]):
        assert_same(net(x), x)
