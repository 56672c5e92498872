"""Values that a block's code reads besides its arguments are read in each call, wherever they are.

The reference is the block's own code, called again after what it reads has changed, in float64.
"""

import copy
import enum
import functools
import random
import sys
import types
import weakref
from collections import ChainMap
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.retrofit.code import code_names


class Settings:
    scale = 1.0
    mask = torch.ones(D, dtype=torch.float64)


class Annealed:
    """Gives a number by methods and properties."""

    def __init__(self) -> None:
        self.step, self.table, self.suffix = 1.0, {"a": [1.0]}, "or"

    def value(self) -> float:
        return self._rate * self.table["a"][0]

    @property
    def _rate(self) -> float:
        return self.step


ANNEALED = Annealed()
TABLES: dict[str, Any] = {
    "wrapper": 1.0,
    "scope": 1.0,
    "mask": torch.ones(D, dtype=torch.float64),
    "deep": {"er": {"scale": 1.0}},
}
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
LATER: float | None = None


def with_attribute(x: Any) -> Any:
    return x * with_attribute.scale  # type: ignore[attr-defined]


with_attribute.scale = 1.0  # type: ignore[attr-defined]


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args) * TABLES["wrapper"]

    return wrapper


@scaled
def one_scaled() -> float:
    return 1.0


class Scope:
    """Is made, entered, compared and turned into a number."""

    def __init__(self) -> None:
        self.scale = TABLES["scope"]

    def __enter__(self) -> float:
        return TABLES["scope"]

    def __exit__(self, *_: object) -> None:
        pass

    def __int__(self) -> int:
        return int(TABLES["scope"])

    def __gt__(self, _: object) -> bool:
        return TABLES["scope"] > 2.0


def entered() -> float:
    with Scope() as scale:
        return scale


class OfClasses(type):
    @property
    def scale(cls) -> float:
        return cls._scale


class WithProperty(metaclass=OfClasses):
    _scale = 1.0


class Items(dict[str, Any]):
    """Has attributes beside its items."""


class Listed(list[Any]):
    """Has attributes beside its items."""


class Kind(enum.Enum):
    A = "a"


ITEMS, LISTED = Items(), Listed()
ITEMS.scale = LISTED.scale = Kind.A.scale = 1.0  # type: ignore[attr-defined]
DEFAULT = {"scale": 1.0}


VIEW, CHAIN = types.MappingProxyType(DEFAULT), ChainMap({}, DEFAULT)
OF_DEFAULT = functools.partial(dict.get, DEFAULT)
DEEP = types.SimpleNamespace(scale=1.0)
for level in "edcba":
    DEEP = types.SimpleNamespace(**{level: DEEP})


def with_default(table: dict[str, float] = DEFAULT, *, named: dict[str, float] = DEFAULT) -> float:
    return (table["scale"] + named["scale"]) / 2


def imported() -> float:
    import far_away

    return far_away.SCALE


far_away = types.ModuleType("far_away")
far_away.SCALE = 1.0  # type: ignore[attr-defined]
sys.modules["far_away"] = far_away
exec(  # a function of the module, with its globals
    "def __getattr__(name):\n    if name in TABLE:\n        return TABLE[name]\n    raise AttributeError(name)",
    elsewhere.__dict__,
)
elsewhere.TABLE = {"LATE": 1.0}  # type: ignore[attr-defined]
del far_away


class Parent(nn.Module):
    """Is held by a block, but not its parent by name."""

    def __init__(self) -> None:
        super().__init__()
        self.state = {"scale": 1.0}

    def scale(self) -> float:
        return self.state["scale"]


class Child(nn.Module):
    """Is read by methods and properties, and never called."""

    def __init__(self) -> None:
        super().__init__()
        self._factor = 1.0

    def project(self, x: Any) -> Any:
        return x * self._factor

    @property
    def factor(self) -> float:
        return self._factor

    def forward(self, x: Tensor) -> Tensor:
        return x


