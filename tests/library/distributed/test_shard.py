"""One FSDP2 unit per branch: what is sent, counted collective by collective, and that training stays right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from plain_training import (
    NUM_STEPS,
    SEED,
    SURVIVAL_PROBS,
    assert_equal_to_rounding,
    batch,
    build,
    gates_of,
    micro_batches,
    share,
    train_alone,
)
from reference import vectors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from traffic import counted_bytes

import stochastic_depth as sd


def mesh_of(kind: str) -> DeviceMesh:
    if kind == "sharded":
        return init_device_mesh("cpu", (dist.get_world_size(),))
    return init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))


def unit_numels(net: nn.Module, num_shards: int) -> tuple[list[int], int]:
    """Numbers in each branch and in the rest, each parameter padded to a multiple of the shards."""

    def padded(parameter: Tensor) -> int:
        return math.ceil(parameter.shape[0] / num_shards) * num_shards * parameter[0].numel()

    # By name, not by what shard_ finds: a branch of ours is .branch; one of timm's is norm, attn or mlp, and a scale.
    prefixes = []
    for name in sd.controller(net).names:
        block, _, which = name.rpartition(".")
        inside = {"drop_path1": ("norm1", "attn", "ls1"), "drop_path2": ("norm2", "mlp", "ls2")}.get(which)
        prefixes.append(tuple(f"{block}.{part}." for part in inside) if inside else (f"{name}.branch.",))
    numels = [sum(padded(p) for name, p in net.named_parameters() if name.startswith(prefix)) for prefix in prefixes]
    return numels, sum(map(padded, net.parameters())) - sum(numels)


def train_on_rank(
    rank: int,
    name: str,
    sizes: Sequence[int],
    *,
    mesh: str = "sharded",
    accumulate: bool = False,
    policies: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Any]:
    net = build(name, **options).to(dtype)
    depth = sd.controller(net)
    numels, rest = unit_numels(net, len(sizes) if mesh == "sharded" else 1)
    assert min(numels) > 0
    wrapped = sd.shard_(net, mesh_of(mesh), **(policies or {}))
    assert wrapped is net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    sent, gates, losses = [], [], []
    for step in range(NUM_STEPS):
        micro = micro_batches(step, accumulate=accumulate)
        with counted_bytes() as of_step:
            for index in micro:
                net.set_requires_gradient_sync(index == micro[-1])
                inputs, labels = batch(name, sum(sizes), index)
                outputs = net(share(inputs, rank, sizes).to(dtype))
                gates.append(depth.last_gates)
                loss = F.cross_entropy(outputs.to(dtype), share(labels, rank, sizes)) / len(micro)
                loss.backward()
                losses.append(loss.item())
        sent.append(of_step)
        none = [p_name for p_name, p in net.named_parameters() if p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
    return {
        "state": {key: value.full_tensor() for key, value in net.state_dict().items()} if name != "conv_net" else {},
        "gates": gates,
        "sent": sent,
        "numels": numels,
        "rest": rest,
        "none": none,
        "losses": losses,
        "last_gates": depth.last_gates,
    }


def _on_ranks(rank: int, cases: Sequence[tuple[str, Sequence[int], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [train_on_rank(rank, name, sizes, **options) for name, sizes, options in cases]


HALVES = (3, 3)
OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
CASES: dict[str, tuple[str, Sequence[int], dict[str, Any]]] = {
    "mlp": ("mlp", HALVES, {}),
    "mlp, replicated": ("mlp", HALVES, {"mesh": "replicated"}),
    "vit": ("vit", HALVES, {}),
    "vit, replicated": ("vit", HALVES, {"mesh": "replicated"}),
    "mlp, samples": ("mlp", HALVES, {"granularity": "sample"}),
    "vit, samples": ("vit", HALVES, {"granularity": "sample"}),
    "no gradients of the skipped": ("mlp", HALVES, {"skipped_grad": "none"}),
    "kept gathered": ("mlp", HALVES, {"policies": {"reshard_after_forward": False}}),
    "offloaded": ("mlp", HALVES, {"policies": OFFLOAD}),
    "gates compared": ("mlp", HALVES, {"policies": {"check_gates": True}}),
    "accumulation": ("mlp", HALVES, {"accumulate": True}),
    "checkpointing": ("mlp", HALVES, {"checkpointing": True}),
}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    by_rank = ranks.run(_on_ranks, 2, list(CASES.values()))
    return {name: [results[index] for results in by_rank] for index, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_equal_one(case: str, trained: dict[str, list[dict[str, Any]]]) -> None:
    name, sizes, options = CASES[case]
    options = {key: value for key, value in options.items() if key not in ("mesh", "policies")}
    first, second = trained[case]
    assert_equal_to_rounding(first["state"], second["state"])
    assert_equal_to_rounding(first["state"], train_alone(name, sizes, **options))


def expected_bytes(case: str, gates: Sequence[float], numels: Sequence[int], rest: int) -> dict[str, int]:
    """By hand, 8 bytes a number: the rest once; an open branch gathered before forward and backward, reduced once."""
    is_open = [gate > 0 for gate in gates]
    of_open = sum(numel for numel, gate in zip(numels, is_open, strict=True) if gate)
    times = 1 if case == "kept gathered" else 2
    compared = 16 if case == "gates compared" else 0
    if "replicated" in case:
        return {"gathered": 0, "scattered": 0, "summed": 8 * (rest + of_open)}
    return {"gathered": 8 * (rest + times * of_open), "scattered": 8 * (rest + of_open), "summed": compared}


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("accumulation", "checkpointing")])
def test_what_is_sent_is_the_open_branches_and_the_rest(case: str, trained: dict[str, list[dict[str, Any]]]) -> None:
    closed = 0
    for of_rank in trained[case]:
        for gates, sent in zip(of_rank["gates"], of_rank["sent"], strict=True):
            gates = [max(gate, 0.01) for gate in gates] if CASES[case][2].get("granularity") == "sample" else gates
            closed += gates.count(0)
            assert sent == expected_bytes(case, gates, of_rank["numels"], of_rank["rest"])
    assert closed or CASES[case][2].get("granularity") == "sample", "no gate is closed: the test could not fail"


def test_accumulated_gradients_are_reduced_once_for_branches_open_in_any_micro_batch(
    trained: dict[str, list[dict[str, Any]]],
) -> None:
    for of_rank in trained["accumulation"]:
        for step, sent in enumerate(of_rank["sent"]):
            first, second = of_rank["gates"][2 * step : 2 * step + 2]
            either = [max(pair) for pair in zip(first, second, strict=True)]
            expected = expected_bytes("", either, of_rank["numels"], of_rank["rest"])["scattered"]
            assert sent["scattered"] == expected


def test_without_gradients_for_the_skipped_a_closed_branch_has_none(trained: dict[str, list[dict[str, Any]]]) -> None:
    (result, _) = trained["no gradients of the skipped"]
    closed = [index for index, gate in enumerate(result["last_gates"]) if not gate]
    assert closed
    assert {int(name.split(".")[1]) for name in result["none"]} == set(closed)


# ---------------------------------------------------------------------------------------------- whole layers and more


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linears[1](self.linears[0](x).tanh())


def _whole_layers(rank: int) -> list[tuple[dict[str, int], list[float]]]:
    torch.manual_seed(0)
    net = nn.Sequential(*(Layer() for _ in range(4))).double()
    depth = sd.make_stochastic_(net, [0.4] * 4, layers=["?"], seed=SEED)
    sd.shard_(net, mesh_of("sharded"))
    steps = []
    for step in range(6):
        with counted_bytes() as sent:
            net(vectors(3, seed=step)).sum().backward()
        steps.append((sent, depth.last_gates))
    return steps


def _shared_branch(rank: int) -> list[tuple[dict[str, int], list[float]]]:
    """One branch at two places, and a layer that lies in a branch and in the head: gathered whatever the gates."""
    torch.manual_seed(0)
    twice, head = nn.Linear(5, 5), nn.Linear(5, 5)
    branches = [twice, twice, nn.Sequential(nn.Linear(5, 5), head)]
    net = nn.Sequential(*map(sd.Residual, branches), head).double()
    depth = sd.make_stochastic_(net, [0.4] * 3, seed=SEED)
    sd.shard_(net, mesh_of("sharded"))
    steps = []
    for step in range(6):
        with counted_bytes() as sent:
            net(vectors(3, seed=step)).sum().backward()
        steps.append((sent["scattered"], depth.last_gates))
    return steps


def _mixed_precision(rank: int) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train_on_rank(rank, "mlp", HALVES, policies={"mp_policy": policy}, dtype=torch.float32)


def _disagree(rank: int) -> str:
    net = build("mlp")
    depth = sd.controller(net)
    sd.shard_(net, mesh_of("replicated"), check_gates=True)
    net(vectors(2))
    if rank:
        depth.load_state_dict({**depth.state_dict(), "counter": 5})
    with pytest.raises(RuntimeError) as refusal:
        net(vectors(2))
    return str(refusal.value)


def _refused(rank: int) -> dict[str, str]:
    refused = {}
    mesh = mesh_of("sharded")
    twice = build("mlp")
    sd.shard_(twice, mesh)
    wrapped = nn.parallel.DistributedDataParallel(build("mlp"))
    cases = {
        "decorrelated": build("mlp", ranks="decorrelate"),
        "twice": twice,
        "DDP": wrapped,
        "plain": nn.Linear(2, 2),
    }
    for name, net in cases.items():
        with pytest.raises(ValueError) as refusal:  # noqa: PT011 -- the words are looked at by the test
            sd.shard_(net, mesh)
        refused[name] = str(refusal.value)
    return refused


def _small_cases(rank: int) -> dict[str, Any]:
    return {
        "layers": _whole_layers(rank),
        "shared": _shared_branch(rank),
        "mixed": _mixed_precision(rank),
        "disagree": _disagree(rank),
        "refused": _refused(rank),
    }


@pytest.fixture(scope="module")
def small_cases() -> list[dict[str, Any]]:
    return ranks.run(_small_cases, 2)


def test_a_closed_layer_is_not_gathered(small_cases: list[dict[str, Any]]) -> None:
    padded = 8 * (8 * 5 + 8 + 6 * 7 + 6)  # (7, 5), 7, (5, 7), 5 on two ranks
    for of_rank in small_cases:
        for sent, gates in of_rank["layers"]:
            # All parameters lie in layers: the rest is empty.
            assert sent == {"gathered": 2 * padded * sum(gates), "scattered": padded * sum(gates), "summed": 0}


def test_shared_modules_stay_with_the_rest(small_cases: list[dict[str, Any]]) -> None:
    linear = 8 * (6 * 5 + 6)
    for of_rank in small_cases:
        seen = set()
        for sent, gates in of_rank["shared"]:
            # The third branch shares the head with what always runs, so that all of it belongs to the rest.
            assert sent == linear * (2 + max(gates[:2]))
            seen.add(tuple(gates))
        assert len(seen) > 2


def test_mixed_precision_gathers_half_and_reduces_whole(small_cases: list[dict[str, Any]]) -> None:
    first, second = (of_rank["mixed"] for of_rank in small_cases)
    alone = build("mlp").float()
    inputs, labels = batch("mlp", 6, 0)
    with sd.controller(alone).gates(gates_of(sd.controller(alone), 0, 6)):
        loss = F.cross_entropy(alone(inputs.float()), labels)
    assert (first["losses"][0] + second["losses"][0]) / 2 == pytest.approx(loss.item(), abs=0.02)
    for of_rank in (first, second):
        assert all(math.isfinite(loss) for loss in of_rank["losses"])
        for gates, sent in zip(of_rank["gates"], of_rank["sent"], strict=True):
            whole = expected_bytes("", gates, of_rank["numels"], of_rank["rest"])
            assert sent == {"gathered": whole["gathered"] // 4, "scattered": whole["scattered"] // 2, "summed": 0}


def test_ranks_that_disagree_raise_on_every_rank(small_cases: list[dict[str, Any]]) -> None:
    for of_rank, counter in zip(small_cases, (1, 5), strict=True):
        assert f"do not agree on their gates (here: seed {SEED}, draw {counter})" in of_rank["disagree"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("decorrelated", "needs the same gates on every rank"),
        ("twice", "already sharded"),
        ("DDP", "wrapped in DistributedDataParallel"),
        ("plain", "is not stochastic: call make_stochastic_ first"),
    ],
)
def test_what_cannot_be_sharded_is_refused(case: str, words: str, small_cases: list[dict[str, Any]]) -> None:
    assert all(words in of_rank["refused"][case] for of_rank in small_cases)


# ---------------------------------------------------------------------------------------------- distributed checkpoints


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    """Every rank sees a share of eight samples, whatever the number of ranks."""
    for step in steps:
        inputs, labels = batch("mlp", 8, step)
        sizes = [8 // dist.get_world_size()] * dist.get_world_size()
        F.cross_entropy(net(share(inputs, rank, sizes)), share(labels, rank, sizes)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "gates": sd.controller(net).state_dict()}


def _build(seed: int = SEED) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = build("mlp")
    depth = sd.controller(net)
    depth.load_state_dict({**depth.state_dict(), "seed": seed})
    sd.shard_(net, mesh_of("sharded"))
    return net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def _save(rank: int, folder: str) -> None:
    net, optimizer = _build()
    _train(net, optimizer, rank, range(5))
    dcp.save(_state(net, optimizer), checkpoint_id=folder)


def _load(rank: int, folder: str) -> dict[str, Any]:
    net, optimizer = _build(seed=99)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    state = _state(net, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    depth = sd.controller(net)
    depth.load_state_dict(state["gates"])
    _train(net, optimizer, rank, range(5, 10))
    return {
        "state": {name: value.full_tensor() for name, value in get_model_state_dict(net).items()},
        "gates": depth.state_dict(),
    }


def test_a_checkpoint_of_four_ranks_resumes_on_two_with_the_same_gates(tmp_path: Path) -> None:
    ranks.run(_save, 4, str(tmp_path))
    first, second = ranks.run(_load, 2, str(tmp_path))
    alone = build("mlp")
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    for step in range(10):
        inputs, labels = batch("mlp", 8, step)
        F.cross_entropy(alone(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    for of_rank in (first, second):
        assert_equal_to_rounding(of_rank["state"], alone.state_dict())
        assert of_rank["gates"] == sd.controller(alone).state_dict()
    assert len(SURVIVAL_PROBS) == len(sd.controller(alone).names)
