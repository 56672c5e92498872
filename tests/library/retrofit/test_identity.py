"""Code that asks which object or module it has before it, or catches all errors: a stand-in must not change that."""

import contextlib
import copy
import gc
import inspect
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from plain_blocks import DropPath, assert_same, data, linear
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import stochastic_depth as sd
from stochastic_depth.retrofit.code.itself import asks_for_itself


class Block(nn.Module):
    """A residual block whose factor is `factor(block, x)`."""

    def __init__(self, factor: Callable[["Block", Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.f, self.g, self.factor, self.drop_path = linear(), linear(), factor, DropPath()
        for name, value in attributes.items():
            setattr(self, name, value)

    def branch(self, x: Tensor) -> Tensor:
        return self.g(torch.tanh(self.f(x))) * self.factor(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


def same_with_open_gates(blocks: list[nn.Module], num_calls: int = 5, **options: Any) -> sd.Controller:
    """Compare a model of such blocks with a copy of it in several calls; the controller."""
    net = nn.Sequential(*blocks).double()
    plain = [(each, copy.deepcopy(each.state_dict())) for each in net]
    depth = sd.make_stochastic_(net, rescale="none", **options)
    for call in range(num_calls):
        x = expected = data(4, seed=call)
        with depth.gates([True] * len(depth)):
            actual = net(x)
        for block, weights in plain:
            assert_same(block.state_dict()["f.weight"], weights["f.weight"])
            expected = expected + block.branch(expected)
        assert_same(actual, expected)
    return depth


def guarded(_block: Block, x: Tensor) -> Any:
    try:
        return 2.0 if torch.isnan(x).any() else 1.0
    except Exception:
        return 0.1


def suppressed(_block: Block, x: Tensor) -> Any:
    factor = 0.1
    with contextlib.suppress(Exception):
        factor = float(x.abs().mean())
    return factor


def bare(_block: Block, x: Tensor) -> Any:
    try:
        return x.abs().amax().item()
    except:  # noqa: E722
        return 0.1


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
@pytest.mark.parametrize("factor", [guarded, suppressed, bare])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_code_that_catches_every_exception_hides_no_refusal(factor: Callable[..., Any], granularity: str) -> None:
    depth = same_with_open_gates([Block(factor)], granularity=granularity)
    assert len(depth.masked) == 1
    assert "depends on the values of a tensor" in str(depth)


class Missing:
    pass


class Kind:
    def __init__(self, name: str) -> None:
        self.name = name


class WithParent:
    """Two objects that know each other."""

    def __init__(self) -> None:
        self.child = Kind("child")
        self.child.parent = self  # pyright: ignore[reportAttributeAccessIssue]


MISSING, PRE, POST, PARENT = Missing(), Kind("pre"), Kind("post"), WithParent()
FACTORS = {PRE: 2.0, POST: 3.0}


@pytest.mark.parametrize(
    ("factor", "value"),
    [
        (lambda block, _x: 0.1 if block.value is MISSING else 1.0, MISSING),
        (lambda block, _x: 2.0 if block.value == PRE else 1.0, PRE),
        (lambda block, _x: FACTORS.get(block.value, 1.0), POST),
        (lambda block, _x: 2.0 if block.value[0] in (PRE, POST) else 1.0, [PRE]),
        (lambda block, _x: 2.0 if block.value["kind"] is POST else 1.0, {"kind": POST}),
        (lambda block, _x: 2.0 if block.value.child.name == "child" else 1.0, PARENT),
    ],
)
@pytest.mark.parametrize("by_example", [False, True])
def test_a_sentinel_is_itself(factor: Callable[..., Any], value: Any, *, by_example: bool) -> None:
    depth = same_with_open_gates([Block(factor, value=value)], inputs=[data(4)] if by_example else None)
    assert depth.masked == []
    depth.verify(data(4))


class Counting(nn.Module):
    """Counts its calls in an object that is not copied."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.state = linear(), Kind("")
        self.state.count = 0  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        self.state.count += 1  # pyright: ignore[reportAttributeAccessIssue]
        return self.f(x)


def test_what_a_child_changes_in_such_an_object_is_put_back() -> None:
    block = Block(lambda _block, _x: 1.0)
    block.f = Counting()  # pyright: ignore[reportAttributeAccessIssue]
    net = nn.Sequential(block).double()
    depth = sd.make_stochastic_(net, inputs=[data(4)])
    for _ in range(4):
        with depth.gates([True]):
            net(data(4))
    depth.verify(data(4))
    assert block.f.state.count == 4  # pyright: ignore[reportAttributeAccessIssue]


class Closing:
    """Closes its file at its end."""

    def __init__(self) -> None:
        self.file = io.StringIO()

    def __del__(self) -> None:
        self.file.close()


class Only:
    """Has one instance."""

    instance: "Only | None" = None
    log: list[int]

    def __new__(cls) -> "Only":
        if cls.instance is None:
            cls.instance = super().__new__(cls)
            cls.instance.log = LOG
        return cls.instance


LOG = [1]


def test_objects_on_modules_stay_as_they_are(tmp_path: Path) -> None:
    block = Block(lambda _block, _x: 1.0, closing=Closing(), only=Only(), file=(tmp_path / "log").open("w"))
    depth = same_with_open_gates([block], inputs=[data(4)])
    depth.verify(data(4))
    gc.collect()
    assert not block.closing.file.closed  # pyright: ignore[reportAttributeAccessIssue]
    assert not block.file.closed  # pyright: ignore[reportAttributeAccessIssue]
    assert block.only.log is LOG  # pyright: ignore[reportAttributeAccessIssue]
    block.file.close()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


class OwnParameter(nn.Parameter):
    pass


@pytest.mark.parametrize("what", ["attribute", "class"])
@pytest.mark.parametrize("by_example", [False, True])
def test_parameters_keep_attributes_and_class(what: str, *, by_example: bool) -> None:
    def factor(block: Block, _x: Tensor) -> float:
        return getattr(block.f.weight, "scale", 1.0) + isinstance(block.f.weight, OwnParameter)

    blocks: list[nn.Module] = [Block(factor) for _ in range(3)]
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        block.double()
        if what == "attribute":
            block.f.weight.scale = index + 2.0  # pyright: ignore[reportAttributeAccessIssue]
        elif index == 1:
            block.f.weight = OwnParameter(block.f.weight.data)
    depth = same_with_open_gates(blocks, inputs=[data(4)] if by_example else None)
    assert depth.masked == []


def asking(line: str) -> nn.Module:
    """A module with this line in its forward."""
    names: dict[str, Any] = {"TABLE": {}, "nn": nn}
    exec(f"def forward(self, x, model=None, cache=None):\n    {line}", names)

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.heads, self.blocks = linear(), nn.ModuleDict(), nn.ModuleList()

        forward: FunctionType = names["forward"]

    return Asking()


@pytest.mark.parametrize(
    "line",
    [
        "return 1 if self is model.layers[-1] else 0",
        "return model.layers[-1] is self",
        "return self == model.layers[0]",
        "return TABLE[self]",
        "return TABLE.get(self, 1)",
        "return self in TABLE",
        "return TABLE[self.f]",
        "return self.f not in cache",
        "return TABLE.get(self.f)",
        "return any(each is self for each in model.layers)",
        "return model.layers.index(self)",
        "return TABLE[id(self)]",
    ],
)
def test_code_that_asks_which_module_it_runs_on(line: str) -> None:
    assert asks_for_itself(asking(line), frozenset())


@pytest.mark.parametrize(
    "line",
    [
        "return x + self.f(x)",
        "return self.f is not None",
        "return None is self.f",
        "return any(each is self.f for each in self.blocks)",
        "return [each for each in self.modules() if each is not self]",
        "return helper(self, x)",
        "return self.blocks[0](x)",
        "return self[0](x)",
        "return 'a' in self.heads",
        "return self.heads.get('a')",
        "return isinstance(self, nn.Module)",
        "return getattr(self, 'f')(x)",
        "return x is None",
        "return x.size(0) == self.number",
        "return x + self.f(x) if self.k is model else x",
        "return x[self.number]",
        "return (self, x)",
        "return dict(a=self.f)",
    ],
)
def test_code_that_only_uses_its_module(line: str) -> None:
    assert not asks_for_itself(asking(line), frozenset())


SCALES: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


class Registered(Block):
    def branch(self, x: Tensor) -> Tensor:
        return self.f(x) * SCALES.get(self, 1.0)


class OfOwnTable(Block):
    """Has a table of its own, by its children."""

    def branch(self, x: Tensor) -> Tensor:
        for layer in (self.f, self.g):
            x = self.table.get(layer, torch.relu)(layer(x))  # pyright: ignore
        return x


def test_a_registry_of_modules_is_asked_for_the_module_itself() -> None:
    blocks: list[nn.Module] = [Registered(lambda _block, _x: 1.0) for _ in range(2)]
    SCALES.update({block: 2.0 + index for index, block in enumerate(blocks)})
    with pytest.warns(sd.MaskedBranchWarning, match="asks which module it runs on"):
        depth = same_with_open_gates(blocks)
    assert len(depth.masked) == 2


def test_a_table_of_the_block_by_its_children_is_the_stand_ins() -> None:
    block = OfOwnTable(lambda _block, _x: 1.0)
    block.table = {block.f: torch.tanh}
    assert same_with_open_gates([block]).masked == []


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_parametrizations_may_be_cached_around_the_model(granularity: str) -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        blocks = [Block(lambda _block, _x: 1.0).double() for _ in range(2)]
        for block in blocks:
            block.f, block.g = weight_norm(block.f), weight_norm(block.g)
        return nn.Sequential(*blocks)

    net, plain = made(), made()
    depth = sd.make_stochastic_(net, granularity=granularity, rescale="none")
    for call in range(5):
        x = expected = data(4, seed=call)
        with parametrize.cached(), depth.gates([True, True]):
            actual = net(x)
        for block in plain:
            assert isinstance(block, Block)
            expected = expected + block.branch(expected)
        assert_same(actual, expected)
        actual.sum().backward()


def test_a_stochastic_block_has_the_signature_of_its_own_forward() -> None:
    class Conditioned(Block):
        def forward(self, x: Tensor, condition: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            return x + self.drop_path(self.f(x) if condition is None else self.f(x) * condition) * scale

    net = nn.Sequential(Conditioned(lambda _block, _x: 1.0))
    before = inspect.signature(net[0].forward), inspect.signature(net.forward)
    sd.make_stochastic_(net)
    assert (inspect.signature(net[0].forward), inspect.signature(net.forward)) == before
    assert inspect.getfullargspec(net[0].forward).args == ["self", "x", "condition"]
    alone = Conditioned(lambda _block, _x: 1.0)
    sd.make_stochastic_(alone)
    assert inspect.signature(alone.forward) == before[0]


class Taking(nn.Module):
    """Takes a factor from an iterator in each call."""

    def __init__(self, factors: Iterator[int]) -> None:
        super().__init__()
        self.f, self.factors = linear(), factors
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(next(self.factors))
        return self.f(x)


@pytest.mark.parametrize("factors", [itertools.count, lambda: itertools.cycle([3, 4, 5]), lambda: iter(range(6, 999))])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_iterators_of_children_are_not_advanced_by_trials(factors: Callable[..., Any], granularity: str) -> None:
    block = Block(lambda _block, _x: 1.0)
    block.f = Taking(factors())  # pyright: ignore[reportAttributeAccessIssue]
    net = nn.Sequential(block).double()
    depth = sd.make_stochastic_(net, granularity=granularity)
    for _ in range(4):
        with depth.gates([True]):
            net(data(4))
    assert block.f.seen == list(itertools.islice(factors(), 4))  # pyright: ignore[reportAttributeAccessIssue]
    assert depth.masked == []


def test_a_generator_of_a_child_masks() -> None:
    block = Block(lambda _block, _x: 1.0)
    block.f = Taking(i for i in range(9))  # pyright: ignore[reportAttributeAccessIssue]
    net = nn.Sequential(block).double()
    depth = sd.make_stochastic_(net)
    with depth.gates([True]), pytest.warns(sd.MaskedBranchWarning, match="may advance the generator factors"):
        net(data(4))
    assert block.f.seen == [0]  # pyright: ignore[reportAttributeAccessIssue]


class Trainer:
    factor = 3.0


TRAINER = Trainer()


def test_a_proxy_of_a_trainer_is_no_iterator() -> None:
    block = Block(lambda block, _x: block.trainer.factor, trainer=weakref.proxy(TRAINER))
    assert same_with_open_gates([block]).masked == []


def test_a_change_of_type_by_its_old_name_is_recorded() -> None:
    assert same_with_open_gates([Block(lambda _block, x: (x > 0).type(x.dtype))]).masked == []


class Checking(nn.Module):
    """Raises an error for a bad batch."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("bad batch")
        return x


def expected_error(*, is_bad: bool) -> contextlib.AbstractContextManager[Any]:
    return pytest.raises(ValueError, match="bad batch") if is_bad else contextlib.nullcontext()


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("bad", [2, 4, 8])
def test_the_error_of_a_bad_batch_is_the_users_own(bad: int, granularity: str) -> None:
    block = Block(lambda _block, _x: 1.0)
    block.f = nn.Sequential(Checking(), linear())  # pyright: ignore[reportAttributeAccessIssue]
    net = nn.Sequential(block).double()
    depth = sd.make_stochastic_(net, granularity=granularity)
    for call in range(1, 10):
        x = data(4, seed=call)
        if call == bad:
            x[0] = float("inf")
        with depth.gates([True]), expected_error(is_bad=call == bad):
            net(x)
    assert depth.masked == []


@pytest.mark.parametrize("bad", [1, 4, 8])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_sample_is_no_sign_that_samples_are_mixed(value: str, bad: int) -> None:
    net = nn.Sequential(Block(lambda _block, _x: 1.0)).double()
    depth = sd.make_stochastic_(net)
    for call in range(1, 10):
        x = data(6, seed=call)
        if call == bad:
            x[2] = float(value)
        with depth.gates([torch.tensor([True, False] * 3)]):
            found = net(x)
        assert torch.equal(found[1::2], x[1::2])
    assert depth.masked == []