class Far(nn.Module):
    """Reads from one place outside of itself."""

    def __init__(self, read: Callable[["Far"], Any]) -> None:
        super().__init__()
        self.f, self.read = linear(), read
        self.annealed, self.config = Annealed(), {"model": {"block": {"scale": 1.0}}}
        self.other = [nn.Module()]
        self.other[0].register_buffer("mask", torch.ones(D, dtype=torch.float64))
        self.reference = weakref.ref(self.other[0])
        self.child = Child()
        self.parent = [Parent()]
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(()))])

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
    "wrapper of a decorator": (lambda _: one_scaled(), lambda _: TABLES.update(wrapper=3.0)),
    "made object": (lambda _: Scope().scale, lambda _: TABLES.update(scope=3.0)),
    "entered object": (lambda _: entered(), lambda _: TABLES.update(scope=3.0)),
    "object as a number": (lambda _: int(Scope()), lambda _: TABLES.update(scope=3.0)),
    "compared object": (lambda _: 3.0 if Scope() > 2 else 1.0, lambda _: TABLES.update(scope=3.0)),
    "property of a class": (lambda _: WithProperty.scale, lambda _: setattr(WithProperty, "_scale", 3.0)),
    "attribute of a dict": (lambda _: ITEMS.scale, lambda _: setattr(ITEMS, "scale", 3.0)),
    "attribute of a list": (lambda _: LISTED.scale, lambda _: setattr(LISTED, "scale", 3.0)),
    "attribute of an enum": (lambda _: Kind.A.scale, lambda _: setattr(Kind.A, "scale", 3.0)),
    "default": (lambda _: with_default(), lambda _: DEFAULT.update(scale=3.0)),
    "module imported inside": (lambda _: imported(), lambda _: setattr(sys.modules["far_away"], "SCALE", 3.0)),
    "function of a module for names": (lambda _: elsewhere.LATE, lambda _: elsewhere.TABLE.update(LATE=3.0)),
    "method of a held module": (
        lambda block: block.parent[0].scale(),
        lambda block: block.parent[0].state.update(scale=3.0),
    ),
    "growing list of parameters": (
        lambda block: sum(block.gains),
        lambda block: block.gains.append(nn.Parameter(torch.full((), 2.0, dtype=torch.float64))),
    ),
    "function attribute": (lambda _: with_attribute(1.0), lambda _: setattr(with_attribute, "scale", 3.0)),
    "method of a child": (lambda block: block.child.project(1.0), lambda block: setattr(block.child, "_factor", 3.0)),
    "property of a child": (lambda block: block.child.factor, lambda block: setattr(block.child, "_factor", 3.0)),
    "child, by a string": (
        lambda block: getattr(block.child, "_factor", 1.0),
        lambda block: setattr(block.child, "_factor", 3.0),
    ),
    "child, by a computed name": (
        lambda block: getattr(block.child, "_fact" + block.annealed.suffix, 1.0),
        lambda block: setattr(block.child, "_factor", 3.0),
    ),
    "global that is None": (lambda _: LATER or 1.0, lambda _: globals().update(LATER=3.0)),
    "attribute that is not there": (
        lambda block: getattr(block, "extra", Settings).scale,
        lambda block: setattr(block, "extra", types.SimpleNamespace(scale=3.0)),
    ),
    "attribute of an object that is not there": (
        lambda block: getattr(block.annealed, "late", 1.0),
        lambda block: setattr(block.annealed, "late", 3.0),
    ),
    "view of a dict": (lambda _: VIEW["scale"], lambda _: DEFAULT.update(scale=3.0)),
    "chain of dicts": (lambda _: CHAIN["scale"], lambda _: DEFAULT.update(scale=3.0)),
    "item by a partial function": (lambda _: OF_DEFAULT("scale"), lambda _: DEFAULT.update(scale=3.0)),
    "deep in objects": (
        lambda _: DEEP.a.b.c.d.e.scale,
        lambda _: setattr(DEEP.a.b.c.d.e, "scale", 3.0),
    ),
    "choice of attention": (
        lambda _: 1.0 if torch.backends.cuda.flash_sdp_enabled() else 3.0,
        lambda _: torch.backends.cuda.enable_flash_sdp(False),
    ),
    "flag of PyTorch": (
        lambda _: 3.0 if torch.are_deterministic_algorithms_enabled() else 1.0,
        lambda _: torch.use_deterministic_algorithms(True),
    ),
}


