"""The surroundings of a block's tensors: caches, extra outputs of attention, tables, masks.

The reference is each model's own formula with its gates written into it, in float64.
"""

import itertools
import os
import queue
import types
from collections import deque
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel, T5Config, T5Model

import stochastic_depth as sd


def patterns(num: int) -> list[tuple[bool, ...]]:
    return list(itertools.product((True, False), repeat=num))


# ---------------------------------------- objects that it calls


class Cache:
    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def update(self, keys: Tensor, index: int) -> Tensor:
        before = self.keys.get(index)
        self.keys[index] = keys if before is None else torch.cat([before, keys], 1)
        return self.keys[index]

    def length(self) -> int:
        return len(self.keys)


class Caching(nn.Module):
    """Keeps its keys in a cache that it is given."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.key, self.out = index, linear(), linear()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        keys = self.key(x)
        if cache is not None:
            keys = cache.update(keys, self.index)
        return x + self.out(keys.tanh().mean(1, keepdim=True))


class CachingNet(nn.Module):
    def __init__(self, kind: type[nn.Module] = Caching) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(index) for index in range(3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, cache=cache)
        return x

    def gated(self, x: Tensor, gates: tuple[bool, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        kept: dict[int, Tensor] = {}
        for block, gate in zip(self.blocks, gates, strict=True):
            if gate:
                kept[block.index] = block.key(x)
                x = x + block.out(kept[block.index].tanh().mean(1, keepdim=True))
        return x, kept


def test_a_cache_is_called_as_often_as_the_branches_that_run() -> None:
    torch.manual_seed(0)
    net, x = CachingNet().double(), data(2, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    for gates in patterns(3):
        cache = Cache()
        with depth.gates(gates):
            output = net(x, cache)
        expected, kept = net.gated(x, gates)
        assert_same(output, expected)
        assert cache.keys.keys() == kept.keys()
        assert type(cache) is Cache
        assert vars(cache).keys() == {"keys"}
        for index, keys in kept.items():
            assert_same(cache.keys[index], keys)
    assert depth.masked == []


def test_what_a_cache_holds_makes_no_new_form() -> None:
    net, x, cache = CachingNet().double(), data(2, 3), Cache()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True] * 3):
        net(x, cache)
        net(x, Cache())
        known = net.blocks[0]._stochastic_depth_branch.forms
        forms = len(known.prepared)
        net(x, Cache())
        net(x, cache)  # It holds twice as many keys now.
        assert cache.keys[0].shape == (2, 6, D)
        assert len(known.prepared) == forms


def test_verify_runs_the_own_code_with_a_cache() -> None:
    net = CachingNet().double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    cache = Cache()
    assert depth.verify(data(2, 3), cache).num_masked == 0
    assert type(cache) is Cache


class Peeking(Caching):
    """Decides by what the cache holds."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        keys = self.key(x)
        if cache is not None:
            keys = cache.update(keys, self.index) if cache.length() < 2 else keys
        return x + self.out(keys.mean(1, keepdim=True))


class LookingInto(Caching):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        keys = self.key(x)
        if cache is not None:
            cache.keys[self.index] = keys
        return x + self.out(keys.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("kind", "cause"),
    [(Peeking, "depends on the content of a Cache"), (LookingInto, "reads the content of its Cache .*use_cache")],
)
def test_code_that_looks_into_a_cache_is_refused(kind: type[nn.Module], cause: str) -> None:
    net, cache = CachingNet(kind).double(), Cache()
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(RuntimeError, match=cause):
        net(data(2, 3), cache)
    assert cache.keys == {}


