"""Values that a block's code reads besides its arguments are read in each call, wherever they are.

The reference is the block's own code, called again after what it reads has changed, in float64.
"""

import copy
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd


class Settings:
    scale = 1.0
    mask = torch.ones(D, dtype=torch.float64)


class Annealed:
    """Gives a number by methods and properties."""

    def __init__(self) -> None:
        self.step, self.table = 1.0, {"a": [1.0]}

    def value(self) -> float:
        return self._rate * self.table["a"][0]

    @property
    def _rate(self) -> float:
        return self.step


ANNEALED = Annealed()
TABLES: dict[str, Any] = {"mask": torch.ones(D, dtype=torch.float64), "deep": {"er": {"scale": 1.0}}}
CURRENT: ContextVar[float] = ContextVar("CURRENT", default=1.0)
ARRAY = np.ones(1)
elsewhere = types.ModuleType("elsewhere")
elsewhere.SCALE = 1.0  # type: ignore[attr-defined]


def scale_of(annealed: Annealed) -> float:
    return annealed.value()


def make_scaled() -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
    box = {"scale": 1.0}
    return lambda x: x * box["scale"], box


SCALED, BOX = make_scaled()


class Far(nn.Module):
    """Reads from one place outside of itself."""

    def __init__(self, read: Callable[["Far"], Any]) -> None:
        super().__init__()
        self.f, self.read = linear(), read
        self.annealed, self.config = Annealed(), {"model": {"block": {"scale": 1.0}}}
        self.other = [nn.Module()]
        self.other[0].register_buffer("mask", torch.ones(D, dtype=torch.float64))
        self.reference = weakref.ref(self.other[0])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.read(self)


PLACES: dict[str, tuple[Callable[[Far], Any], Callable[[Far], Any]]] = {
    "class": (lambda _: Settings.scale, lambda _: setattr(Settings, "scale", 3.0)),
    "tensor of a class": (lambda _: Settings.mask, lambda _: setattr(Settings, "mask", 3 * torch.ones(D).double())),
    "global object": (lambda _: ANNEALED.value(), lambda _: setattr(ANNEALED, "step", 3.0)),
    "helper": (lambda _: scale_of(ANNEALED), lambda _: ANNEALED.table["a"].__setitem__(0, 3.0)),
    "global tensor": (lambda _: TABLES["mask"], lambda _: TABLES.update(mask=3 * torch.ones(D).double())),
    "deep in a dict": (lambda _: TABLES["deep"]["er"]["scale"], lambda _: TABLES["deep"]["er"].update(scale=3.0)),
    "closure": (lambda _: SCALED(1.0), lambda _: BOX.update(scale=3.0)),
    "context": (lambda _: CURRENT.get(), lambda _: CURRENT.set(3.0)),
    "array": (lambda _: float(ARRAY[0]), lambda _: ARRAY.__setitem__(0, 3.0)),
    "module": (lambda _: elsewhere.SCALE, lambda _: setattr(elsewhere, "SCALE", 3.0)),
    "own object": (lambda block: block.annealed.value(), lambda block: setattr(block.annealed, "step", 3.0)),
    "own dict": (
        lambda block: block.config["model"]["block"]["scale"],
        lambda block: block.config["model"]["block"].update(scale=3.0),
    ),
    "buffer of another module": (
        lambda block: block.other[0].mask,
        lambda block: setattr(block.other[0], "mask", 3 * torch.ones(D).double()),
    ),
    "weak reference": (
        lambda block: block.reference().mask,
        lambda block: setattr(block.other[0], "mask", 3 * torch.ones(D).double()),
    ),
}