@pytest.fixture
def as_before():
    yield
    Settings.scale, Settings.mask = 1.0, torch.ones(D, dtype=torch.float64)
    ANNEALED.__init__()
    TABLES.update(mask=torch.ones(D, dtype=torch.float64), deep={"er": {"scale": 1.0}}, wrapper=1.0, scope=1.0)
    WithProperty._scale = ITEMS.scale = LISTED.scale = Kind.A.scale = DEFAULT["scale"] = 1.0
    sys.modules["far_away"].SCALE = elsewhere.TABLE["LATE"] = 1.0
    BOX["scale"], ARRAY[0], elsewhere.SCALE = 1.0, 1.0, 1.0
    CURRENT.set(1.0)
    with_attribute.scale = 1.0  # type: ignore[attr-defined]
    globals().update(LATER=None)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(True)
    DEEP.a.b.c.d.e.scale = 1.0


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


def test_an_object_that_was_replaced_is_read() -> None:
    net, x = nn.Sequential(Far(lambda block: block.annealed.step)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with depth.gates([True]):
        net(x)
        net[0].annealed = Annealed()
        assert_same(net(x), x + net[0].f(x))
        for step in (2.0, 3.0, 4.0):
            net[0].annealed.step = step
            assert_same(net(x), x + step * net[0].f(x))


class Given(nn.Module):
    """Uses what it is given beside a tensor."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.f, self.use = linear(), use

    def forward(self, x: Tensor, given: Any) -> Tensor:
        return x + self.use(self.f(x), given)


class GivenNet(nn.Module):
    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.block = Given(use)

    def forward(self, x: Tensor, given: Any) -> Tensor:
        return self.block(x, given)


class Scaling:
    scale = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale

    def method(self, x: Tensor) -> Tensor:
        return self(x)


def nested(depth: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(inner=nested(depth - 1)) if depth else types.SimpleNamespace(scale=1.0)


def scaled_by_box() -> tuple[Any, Callable[[], None]]:
    scaled, box = make_scaled()
    return scaled, lambda: box.update(scale=3.0)


def given_object(kind: str) -> tuple[Any, Callable[[], None]]:
    scaling = Scaling()
    given = scaling if kind == "callable" else scaling.method
    return given, lambda: setattr(scaling, "scale", 3.0)


def given_module() -> tuple[nn.Module, Callable[[], None]]:
    child = Child()
    return child, lambda: setattr(child, "_factor", 3.0)


def given_namespace() -> tuple[Any, Callable[[], None]]:
    outer = nested(4)
    return outer, lambda: setattr(outer.inner.inner.inner.inner, "scale", 3.0)


@pytest.mark.parametrize(
    ("given", "use"),
    [
        (scaled_by_box, lambda x, given: given(x)),
        (lambda: given_object("callable"), lambda x, given: given(x)),
        (lambda: given_object("method"), lambda x, given: given(x)),
        (given_module, lambda x, given: given.project(x)),
        (given_namespace, lambda x, given: x * given.inner.inner.inner.inner.scale),
    ],
    ids=["closure", "callable", "method", "module", "namespace"],
)
def test_what_an_argument_reads_may_change(given: Callable[[], Any], use: Callable[[Tensor, Any], Tensor]) -> None:
    net, x = GivenNet(use).double(), data(4)
    argument, change = given()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with depth.gates([True]):
        assert_same(net(x, argument), x + net.block.f(x))
        assert_same(net(x, argument), x + net.block.f(x))
        change()
        assert_same(net(x, argument), x + 3 * net.block.f(x))


class Attending(nn.Module):
    """Does something else with its own input than with another."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.f(x) * (1 if context is x else 2)


class AttendingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Attending()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.block(x, context)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_which_arguments_are_one_tensor_decides(granularity: str) -> None:
    net, x = AttendingNet().double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    with depth.gates([True]):
        for context, factor in ((x, 1), (x.clone(), 2), (x, 1)):
            assert_same(net(x, context), x + factor * net.block.f(x))


def test_what_somebody_set_on_a_tensor_is_read() -> None:
    net, x = GivenNet(lambda y, given: y * getattr(given, "scale", 1.0)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    with depth.gates([True]):
        for scale in (1.0, 3.0, 2.0):
            given = data(4, seed=1)
            given.scale = scale  # type: ignore[attr-defined]
            assert_same(net(x, given), x + scale * net.block.f(x))
        assert_same(net(x, data(4, seed=1)), x + net.block.f(x))


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
    with pytest.raises(ValueError, match=r"reads where a tensor is stored \(storage_offset\)"):
        sd.make_stochastic_(net, sd.uniform(0.5), inputs=[data(4)])


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


class Switched(nn.Module):
    """Adds its adapter only while that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.a = linear(), nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + (y + x @ self.a if self.a.requires_grad else y)


class AnySwitched(Switched):
    """Asks all parameters."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + (2 * y if all(parameter.requires_grad for parameter in self.parameters()) else y)


class WithTable(nn.Module):
    """Uses as many positions as its table has."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()
        self.register_buffer("positions", torch.randn(2, D))

    def forward(self, x: Tensor) -> Tensor:
        num = min(len(x), self.positions.shape[0])
        return x + self.f(torch.cat([x[:num] * self.positions[:num], x[num:]]))


class Typed(nn.Module):
    """Asks for the type of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if self.w.dtype == torch.float32 else 1.0
        return x + (x.to(self.w.dtype) @ self.w).to(x.dtype) * scale


def replace_table(block: Any) -> None:
    block.positions = torch.ones(4, D).double() / 10


def make_single(block: Any) -> None:
    block.w.data = block.w.data.float()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Switched, lambda block: block.a.requires_grad_(False)),
        (AnySwitched, lambda block: block.f.bias.requires_grad_(False)),
        (WithTable, replace_table),
        (Typed, make_single),
    ],
)
def test_own_parameters_and_buffers_are_read_anew(kind: type[nn.Module], change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(kind()).double()
    plain, x = copy.deepcopy(net), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x])
    with depth.gates([True] * len(depth)):
        for _ in range(2):
            assert_same(net(x), plain(x))
        change(net[0])
        change(plain[0])
        for _ in range(2):
            assert_same(net(x), plain(x))