class CachingSamples(Caching):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.drop_path = DropPath(0.5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        keys = self.key(x) if cache is None else cache.update(self.key(x), self.index)
        return x + self.drop_path(self.out(keys.tanh().mean(1, keepdim=True)))


def test_a_cache_of_samples_is_kept_whole() -> None:
    net, cache, x = CachingNet(CachingSamples).double(), Cache(), data(4, 3)
    depth = sd.make_stochastic_(net, granularity="sample")
    gates = [torch.tensor(gate) for gate in ([1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0])]
    with depth.gates([gate.bool() for gate in gates]), pytest.warns(sd.MaskedBranchWarning, match="such as a cache"):
        output = net(x, cache)
    expected = x
    for block, gate in zip(net.blocks, gates, strict=True):
        keys = block.key(expected)
        assert_same(cache.keys[block.index], keys)
        expected = expected + 2 * gate.view(-1, 1, 1) * block.out(keys.tanh().mean(1, keepdim=True))
    assert_same(output, expected)


def test_a_language_model_trains_with_its_default_cache() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    net, tokens = LlamaModel(config).double().train(), torch.arange(10).view(2, 5)
    assert net.config.use_cache
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True, False, False, True]):
        output = net(tokens)
    first, second = net.layers
    embedded = net.embed_tokens(tokens)
    position = net.rotary_emb(embedded, torch.arange(5)[None])
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    x = embedded + first.self_attn(first.input_layernorm(embedded), position, mask)[0]
    x = x + second.mlp(second.post_attention_layernorm(x))
    assert_same(output.last_hidden_state, net.norm(x))
    assert output.past_key_values.layers[0].keys.shape[2] == 5


# ---------------------------------------- what attention gives beside its output


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.bias = linear(), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias = self.bias * x.shape[1] if bias is None else bias
        return self.f(x) + bias, bias


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, bias = self.attention(x, bias)
        return x + output, bias


class BiasedNet(nn.Module):
    """The first block makes the bias of all, as in T5 and WavLM."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Biased() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x

    def gated(self, x: Tensor, gates: tuple[bool, ...]) -> Tensor:
        bias = self.blocks[0].attention.bias * x.shape[1]
        for block, gate in zip(self.blocks, gates, strict=True):
            x = x + gate * (block.attention.f(x) + bias)
        return x


def test_a_bias_that_others_use_is_there_where_its_branch_is_closed() -> None:
    torch.manual_seed(0)
    net, x = BiasedNet().double(), data(2, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.warns(sd.MaskedBranchWarning, match="what attention gives beside the branch's output"):
        net(x)
    assert [name for name, _ in depth.masked] == ["blocks.0#1"], "the others pass the bias on"
    for gates in patterns(3):
        with depth.gates(gates):
            output = net(x)
        expected = net.gated(x, gates)
        assert_same(output, expected)
        ours = torch.autograd.grad(output.square().sum(), list(net.parameters()), allow_unused=True)
        theirs = torch.autograd.grad(expected.square().sum(), list(net.parameters()), allow_unused=True)
        for mine, its in zip(ours, theirs, strict=True):
            if its is not None and its.any():
                assert_same(mine, its)


def test_only_the_attention_of_t5_that_makes_the_bias_is_masked() -> None:
    torch.manual_seed(0)
    options = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    net, tokens = T5Model(T5Config(**options, dropout_rate=0.0)).double().train(), torch.arange(10).view(2, 5)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.warns(sd.MaskedBranchWarning):
        report = depth.verify(input_ids=tokens, decoder_input_ids=tokens)
    assert report.num_masked == 3
    masked = {name for name, _ in depth.masked}
    assert masked == {"encoder.block.0.layer.0#1", "decoder.block.0.layer.0#1", "decoder.block.0.layer.1#1"}


# ---------------------------------------- tables, masks and others' hooks

TABLE: dict[type, object] = {}


class Backend:
    def apply(self, x: Tensor) -> Tensor:
        return x.tanh()


class Looking(nn.Module):
    """Looks up in a global table what to do with a type, as einops does, and fills the table."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        if type(x) not in TABLE:
            TABLE[type(x)] = Backend()
        return x + self.f(TABLE[type(x)].apply(x))


def test_a_table_of_types_stays_what_it_is() -> None:
    TABLE.clear()
    TABLE[int] = known = Backend()
    net, x = nn.Sequential(Looking(), Looking()).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert {int: known} == TABLE
    with depth.gates([True, False]):
        assert_same(net(x), x + net[0].f(x.tanh()))
    assert all(isinstance(value, Backend) for value in TABLE.values())


