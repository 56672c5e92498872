"""Weak scaling: a training step with the same number of images per process, on one process and on several.

    torchrun --nproc-per-node 1 benchmarks/weak_scaling.py
    torchrun --nproc-per-node 2 benchmarks/weak_scaling.py

Constant and stochastic depth, interleaved, by DistributedDataParallel and, for the latter, replicated by `shard_`.
Prints medians of wall-clock and process time per step of the first rank, and the shortest step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from protocol import shuffled_rounds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

_NUM_WARM_UP = 2


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A training step on images of this rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    images, labels = torch.randn(options.batch_size, 3, 32, 32), torch.randint(10, (options.batch_size,))
    nets = [sd.models.cifar_resnet(56) for _ in range(3)]
    for net in nets[1:]:
        sd.make_stochastic_(net, sd.linear_decay(0.5))
    sharded = sd.shard_(nets[2], init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")))
    models = {
        "constant depth, DDP": DistributedDataParallel(nets[0]),
        "stochastic depth, DDP": DistributedDataParallel(nets[1]),
        "stochastic depth, shard_": sharded,
    }
    steps = {name: stepper(model, images, labels) for name, model in models.items()}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    process: dict[str, list[float]] = {name: [] for name in steps}
    for name in shuffled_rounds(steps, rounds=options.rounds + _NUM_WARM_UP):  # in the same order on every rank
        dist.barrier()
        begin, begin_process = time.perf_counter(), time.process_time()
        steps[name]()
        wall[name].append(time.perf_counter() - begin)
        process[name].append(time.process_time() - begin_process)
    if dist.get_rank() == 0:
        for name in steps:
            of_wall, of_process = (1000 * statistics.median(times[name][_NUM_WARM_UP:]) for times in (wall, process))
            shortest = 1000 * min(wall[name][_NUM_WARM_UP:])
            print(f"| {world} | {name} | {of_wall:.0f} | {of_process:.0f} | {shortest:.0f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