class ByHelpers(nn.Module):
    """Reads a number two methods away, as property of an object and as attribute of a child."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.f, self.how, self.annealed, self.child = linear(), how, Annealed(), ScalingChild()

    def forward(self, x: Tensor) -> Tensor:
        return x + self._inner(x)

    def _inner(self, x: Tensor) -> Tensor:
        return self.f(x) * self._scale()

    def _scale(self) -> Any:
        if self.how == "object":
            return self.annealed.value()
        return self.child.temperature if self.how == "child" else self.child.outer()


class ScalingChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def outer(self) -> float:
        return self.inner()

    def inner(self) -> float:
        return self.temperature


@pytest.mark.parametrize("how", ["object", "child", "method"])
def test_helpers_of_helpers_are_followed(how: str) -> None:
    net = nn.Sequential(ByHelpers(how)).double()
    plain, x = copy.deepcopy(net), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True]):
        for number in (1.0, 1.0, 3.0, 3.0):
            for each in (net[0], plain[0]):
                each.annealed.step = each.child.temperature = number
            assert_same(net(x), plain(x))


class AttributeDict(dict[str, Any]):
    """A dictionary with attributes, which raises a KeyError for those that it has not."""

    __getattr__ = dict.__getitem__  # type: ignore[assignment]


class Configured(nn.Module):
    defaults = AttributeDict(scale=1.0)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.config = linear(), AttributeDict(scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.config.scale * self.defaults.scale


@pytest.mark.parametrize("by_example", [False, True])
def test_dictionaries_with_attributes(*, by_example: bool) -> None:
    net = nn.Sequential(Configured()).double()
    x = data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    for scale in (1.0, 2.0):
        net[0].config["scale"] = scale
        with depth.gates([True]):
            assert_same(net(x), x + net[0].f(x) * scale)


class FunctionalNorm(nn.Module):
    """Normalizes by a function, in the mode of its BatchNorm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.f, self.bn, self.how = linear(), nn.BatchNorm1d(D), how

    def forward(self, x: Tensor) -> Tensor:
        bn, y = self.bn, self.f(x)
        if self.how == "asks":
            return x + (bn(y) if bn.training else bn(y) + 1)
        mean, var = bn.running_mean, bn.running_var
        return x + nn.functional.batch_norm(y, mean, var, bn.weight * 2, bn.bias, bn.training)