@pytest.fixture
def as_before():
    yield
    Settings.scale, Settings.mask = 1.0, torch.ones(D, dtype=torch.float64)
    ANNEALED.__init__()
    TABLES.update(mask=torch.ones(D, dtype=torch.float64), deep={"er": {"scale": 1.0}})
    BOX["scale"], ARRAY[0], elsewhere.SCALE = 1.0, 1.0, 1.0
    CURRENT.set(1.0)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_from_far_away_may_change(place: str) -> None:
    read, change = PLACES[place]
    net, x = nn.Sequential(Far(read)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with depth.gates([True]):
        assert_same(net(x), x + net[0].f(x))
        change(net[0])
        assert_same(net(x), x + 3 * net[0].f(x))
        assert_same(net(x), x + 3 * net[0].f(x))


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("place", ["global tensor", "tensor of a class", "buffer of another module"])
def test_a_tensor_that_is_another_in_every_call_makes_no_new_form(place: str) -> None:
    read, change = PLACES[place]
    net, x = nn.Sequential(Far(read)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with depth.gates([True]):
        net(x)
        known = net[0]._stochastic_depth_branch.forms
        forms = len(known.prepared)
        for _ in range(3):
            change(net[0])
            net(x)
    assert len(known.prepared) == forms


class Hidden(nn.Module):
    """Reads by a name that no code shows."""

    def __init__(self, *, drop_path: bool) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(0.5) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x)) * globals()["".join(["SC", "ALE"])]


SCALE = 1.0


def test_what_cannot_be_seen_is_noticed_when_the_code_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(Hidden(drop_path=False)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True]):
        net(x)
        net(x)
        monkeypatch.setitem(globals(), "SCALE", 3.0)
        net(x)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="does something else than in an earlier call"):
                net(x)


def test_a_drop_path_is_masked_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(Hidden(drop_path=True), Hidden(drop_path=True)).double(), data(4)
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, rescale="none")
    gates = [torch.tensor([True, False, True, True]), torch.tensor([True, True, False, True])]
    with depth.gates(gates):
        net(x)
        assert depth.masked == []
        monkeypatch.setitem(globals(), "SCALE", 3.0)
        with pytest.warns(sd.MaskedBranchWarning, match="does something else than in an earlier call"):
            output = net(x)
    expected = x
    for block, gate in zip(plain, gates, strict=True):
        expected = expected + 3 * block.f(expected) * gate[:, None]
    assert_same(output, expected)
    assert [name for name, _ in depth.masked] == ["0.drop_path", "1.drop_path"]


def test_repeated_calls_are_recorded_again_now_and_then() -> None:
    net, x = nn.Sequential(Far(lambda _: 1.0), Far(lambda _: 1.0)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    known = net[0]._stochastic_depth_branch.forms
    runs = []
    for _ in range(17):
        net(x)
        runs.append(known.num_runs)
    changes = [index + 1 for index in range(1, 17) if runs[index] != runs[index - 1]]
    assert changes == [2, 4, 8, 16]
    assert depth.masked == []


class Writes(nn.Module):
    """Leaves something in one place outside of itself."""

    def __init__(self, write: Callable[[], Any]) -> None:
        super().__init__()
        self.f, self.write = linear(), write

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return x + self.f(x)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda: setattr(Settings, "scale", Settings.scale + 1), "scale of Settings"),
        (lambda: BOX.update(scale=BOX["scale"] + 1), "the global variable BOX"),
        (lambda: setattr(ANNEALED, "step", ANNEALED.step + 1), "step of Annealed"),
        (lambda: CURRENT.set(CURRENT.get() + 1), "the context variable CURRENT"),
    ],
    ids=["class", "dict", "object", "context"],
)
def test_side_effects_far_away_are_noticed(write: Callable[[], Any], what: str) -> None:
    net = nn.Sequential(Writes(write)).double()
    with pytest.raises(ValueError, match=f"changes {what}"):
        sd.make_stochastic_(net, sd.uniform(0.5))
    assert (Settings.scale, BOX["scale"], ANNEALED.step, CURRENT.get()) == (1.0, 1.0, 1.0, 1.0)


def test_layers_that_are_added_and_removed_are_followed() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([linear(), linear()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    net, x = Many().double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    net(x)
    net.layers.append(linear().double())
    with depth.gates([True, False]):
        expected = x + net.layers[0](x)
        assert_same(net(x), expected + net.layers[2](expected))
    del net.layers[1:]
    with depth.gates([True, False]):
        assert_same(net(x), expected)


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "randn": torch.randn_like,
    "normal_": lambda x: x.new_empty(x.shape).normal_(1.0, 0.1),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "exponential_": lambda x: -torch.empty_like(x).exponential_().log(),
    "randint": lambda x: torch.randint(1, 3, x.shape),
    "random_": lambda x: torch.empty_like(x).random_(3),
}


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.draw = linear(), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) * self.draw(x)