class Masked(nn.Module):
    """Attention with an additive mask that holds the lowest number."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = linear(), linear()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = (self.q(x) @ x.transpose(1, 2) + mask).softmax(-1)
        return x + weights @ self.v(x)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float64).min, -float("inf"), -1e4])
def test_an_additive_mask_is_proven_as_it_is(lowest: float) -> None:
    net, x = nn.ModuleList([Masked(), Masked()]).double(), data(3, 4)
    net.forward = lambda x, mask: net[1](net[0](x, mask), mask)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    mask = torch.full((4, 4), lowest, dtype=torch.float64).triu(1).expand(3, 4, 4)
    with depth.gates([True, False]):
        output = net(x, mask)
    assert_same(output, x + (net[0].q(x) @ x.transpose(1, 2) + mask).softmax(-1) @ net[0].v(x))


class NotFinite(nn.Module):
    """Whose branch is not finite for some samples, as attention is where all is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) / (x * 0)


def test_a_closed_branch_gives_no_nan() -> None:
    net, x = nn.Sequential(NotFinite(), NotFinite()).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([False, False]):
        assert_same(net(x), x)


def test_hooks_of_the_process_stay_out_of_a_proof() -> None:
    """A FLOP counter registers hooks on all modules, which call functions of PyTorch where there are gradients."""
    net, x = CachingNet(CachingSamples).double(), data(4, 3).requires_grad_()
    depth = sd.make_stochastic_(net, granularity="batch")
    with depth.gates([True, False, True]), FlopCounterMode(display=False) as counter:
        net(x)
    assert depth.masked == []
    assert counter.get_total_flops() == 2 * 2 * (4 * 3 * D * D + 4 * D * D)


# ---------------------------------------- what comes later


class Later(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.more = linear(), linear(), False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x) if self.more else x


def test_an_addition_that_appears_later_is_listed() -> None:
    net, x = nn.Sequential(Later(), Later()).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    net(x)
    assert "also adds" not in str(depth)
    net[0].more = True
    with depth.gates([False, False]):
        assert_same(net(x), x + net[0].g(x))
    assert "no branch: 0 also adds the output of g, which was not found before: it has no gate" in str(depth)


# ---------------------------------------- attention maps


class Mapping(nn.Module):
    """Returns its attention map, as transformers' Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MapAttention()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, weights = self.attention(x)
        return x + output, weights


class MapAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = linear(), linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self.q(x) @ x.transpose(1, 2)).softmax(-1)
        return weights @ self.v(x), weights


class MapNet(nn.Module):
    def __init__(self, use: bool) -> None:
        super().__init__()
        self.blocks, self.use = nn.ModuleList(Mapping() for _ in range(2)), use

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for block in self.blocks:
            x, weights = block(x)
            if self.use:
                x = x + weights.mean()
            maps.append(weights)
        return x, maps


def test_a_branch_with_a_map_is_skipped_and_its_map_cannot_be_used_unseen() -> None:
    torch.manual_seed(0)
    net, x = MapNet(use=False).double(), data(2, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    called: list[nn.Module] = []
    for block in net.blocks:
        block.attention.register_forward_pre_hook(lambda module, _: called.append(module))
    for gates in patterns(2):
        called.clear()
        with depth.gates(gates):
            output, maps = net(x)
        expected, closed = x, 0
        for block, gate, weights in zip(net.blocks, gates, maps, strict=True):
            if gate:
                added, own = block.attention(expected)
                called.pop()
                expected = expected + added
                assert_same(weights, own)
            else:
                closed += 1
                with pytest.raises(RuntimeError, match="attention map was not computed"):
                    torch.ones(3) + weights
                with pytest.raises(RuntimeError, match="attention map"):
                    weights.mean()
                assert not hasattr(weights, "shape")
        assert_same(output, expected)
        assert len(called) == 2 - closed
    assert depth.verify(x).num_masked == 0


def test_using_a_map_that_was_not_computed_raises() -> None:
    net, x = MapNet(use=True).double(), data(2, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True, True]):
        net(x)
    with depth.gates([False, True]), pytest.raises(RuntimeError, match=r"exclude the branches .* with where="):
        net(x)


# ---------------------------------------- what the attack found


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_a_block_with_its_own_forward_has_its_own_proof() -> None:
    net, x = nn.Sequential(Plain(), Plain(), Plain()).double(), data(4)
    net[2].forward = MethodType(lambda self, x: x + 0.1 * self.f(x), net[2])
    expected = net(x)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True] * 3):
        assert_same(net(x), expected)


class Along(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor, dim: int) -> Tensor:
        return x + self.f(x.roll(1, dim))


def test_a_number_that_changes_what_is_mixed_is_proven_anew() -> None:
    net, x = Along().double(), data(4, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    gate = torch.tensor([True, False, True, False])
    with depth.gates([gate]):
        assert_same(net(x, 1), x + gate.view(4, 1, 1) * net.f(x.roll(1, 1)))
        with pytest.raises(RuntimeError, match="not one of independent samples"):
            net(x, 0)


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(0.5)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = x + self.drop_path(self.f(x))
        return x


class LoopingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Looping()

    def forward(self, x: Tensor, times: int) -> Tensor:
        return self.block(x, times)


def test_a_loop_may_be_shorter_than_it_was_read() -> None:
    net, x = LoopingNet().double(), data(4, 3, 2)
    depth = sd.make_stochastic_(net, granularity="batch")
    with depth.gates([True, True]):
        assert_same(net(x, 1), x + 2 * net.block.f(x))
    with depth.gates([False, True]):
        assert_same(net(x, 1), x)
        assert_same(net(x, 2), x + 2 * net.block.f(x))


COLLECTED: list[Tensor] = []


class Collecting(nn.Module):
    """A child that collects, counts and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.seen, self.calls, self.history = linear(), torch.zeros(()), 0, []
        self.register_buffer("average", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        self.history.append(x.shape[0])
        self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 1))
        COLLECTED.append(x.mean())
        return self.f(x)


class AroundCollecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Collecting()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x)


@pytest.mark.parametrize("by_example", [False, True])
def test_what_children_collect_is_collected_once_a_step(by_example: bool) -> None:
    COLLECTED.clear()
    net, x = nn.Sequential(AroundCollecting()).double(), data(4, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    child = net[0].child
    for step in range(1, 3):
        with depth.gates([True]):
            net(x)
        assert (child.seen.item(), child.calls, child.history, len(COLLECTED)) == (step, step, [4] * step, step)
    assert_same(child.average, 0.1 * x.mean((0, 1)) * 1.9)
    depth.verify(x)
    assert (child.seen.item(), child.calls, child.history) == (2, 2, [4, 4])
    assert_same(child.average, 0.1 * x.mean((0, 1)) * 1.9)


TALLY: dict[str, Any] = {}


def empty_tally() -> dict[str, Any]:
    return {
        "deque": deque[int](),
        "tensor": torch.zeros(1),
        "array": np.zeros(1),
        "nested": {"list": [0], "inner": {"list": [0]}},
        "queue": queue.Queue[int](),
        "object": types.SimpleNamespace(tensor=torch.zeros(1), list=[]),
    }


WRITES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "deque": (lambda: TALLY["deque"].append(1), lambda: len(TALLY["deque"])),
    "tensor": (lambda: TALLY["tensor"].add_(1), lambda: TALLY["tensor"].item()),
    "tensor by .data": (lambda: TALLY["tensor"].data.add_(1), lambda: TALLY["tensor"].item()),
    "array": (lambda: TALLY["array"].__iadd__(1), lambda: TALLY["array"].item()),
    "nested list": (
        lambda: TALLY["nested"]["inner"]["list"].append(1),
        lambda: len(TALLY["nested"]["inner"]["list"]) - 1,
    ),
    "queue": (lambda: TALLY["queue"].put(1), lambda: TALLY["queue"].qsize()),
    "tensor of an object": (lambda: TALLY["object"].tensor.add_(1), lambda: TALLY["object"].tensor.item()),
    "environment": (
        lambda: os.environ.update(TALLY=str(int(os.environ.get("TALLY", "0")) + 1)),
        lambda: int(os.environ.get("TALLY", "0")),
    ),
}


@pytest.fixture
def tally():
    TALLY.update(empty_tally())
    yield
    os.environ.pop("TALLY", None)


class Writing(nn.Module):
    """Leaves something outside of itself."""

    def __init__(self, write: Callable[[], Any]) -> None:
        super().__init__()
        self.f, self.write = linear(), write

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return self.f(x)