@pytest.mark.parametrize("how", ["asks", "function"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_code_that_asks_for_the_mode_of_a_batch_norm_sees_it(how: str, granularity: Any) -> None:
    net = nn.Sequential(FunctionalNorm(how)).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, inputs=[data(8)])
    gate = torch.ones(8, dtype=torch.bool) if granularity == "sample" else True
    for frozen in (False, False, True):
        for each in (net, plain):
            each[0].bn.train(not frozen)
        for seed in range(2):
            x = data(8, seed=seed)
            with depth.gates([gate]):
                assert_same(net(x), plain(x))
    for buffer, own in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, own)


class EqualRate:
    """Computes a layer's weight before each call, as StyleGAN does."""

    name = "weight"

    def __call__(self, module: nn.Module, _args: Any) -> None:
        module.weight = module.weight_orig * 0.5


def test_a_hook_that_makes_a_weight_is_part_of_its_layer() -> None:
    block = ByHelpers("child").double()
    weight = block.f.weight
    del block.f._parameters["weight"]
    block.f.register_parameter("weight_orig", nn.Parameter(weight.data))
    block.f.register_forward_pre_hook(EqualRate())
    net, x = nn.Sequential(block), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True]):
        assert_same(net(x), x + x @ (weight.T * 0.5) + block.f.bias)


def test_the_nearest_functions_count_if_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_names, "_MAX_FUNCTIONS", 3)
    _, functions = code_names.names_in_code(FarAway)
    assert [function.__name__ for function in functions] == ["forward", "near", "far"]


class FarAway(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.near(x)

    def near(self, x: Tensor) -> Tensor:
        return self.far(x) + self.other(x)

    def far(self, x: Tensor) -> Tensor:
        return x

    def other(self, x: Tensor) -> Tensor:
        return x


class Factor(nn.Module):
    """Gives a number that a callback sets."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 1.0

    def forward(self) -> float:
        return self.value


class WithFactor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.factor = linear(), Factor()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor() * self.f(x)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_number_that_a_child_gives_is_followed_at_once(granularity: Any) -> None:
    net, x = nn.Sequential(WithFactor()).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
    for value in (1.0, 1.0, 3.0, 3.0, 1.0, 2.0):
        net[0].factor.value = value
        with depth.gates([True]):
            assert_same(net(x), x + value * net[0].f(x))


class GainSchedule(nn.Module):
    """Gives the gain of an epoch, which a trainer sets."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def forward(self) -> float:
        return (1 + self.epoch) / 4


class FeaturesAndGain(nn.Module):
    """Gives features and their gain."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.epoch = linear(), 0

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.f(x), (1 + self.epoch) / 4


class ToldGain(nn.Module):
    """A block whose gain a child tells."""

    def __init__(self, *, with_features: bool) -> None:
        super().__init__()
        self.f, self.child = linear(), FeaturesAndGain() if with_features else GainSchedule()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.child, FeaturesAndGain):
            h, gain = self.child(torch.tanh(self.f(x)))
            return x + gain * h
        return x + torch.tanh(self.f(x)) * self.child()


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("with_features", [False, True])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_number_that_a_child_tells_is_that_of_now_in_equal_blocks(
    granularity: Any, *, with_features: bool, by_example: bool
) -> None:
    plain = nn.Sequential(*(ToldGain(with_features=with_features) for _ in range(3))).double()
    net = copy.deepcopy(plain)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, inputs=[data(4)] if by_example else None)
    for step in range(8):
        for module in (*plain.modules(), *net.modules()):
            if hasattr(module, "epoch"):
                module.epoch = step // 3
        with depth.gates([True] * 3):
            assert_same(net(data(4)), plain(data(4)))
    depth.verify(data(4))


class Flagged(nn.Module):
    """Gives more, or something else, if a flag is set."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind, self.more = linear(), kind, False

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.f(x))
        if self.kind == "tuple":
            return (h, h.mean()) if self.more else h
        if self.kind == "dict":
            return {"h": h, "gate": h.sigmoid()} if self.more else {"h": h}
        if self.kind == "list":
            return [h, h * 2] if self.more else [h]
        if self.kind == "none":
            return h, (h.sigmoid() if self.more else None)
        return h.float() if self.more else h


