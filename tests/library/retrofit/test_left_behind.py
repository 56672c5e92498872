"""Values that a branch leaves behind for the model's loss: its branch is computed and masked, never left out."""

import contextvars
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from plain_blocks import D, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd

_losses: list[Tensor] = []
_of_context: contextvars.ContextVar[Tensor] = contextvars.ContextVar("loss")
_namespace = SimpleNamespace(loss=torch.zeros(()))


class State:
    """What a model hands from block to block."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Router(nn.Module):
    """Mixes two experts, and leaves a loss behind."""

    of_class = torch.zeros(())

    def __init__(self, place: str) -> None:
        super().__init__()
        self.router, self.a, self.b, self.place = nn.Linear(D, 2), linear(), linear(), place

    def forward(self, x: Tensor, state: State) -> Tensor:
        shares = self.router(x).softmax(-1)
        loss = shares.mean(0).square().sum()
        if self.place == "list":
            _losses.append(loss)
        elif self.place == "features":
            _losses.append(shares)
        elif self.place == "context variable":
            _of_context.set(_of_context.get() + loss)
        elif self.place == "global object":
            _namespace.loss = _namespace.loss + loss
        elif self.place == "class":
            Router.of_class = Router.of_class + loss
        elif self.place == "argument":
            state.loss = state.loss + loss
        return shares[:, :1] * self.a(x) + shares[:, 1:] * self.b(x)


class Block(nn.Module):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.norm, self.experts, self.f = nn.LayerNorm(D), Router(place), linear()

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = x + self.experts(self.norm(x), state)
        return x + self.f(x)


class Net(nn.Module):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.blocks = place, nn.ModuleList(Block(place) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zero, state = torch.zeros((), dtype=x.dtype), State(torch.zeros((), dtype=x.dtype))
        _losses.clear()
        _of_context.set(zero)
        _namespace.loss = Router.of_class = zero
        for block in self.blocks:
            x = block(x, state)
        losses = {
            "nowhere": lambda: zero,
            "list": lambda: torch.stack(_losses).sum(),
            "features": lambda: torch.stack([each.square().mean() for each in _losses]).sum(),
            "context variable": _of_context.get,
            "global object": lambda: _namespace.loss,
            "class": lambda: Router.of_class,
            "argument": lambda: state.loss,
        }
        return x, losses[self.place]()


PLACES = ["list", "features", "context variable", "global object", "class", "argument"]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("place", PLACES)
def test_a_loss_that_a_closed_branch_leaves_behind_is_there(place: str, granularity: str) -> None:
    torch.manual_seed(0)
    net = Net(place).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    x = data(4)
    with warnings.catch_warnings(record=True) as caught, depth.gates([False] * 4):
        warnings.simplefilter("always", sd.MaskedBranchWarning)
        output, loss = net(x)
    assert ["stores a value that it computes" in str(each.message) for each in caught] == [True]
    # Every branch of the plain network is multiplied by 0: each router sees x itself.
    expected = torch.zeros((), dtype=x.dtype)
    for block in plain.blocks:
        assert isinstance(block, Block)
        shares = block.experts.router(block.norm(x)).softmax(-1)
        expected = expected + (shares.square().mean() if place == "features" else shares.mean(0).square().sum())
    assert_same(output, x)
    assert_same(loss, expected)
    loss.backward()
    expected.backward()
    for mine, its in zip(net.blocks, plain.blocks, strict=True):
        assert isinstance(mine, Block)
        assert isinstance(its, Block)
        gradient = mine.experts.router.weight.grad
        assert gradient is not None
        assert its.experts.router.weight.grad is not None
        assert_same(gradient, its.experts.router.weight.grad)


def test_what_is_left_nowhere_is_skipped() -> None:
    net = Net("nowhere").double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    net(data(4))
    assert [each.split()[2] for each in str(depth).splitlines()[2:6]] == ["skip"] * 4


class Cyclic(nn.Module):
    """Its values are freed by the garbage collector only, and one is held by an autograd.Function's context.

    Its output does not need one of them, which it only looks at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        holder: list[object] = [self.f(x)]
        holder += [holder, self.f(x).abs()]
        y = holder[0]
        assert isinstance(y, Tensor)
        result = Squared.apply(y.tanh())
        assert isinstance(result, Tensor)
        return result


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.x = x  # pyright: ignore[reportAttributeAccessIssue]
        return x.square()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # pyright: ignore
        return 2 * ctx.x * grad  # pyright: ignore


class AroundCyclic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Cyclic()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_what_only_autograd_or_a_cycle_holds_is_not_left_behind() -> None:
    net = nn.Sequential(AroundCyclic()).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    net(data(4)).sum().backward()
    assert "skip" in str(depth)
    assert "mask" not in str(depth)


class Keeps(nn.Module):
    """A child with a state that its calls move on."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.state = linear(), torch.zeros(D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x) + self.state
        self.state = y.detach().mean(0)
        return y.tanh()


class AroundKeeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Keeps()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_child_that_keeps_a_state_is_refused_for_that() -> None:
    net = nn.Sequential(AroundKeeps()).double()
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(RuntimeError, match="its own code gives something else in each run, so it keeps a state"):
        net(data(4))


class Appending(nn.Module):
    """Appends what it computes to a list that it is given, as timm's VoVNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(self.f(x))
        return torch.stack(seen).sum(0)


class AroundAppending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Appending()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, [x.tanh()])


def test_a_list_that_the_block_makes_is_no_place_outside() -> None:
    net = nn.Sequential(AroundAppending()).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    net(data(4))
    assert depth.masked == []
    depth.verify(data(4))
