"""Real processes that train together over gloo, and what each of them returns."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.multiprocessing import start_processes

# reference.py and benchmarks/traffic.py: the forked server does not have pytest's path.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[3] / "benchmarks")]

_TIMEOUT = timedelta(seconds=60)
"""Turns a hang into an error of the waiting collective."""


def run(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each rank of a gloo group: plain data and tensors."""
    # The server imports PyTorch once; every process is a fresh fork of it, without threads or groups.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.fsdp"])
    with TemporaryDirectory() as folder:
        arguments = (function, num_ranks, _free_port(), folder, args)
        start_processes(_on_rank, arguments, nprocs=num_ranks, start_method="forkserver")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(num_ranks)]


def _on_rank(
    rank: int, function: Callable[..., Any], num_ranks: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    schemas = runpy.run_path(str(Path(__file__).parents[2] / "conftest.py"))  # what timm's import needs, kept alive
    assert schemas
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks, timeout=_TIMEOUT
    )
    torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class SyncBatchNorm(nn.SyncBatchNorm):
    """Synchronized batch normalization from its definition: PyTorch's own runs on accelerators only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.dim())]
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = all_reduce(torch.cat([count, x.sum(dims), x.square().sum(dims)]))
        total, mean, square = sums[0], *(sums[1:] / sums[0]).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
            self.num_batches_tracked += 1
        shape = (1, -1, *[1] * (x.dim() - 2))
        normal = (x - mean.view(shape)) * (var.view(shape) + self.eps).rsqrt()
        return normal * self.weight.view(shape) + self.bias.view(shape)


def synchronize_batch_norm_(net: nn.Module) -> None:
    """Make batch normalization synchronized, in place, after wrapping: DDP refuses a CPU model that has it before."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