class Asking(nn.Module):
    """Asks what its child has given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.child = Flagged(kind)

    def forward(self, x: Tensor) -> Tensor:
        given = self.child(x)
        if self.child.kind == "tuple":
            return x + (2 * given[0] if isinstance(given, tuple) else given)
        if self.child.kind == "dict":
            return x + (given["h"] * given["gate"] if "gate" in given else given["h"])
        if self.child.kind == "list":
            return x + sum(given)
        if self.child.kind == "none":
            return x + (given[0] if given[1] is None else given[0] * given[1])
        return x + (given if given.dtype is torch.float64 else 2 * given.double())


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "list", "none", "dtype"])
def test_what_a_child_gives_may_change_with_its_flags(kind: str, granularity: Any) -> None:
    plain = nn.Sequential(Asking(kind), Asking(kind)).double()
    net = copy.deepcopy(plain)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, inputs=[data(4)])
    for step in range(8):
        for block in (*plain, *net):
            block.child.more = step in (2, 4, 5, 6)
        with depth.gates([True, True]):
            assert_same(net(data(4)), plain(data(4)))


class AskingWhatItIsGiven(nn.Module):
    """Treats parameters and sizes in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor, given: Any) -> Tensor:
        gain = 2.0 if isinstance(given, nn.Parameter) else 1 / given.numel() if isinstance(given, torch.Size) else 1.0
        return x + gain * torch.tanh(self.f(x))


class Giving(nn.Module):
    """Gives its blocks a parameter, a tensor of the same form, or a size."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.prompt = AskingWhatItIsGiven(), nn.Parameter(torch.ones(4, D))

    def forward(self, x: Tensor, kind: str) -> Tensor:
        return self.block(x, {"parameter": self.prompt, "tensor": self.prompt + 0.0, "size": x.shape}[kind])


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("by_example", [False, True])
def test_arguments_keep_their_types(granularity: Any, *, by_example: bool) -> None:
    plain = Giving().double()
    net, x = copy.deepcopy(plain), data(4)
    inputs = [x, "size"] if by_example else None
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, inputs=inputs)
    with depth.gates([True]):
        for kind in ("size", "parameter", "tensor", "parameter"):
            assert_same(net(x, kind), plain(x, kind))
    depth.verify(x, "parameter")


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor, generator: random.Random) -> Tensor:
        return x + self.f(x) * generator.random()


def test_a_generator_that_a_block_is_given_is_refused() -> None:
    net = Drawing()
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(RuntimeError, match="draws random numbers itself"):
        net(data(4).float(), random.Random(0))


class WithGradients(nn.Module):
    """Turns gradients on, where they are on anyway."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = linear(), kind

    @torch.enable_grad()
    def branch(self, x: Tensor) -> Tensor:
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "decorator":
            return x + self.branch(x)
        with torch.enable_grad() if self.kind == "context" else torch.set_grad_enabled(self.training):
            h = self.f(x)
        return x + h


@pytest.mark.parametrize("kind", ["decorator", "context", "mode"])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_block_may_turn_gradients_on(kind: str, *, by_example: bool) -> None:
    net, x = nn.Sequential(WithGradients(kind)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x] if by_example else None)
    with depth.gates([True]):
        assert_same(net(x), x + net[0].f(x))
    with depth.gates([False]):
        assert_same(net(x), x)
