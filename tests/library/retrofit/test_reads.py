"""What a block's code reads beside its arguments: from anywhere, it is what is there in each call.

The reference is the block's own code, called again after what it reads has changed, in float64.
"""

import copy
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

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
        return x + self.drop_path(self.f(x)) * globals()["SC" + "ALE"]


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


def test_a_call_that_stays_what_it_was_is_looked_at_now_and_then() -> None:
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
def test_what_code_leaves_far_away_is_no_silent_matter(write: Callable[[], Any], what: str) -> None:
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
