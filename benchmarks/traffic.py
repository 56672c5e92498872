"""Bytes that a training step sends between ranks with one FSDP2 unit per branch, measured and computed.

    torchrun --nproc-per-node 2 benchmarks/traffic.py

The paper's network, batch granularity, p_L = 0.5. Every collective is hooked and its bytes are added up; "by hand" is
the sum over the open branches and the rest, from the shapes of the parameters. Writes benchmarks/tables/traffic.md.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from protocol import write_table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import stochastic_depth as sd


@contextlib.contextmanager
def counted_bytes() -> Generator[dict[str, int]]:
    """Bytes that go into collectives of more than one rank: gathered, scattered after a sum, summed."""
    sent = {"gathered": 0, "scattered": 0, "summed": 0}
    # PyTorch has renamed the two that FSDP2 uses: the older name, the newer one.
    kinds = {
        "all_gather_into_tensor": ("gathered", 0, "output_tensor"),
        "all_gather_single": ("gathered", 0, "output_tensor"),
        "reduce_scatter_tensor": ("scattered", 1, "input"),
        "reduce_scatter_single": ("scattered", 1, "input"),
        "all_reduce": ("summed", 0, "tensor"),
    }
    plain = {name: getattr(dist, name) for name in kinds if hasattr(dist, name)}
    inside = [False]

    def counting(name: str) -> Any:
        kind, place, keyword = kinds[name]

        def collective(*args: Any, **kwargs: Any) -> Any:
            tensor = args[place] if len(args) > place else kwargs[keyword]
            if dist.get_world_size(kwargs.get("group")) > 1 and not inside[0]:
                sent[kind] += tensor.numel() * tensor.element_size()
            inside[0] = True  # one may call the other
            try:
                return plain[name](*args, **kwargs)
            finally:
                inside[0] = False

        return collective

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def unit_bytes(net: nn.Module, num_shards: int) -> tuple[list[int], int]:
    """Bytes of each branch and of the rest; FSDP2 pads each parameter to a multiple of the shards."""

    def padded(parameter: Tensor) -> int:
        rows = math.ceil(parameter.shape[0] / num_shards) * num_shards
        return rows * parameter[0].numel() * parameter.element_size()

    branches = [module.branch for module in net.modules() if isinstance(module, sd.Residual)]
    sizes = [sum(map(padded, branch.parameters())) for branch in branches]
    return sizes, sum(map(padded, net.parameters())) - sum(sizes)


def measure(num_layers: int, num_steps: int, *, replicated: bool) -> tuple[float, float, float, int]:
    """Means over the steps: bytes sent, bytes by hand, bytes if all were open; and in how many steps they differ."""
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(num_layers)
    world = dist.get_world_size()
    branches, rest = unit_bytes(net, 1 if replicated else world)
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5))
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")) if replicated else None
    sd.shard_(net, mesh or init_device_mesh("cpu", (world,)))
    # Replicated: gradients are summed. Sharded: gathered before forward and backward, and scattered.
    times = 1 if replicated else 3
    sent_in_all = by_hand_in_all = different = 0
    for step in range(num_steps):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        with counted_bytes() as sent:
            net(images).square().mean().backward()
        gates = depth.last_gates or []
        of_open = sum(size for size, gate in zip(branches, gates, strict=True) if gate)
        by_hand = times * of_open + (1 if replicated else 2) * rest
        sent_in_all += sum(sent.values())
        by_hand_in_all += by_hand
        different += sum(sent.values()) != by_hand
        net.zero_grad()
    everything = times * sum(branches) + (1 if replicated else 2) * rest
    return sent_in_all / num_steps, by_hand_in_all / num_steps, everything, different


def main() -> None:
    """Measure both ways and write the table on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-layers", type=int, default=110)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for name, replicated in (("sharded (FSDP2)", False), ("replicated (HSDP, shard size 1)", True)):
        sent, by_hand, everything, different = measure(options.num_layers, options.steps, replicated=replicated)
        share = f"{sent / everything:.3f}"
        rows.append([name, f"{sent:,.0f}", f"{by_hand:,.0f}", f"{everything:,}", share, f"{different}"])
    if dist.get_rank() == 0:
        write_table(
            "traffic",
            f"Bytes sent per step and rank, ResNet-{options.num_layers}, p_L = 0.5, fp32",
            ["way", "sent (mean)", "by hand (mean)", "all branches open", "share", "steps that differ from by hand"],
            rows,
            f"By torchrun with {dist.get_world_size()} ranks over gloo. n = {options.steps} steps.",
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