class AroundWriting(nn.Module):
    def __init__(self, write: Callable[[], Any]) -> None:
        super().__init__()
        self.child = Writing(write)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x)


class WritingItself(Writing):
    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return x + self.f(x)


@pytest.mark.usefixtures("tally")
@pytest.mark.parametrize("name", WRITES)
def test_what_children_leave_outside_is_left_once_a_step(name: str) -> None:
    write, count = WRITES[name]
    net, x = nn.Sequential(AroundWriting(write)).double(), data(4, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x])
    for step in range(1, 5):
        with depth.gates([True]):
            net(x)
        assert count() == step
    depth.verify(x)
    assert count() == 4
    assert depth.masked == []


@pytest.mark.usefixtures("tally")
@pytest.mark.parametrize("name", WRITES)
def test_what_a_block_leaves_outside_is_refused(name: str) -> None:
    write, count = WRITES[name]
    net, x = nn.Sequential(WritingItself(write)).double(), data(4, 3)
    with pytest.raises(ValueError, match="the forward changes"):
        sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x])
    assert count() == 0


class Auxiliary(nn.Module):
    """Adds a loss to a list of the whole model, which it holds without being its parent."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.f, self.root = linear(), [root]

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        self.root[0].losses.append(y.square().mean())
        return y


class WithLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.blocks = nn.ModuleList(nn.ModuleDict({"f": Auxiliary(self)}) for _ in range(2))
        for block in self.blocks:
            block.__class__ = AroundAuxiliary

    def forward(self, x: Tensor) -> Tensor:
        self.losses.clear()
        for block in self.blocks:
            x = block(x)
        return x


class AroundAuxiliary(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        return x + self["f"](x)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_losses_that_children_hand_to_the_model_are_those_of_the_step(granularity: str) -> None:
    net, x = WithLosses().double(), data(4, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
    with depth.gates([True, True]):
        with pytest.warns(sd.MaskedBranchWarning, match="stores a value that it computes"):
            net(x)
        assert len(net.losses) == 2
        net(x)
        assert len(net.losses) == 2
    assert_same(net.losses[0], net.blocks[0]["f"].f(x).square().mean())


class Codebook(nn.Module):
    """Moves its weights itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(size, D)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes.weight.data.mul_(0.5)
        return x * self.codes.weight.mean()


class AroundCodebook(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.codebook, self.drop_path = Codebook(size), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.codebook(x))


@pytest.mark.parametrize("size", [10, 2**15])
@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_weights_that_a_child_moves_move_once_a_step(size: int) -> None:
    net, x = nn.Sequential(AroundCodebook(size)).double(), data(4, 3)
    depth = sd.make_stochastic_(net)
    weight = net[0].codebook.codes.weight
    before = weight.detach().clone()
    net(x)
    assert_same(weight.detach(), before / 2)
    depth.verify(x)
    assert_same(weight.detach(), before / 2)


class Adapted(nn.Module):
    """A layer with a parallel adapter, which has a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = linear(), nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x).tanh()) * 2


class WithAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Adapted()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_an_adapter_inside_of_a_branch_is_no_branch() -> None:
    net, x = nn.Sequential(WithAdapter(), WithAdapter()).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert list(depth.names) == ["0#1", "1#1"]
    assert "0.f (Adapted) and 1 more: it lies in a branch, and adds to what its own layers compute" in str(depth)
    with depth.gates([False, True]):
        assert_same(net(x), x + net[1].f(x))


def test_layers_that_differ_by_their_number_share_a_proof() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    net = LlamaModel(config).double().train()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([True] * 10):
        net(torch.arange(10).view(2, 5))
    known = net.layers[0]._stochastic_depth_branch.forms
    assert len(known.proven) == 1
    assert known.num_runs == 8, "two to record, and six to compare under three patterns"


class Uncopyable:
    """Like a socket or a process."""

    def __init__(self) -> None:
        self.open = True

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("cannot pickle this")


def test_what_cannot_be_copied_is_held_as_it_is() -> None:
    net, x = nn.Sequential(Plain(), Plain()).double(), data(4)
    net.log, net[0].log = Uncopyable(), Uncopyable()
    before = net.log, net[0].log
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x])
    assert depth.verify(x).num_masked == 0
    assert (net.log, net[0].log) == before
