"""The plain version: one process, the whole batch, gates drawn as DESIGN.md defines them and forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ranks  # noqa: F401 -- finds reference.py
import torch
import torch.nn.functional as F
from reference import conv_net, images, mlp, vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.gates import draw_counts, draw_order

NUM_STEPS, SEED = 4, 7
SURVIVAL_PROBS = [0.8, 0.3, 0.5, 0.4]


def build(name: str, *, sync_batch_norm: bool = False, checkpointing: bool | str = False, **options: Any) -> nn.Module:
    """A stochastic network in float64, the same on every rank."""
    if name == "vit":
        net = _vit()
        options = {"granularity": "batch", **options}
    else:
        net = mlp() if name == "mlp" else conv_net(batch_norm=sync_batch_norm)
        options["schedule"] = SURVIVAL_PROBS
    sd.make_stochastic_(net, seed=SEED, **options)
    if checkpointing and name == "vit":
        net.set_grad_checkpointing(True)
    elif checkpointing:
        for block in net.blocks:
            block.forward = _checkpointed(block.forward, reentrant=checkpointing == "reentrant")
    return net


def _checkpointed(forward: Any, *, reentrant: bool) -> Any:
    return lambda x: checkpoint(forward, x, use_reentrant=reentrant)


def _vit() -> nn.Module:
    import timm  # only where it is used: each process imports for itself

    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=3, embed_dim=12, num_heads=2, num_classes=4,
        drop_path_rate=0.6, init_values=0.5,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net.double()


def batch(name: str, num_samples: int, step: int) -> tuple[Tensor, Tensor]:
    inputs = (vectors if name == "mlp" else images)(num_samples, seed=step)
    num_classes = 3 if name == "mlp" else 4
    return inputs, torch.randint(num_classes, (num_samples,), generator=torch.Generator().manual_seed(step))


def share(tensor: Tensor, rank: int, sizes: Sequence[int]) -> Tensor:
    return tensor.split(list(sizes))[rank]


def gates_of(depth: sd.Controller, counter: int, num_samples: int, rank: int | None = None, **options: Any) -> list:
    """The gates of a draw as DESIGN.md defines them: counts agreed, samples by rank, or one gate for all by rank."""
    if depth._passes.granularity == "batch":
        counts = draw_counts(depth.survival_probs, 1, seed=SEED, counter=counter, rank=rank)
        return [bool(count) for count in counts]
    counts = draw_counts(depth.survival_probs, num_samples, seed=SEED, counter=counter)
    order = draw_order(len(counts), num_samples, seed=SEED, counter=counter, rank=rank)
    masks = torch.zeros(len(counts), num_samples, dtype=torch.bool)
    for mask, row, count in zip(masks, order, counts, strict=True):
        mask[row[:count]] = True
    return list(masks)


def micro_batches(step: int, *, accumulate: bool) -> list[int]:
    return [10 * step, 10 * step + 1] if accumulate else [10 * step]


def train_alone(
    name: str, sizes: Sequence[int], *, accumulate: bool = False, whole: bool = True, **options: Any
) -> dict[str, Tensor]:
    """The plain version: one process, forced gates; the whole batch at once, or one rank's part after the other."""
    decorrelated = options.get("ranks") == "decorrelate"
    net = build(name, **options)
    depth = sd.controller(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    counter = 0
    for step in range(NUM_STEPS):
        micro = micro_batches(step, accumulate=accumulate)
        for index in micro:
            inputs, labels = batch(name, sum(sizes), index)
            gates = [gates_of(depth, counter, n, r if decorrelated else None) for r, n in enumerate(sizes)]
            counter += 1
            if whole:
                joined = gates[0]
                if depth._passes.granularity == "sample":
                    joined = [torch.cat(masks) for masks in zip(*gates, strict=True)]
                with depth.gates(joined):
                    (F.cross_entropy(net(inputs), labels) / len(micro)).backward()
                continue
            for rank in range(len(sizes)):
                with depth.gates(gates[rank]):
                    outputs = net(share(inputs, rank, sizes))
                (F.cross_entropy(outputs, share(labels, rank, sizes)) / len(micro) / len(sizes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def assert_equal_to_rounding(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def train_alone_with_batch_norm(sizes: Sequence[int]) -> dict[str, Tensor]:
    net = conv_net()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, seed=SEED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for step in range(NUM_STEPS):
        inputs, labels = batch("conv_net", sum(sizes), 10 * step)
        with depth.gates(gates_of(depth, step, sum(sizes))):
            F.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()