class AroundNoise(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.noisy = Noisy(draw)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.noisy(x)


@pytest.mark.parametrize("name", NOISE)
def test_a_child_may_draw_random_numbers(name: str) -> None:
    net, x = nn.Sequential(AroundNoise(NOISE[name])).double(), data(6)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", granularity="sample")
    gate = torch.tensor([True, False, True, True, False, True])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with depth.gates([gate]):
        net(x)
        torch.set_rng_state(state)
        output = net(x)
    expected = x.clone()
    torch.set_rng_state(state)
    expected[gate] = x[gate] + net[0].noisy(x[gate])
    assert_same(output, expected)
    assert depth.masked == []


class Grouped(nn.Module):
    """Takes the mean of each sample's group away, as a batch of graphs does."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(0.5)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        sums = torch.zeros(10, D, dtype=x.dtype).index_add(0, group, x)
        counts = torch.zeros(10, dtype=x.dtype).index_add(0, group, torch.ones(len(x), dtype=x.dtype)).clamp_min(1)
        return x + self.drop_path(self.f(x - (sums / counts[:, None])[group]))


class GroupedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Grouped()

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return self.block(x, group)


def test_mixing_of_later_samples_is_detected() -> None:
    net, x, group = GroupedNet().double(), data(8), torch.tensor([3, 1, 4, 0, 3, 1, 4, 0])
    plain = copy.deepcopy(net.block)
    plain.drop_path = nn.Identity()
    depth = sd.make_stochastic_(net, rescale="none")
    gate = torch.tensor([True, False, True, True, False, True, False, True])
    with depth.gates([gate]), pytest.warns(sd.MaskedBranchWarning, match="not one of independent samples"):
        output = net(x, group)
    assert_same(output, x + (plain(x, group) - x) * gate[:, None])


class Pair(NamedTuple):
    x: Tensor
    others: list[Tensor]


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(0.5)

    def forward(self, pair: Pair) -> Pair:
        return pair._replace(x=pair.x + self.drop_path(self.f(pair.x + pair.others[0])))


class PairsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = OfPairs()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(Pair(x, [x.flip(1)])).x


def test_a_named_tuple_is_an_argument_like_others() -> None:
    net, x = PairsNet().double(), data(6)
    depth = sd.make_stochastic_(net, rescale="none")
    gate = torch.tensor([True, False, True, True, False, True])
    with depth.gates([gate]):
        assert_same(net(x), x + net.block.f(x + x.flip(1)) * gate[:, None])
    assert depth.masked == []


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(torch.as_strided(x, x.shape, x.stride(), x.storage_offset()))


def test_code_that_asks_where_a_tensor_is_stored_is_refused() -> None:
    net = nn.Sequential(Strided()).double()
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(RuntimeError, match=r"reads where a tensor is stored \(storage_offset\)"):
        net(data(4))


class CalledDropPath(DropPath):
    def forward(self, x: Tensor, rate: float | None = None) -> Tensor:
        return super().forward(x) if rate is None else x * (torch.rand(len(x), 1) >= rate) / (1 - rate)


class GivesARate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), CalledDropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x), 0.9)


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_a_rate_that_a_drop_path_is_called_with_is_refused() -> None:
    net = nn.Sequential(GivesARate()).double()
    sd.make_stochastic_(net)
    with pytest.raises(RuntimeError, match="called with a number, which would be its rate"):
        net(data(4))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_the_first_call_may_be_inside_of_a_transform(transform: str) -> None:
    net, x = nn.Sequential(Far(lambda _: 1.0), Far(lambda _: 2.0)).double(), data(4)
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")

    def transformed(model: nn.Module) -> Tensor:
        if transform == "vmap":
            return torch.func.vmap(model)(x)
        weight = {"0.f.weight": model[0].f.weight.detach()}
        loss = torch.func.grad(lambda weight: torch.func.functional_call(model, weight, (x,)).sum())
        return loss(weight)["0.f.weight"]

    with depth.gates([True, True]):
        assert_same(transformed(net), transformed(plain))
