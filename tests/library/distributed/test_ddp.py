"""Plain DistributedDataParallel around a stochastic model: two processes of half the batch equal one of the whole."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from plain_training import (
    NUM_STEPS,
    SEED,
    SURVIVAL_PROBS,
    assert_equal_to_rounding,
    batch,
    build,
    micro_batches,
    share,
    train_alone,
    train_alone_with_batch_norm,
)
from reference import images, vectors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from stochastic_depth.gates import draw_counts


def train_on_rank(
    rank: int,
    name: str,
    sizes: Sequence[int],
    *,
    accumulate: bool = False,
    scaled: bool = False,
    ddp: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a user writes: wrap the model, train; returns weights and buffers, and how often a branch was called."""
    net = build(name, **options)
    calls = [0] * len(sd.controller(net).names)
    if name != "vit":
        for index, block in enumerate(net.blocks):
            block.residual.branch.register_forward_pre_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    wrapped = DistributedDataParallel(net, **(ddp or {}))
    if options.get("sync_batch_norm"):
        ranks.synchronize_batch_norm_(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    for step in range(NUM_STEPS):
        micro = micro_batches(step, accumulate=accumulate)
        for index in micro:
            inputs, labels = batch(name, sum(sizes), index)
            with wrapped.no_sync() if index != micro[-1] else contextlib.nullcontext():
                outputs = wrapped(share(inputs, rank, sizes))
                scaler.scale(F.cross_entropy(outputs, share(labels, rank, sizes)) / len(micro)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {"state": net.state_dict(), "gates": sd.controller(net).state_dict(), "calls": calls}


def _on_ranks(rank: int, cases: Sequence[tuple[str, Sequence[int], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [train_on_rank(rank, name, sizes, **options) for name, sizes, options in cases]


MODELS = ("mlp", "conv_net", "vit")
CASES: dict[str, tuple[str, Sequence[int], dict[str, Any]]] = {
    f"{name}-{granularity}": (name, (3, 3), {"granularity": granularity})
    for name in MODELS
    for granularity in ("batch", "sample")
} | {
    "accumulation": ("mlp", (3, 3), {"accumulate": True}),
    "accumulation of samples": ("vit", (3, 3), {"accumulate": True, "granularity": "sample"}),
    "scaler": ("mlp", (3, 3), {"scaled": True}),
    "checkpointing": ("mlp", (3, 3), {"checkpointing": True}),
    "reentrant checkpointing": ("mlp", (3, 3), {"checkpointing": "reentrant"}),
    "checkpointing of samples": ("vit", (3, 3), {"checkpointing": True, "granularity": "sample"}),
    "SyncBatchNorm": ("conv_net", (3, 3), {"sync_batch_norm": True}),
    "factor in training": ("mlp", (3, 3), {"rescale": "train"}),
    "gradients in buckets": ("mlp", (3, 3), {"ddp": {"gradient_as_bucket_view": True}}),
    "none, with unused parameters looked for": (
        "mlp", (3, 3), {"skipped_grad": "none", "ddp": {"find_unused_parameters": True}},
    ),
}  # fmt: skip
DECORRELATED: dict[str, tuple[str, Sequence[int], dict[str, Any]]] = {
    f"{name}-{granularity}": (name, (3, 3), {"granularity": granularity, "ranks": "decorrelate"})
    for name in MODELS
    for granularity in ("batch", "sample")
} | {
    "uneven agreed": ("mlp", (1, 5), {"granularity": "sample"}),
    "uneven decorrelated": ("mlp", (1, 5), {"granularity": "sample", "ranks": "decorrelate"}),
    "uneven vit": ("vit", (1, 5), {"granularity": "sample", "ranks": "decorrelate"}),
    "accumulation": ("mlp", (3, 3), {"accumulate": True, "ranks": "decorrelate"}),
}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    """All runs on two processes, which are started once."""
    cases = {**CASES, **{f"decorrelated {name}": case for name, case in DECORRELATED.items()}}
    by_rank = ranks.run(_on_ranks, 2, list(cases.values()))
    return {name: [results[index] for results in by_rank] for index, name in enumerate(cases)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_the_batch_equal_one_with_the_whole(
    case: str, trained: dict[str, list[dict[str, Any]]]
) -> None:
    name, sizes, options = CASES[case]
    first, second = trained[case]
    options = {key: value for key, value in options.items() if key not in ("scaled", "ddp", "sync_batch_norm")}
    # The plain version of SyncBatchNorm is BatchNorm over the whole batch.
    synchronized = case == "SyncBatchNorm"
    alone = train_alone_with_batch_norm(sizes) if synchronized else train_alone(name, sizes, **options)
    assert_equal_to_rounding(first["state"], second["state"])
    assert_equal_to_rounding(first["state"], alone)
    assert first["gates"] == second["gates"]


@pytest.mark.parametrize("case", DECORRELATED)
def test_each_rank_follows_gates_of_its_own_and_gradients_are_averaged(
    case: str, trained: dict[str, list[dict[str, Any]]]
) -> None:
    name, sizes, options = DECORRELATED[case]
    first, second = trained[f"decorrelated {case}"]
    assert_equal_to_rounding(first["state"], second["state"])
    assert_equal_to_rounding(first["state"], train_alone(name, sizes, whole=False, **options))


@pytest.mark.parametrize("case", ["uneven agreed", "uneven decorrelated"])
def test_a_rank_without_survivors_runs_a_sample_of_weight_zero(
    case: str, trained: dict[str, list[dict[str, Any]]]
) -> None:
    """Rank 0 has one sample, which does not survive in every step: its branches are called anyway."""
    net = build("mlp", granularity="sample")
    counts = [draw_counts(SURVIVAL_PROBS, 1, seed=SEED, counter=step) for step in range(NUM_STEPS)]
    assert any(0 in of_step for of_step in counts), "no gate is closed: the test could not fail"
    assert net is not None
    for of_rank in trained[f"decorrelated {case}"]:
        assert of_rank["calls"] == [NUM_STEPS] * len(SURVIVAL_PROBS)


def test_a_single_process_calls_no_branch_without_survivors() -> None:
    net = build("mlp", granularity="sample")
    calls: list[int] = []
    for index, block in enumerate(net.blocks):
        block.residual.branch.register_forward_pre_hook(lambda *_, i=index: calls.append(i))
    net(vectors(1))
    open_branches = [i for i, count in enumerate(draw_counts(SURVIVAL_PROBS, 1, seed=SEED, counter=0)) if count]
    assert calls == open_branches


def _uneven_sync_batch_norm(rank: int) -> int:
    net = DistributedDataParallel(build("conv_net", sync_batch_norm=True, granularity="sample"))
    ranks.synchronize_batch_norm_(net)
    for step in range(NUM_STEPS):
        net(images((1, 5)[rank], seed=step)).sum().backward()
    return sd.controller(net).state_dict()["counter"]


def _refused(rank: int, options: dict[str, Any], ddp: dict[str, Any]) -> str:
    net = DistributedDataParallel(build("conv_net", sync_batch_norm=True, **options), **ddp)
    ranks.synchronize_batch_norm_(net)
    with pytest.raises(RuntimeError) as refusal:
        net(images(3))
    net.eval()
    net(images(3))  # evaluation is not checked
    return str(refusal.value)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


def _whole_layers(rank: int) -> dict[str, Tensor]:
    """Whole layers as branches, of samples, with a batch of one on rank 0."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Layer() for _ in range(3))).double()
    depth = sd.make_stochastic_(net, [0.3, 0.4, 0.5], layers=["?"], granularity="sample", seed=SEED)
    called = [0]
    net[0].linear.register_forward_pre_hook(lambda *_: called.__setitem__(0, called[0] + 1))
    wrapped = DistributedDataParallel(net)
    for step in range(NUM_STEPS):
        wrapped(vectors((1, 5)[rank], seed=step)).sum().backward()
    assert called == [NUM_STEPS]
    assert depth.names == ["0", "1", "2"]
    return {name: p.grad for name, p in net.named_parameters()}


def _small_cases(rank: int) -> dict[str, Any]:
    return {
        "uneven SyncBatchNorm": _uneven_sync_batch_norm(rank),
        "SyncBatchNorm": _refused(rank, {"ranks": "decorrelate"}, {}),
        "none": _refused(rank, {"skipped_grad": "none"}, {}),
        "static_graph": _refused(rank, {}, {"static_graph": True}),
        "layers": _whole_layers(rank),
    }


@pytest.fixture(scope="module")
def small_cases() -> list[dict[str, Any]]:
    return ranks.run(_small_cases, 2)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("SyncBatchNorm", "blocks.0.residual.*SyncBatchNorm, which waits for every rank.*'decorrelate'.*Use ranks="),
        ("none", "waits for a gradient of every parameter.*skipped_grad='none'.*skipped_grad='zero'"),
        ("static_graph", r"static_graph=True.*no_sync.*Leave static_graph at False"),
    ],
)
def test_what_would_hang_is_refused_with_the_reason_on_every_rank(
    case: str, words: str, small_cases: list[dict[str, Any]]
) -> None:
    for of_rank in small_cases:
        assert re.search(words, of_rank[case]), of_rank[case]


def test_uneven_batches_do_not_leave_a_rank_waiting_in_sync_batch_norm(small_cases: list[dict[str, Any]]) -> None:
    assert [of_rank["uneven SyncBatchNorm"] for of_rank in small_cases] == [NUM_STEPS, NUM_STEPS]


def test_whole_layers_are_called_on_every_rank_and_their_gradients_agree(small_cases: list[dict[str, Any]]) -> None:
    first, second = (of_rank["layers"] for of_rank in small_cases)
    assert_equal_to_rounding(first, second)
