"""The processes that train together, as torchrun has started them; a single one where it has not."""

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Processes:
    """This process among those that train together. The first one alone reads and writes the run folder."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""
    control: Any = None
    """Group of all processes for what is agreed on the CPU, so that no GPU is waited for."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def from_first(self, function: Callable[[], Value]) -> Value:
        """What `function` returns, or raises, in the first process; the others do not call it.

        Raises:
            ValueError: and other errors of input or disk, in every process, so that none waits for one that has ended.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except (ValueError, ArithmeticError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process; every process must ask."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def wrapped(self, model: nn.Module, device: torch.device, *, synchronise_batch_norm: bool) -> nn.Module:
        """The model as it is to be trained: in DistributedDataParallel where there are several processes.

        Raises:
            ValueError: if BatchNorm is to be synchronised on CPUs.
        """
        if self.size == 1:
            return model
        if synchronise_batch_norm:
            if device.type != "cuda":
                raise ValueError("recipe.batch_norm is synchronised, which PyTorch does on GPUs only: use local.")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: BatchNorm's running statistics, before an evaluation."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def place() -> tuple[int, int]:
    """Number of this process and how many torchrun has started; (0, 1) where it has not."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int | None:
    """Number of this process on its machine, None where torchrun has not started it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def joined(device: torch.device) -> Generator[Processes]:
    """Within, this process is one of those that torchrun has started, over NCCL on GPUs and gloo on CPUs.

    Once per process: a second group would find the addresses of the first.
    """
    if place()[1] == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = _meet()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def wait_for_all(stop_requested: Callable[[], bool]) -> None:
    """Wait until all processes that torchrun has started have come here, each from its own work, or a stop is asked."""
    if place()[1] == 1:
        return
    store, rank, size = _meet()
    store.set(f"done {rank}", "")
    while not stop_requested() and not store.check([f"done {other}" for other in range(size)]):
        time.sleep(_LOOK_EVERY_S)


def _meet() -> tuple[dist.Store, int, int]:
    """Where the processes find each other, the number of this one, and how many there are."""
    store, rank, size = next(iter(rendezvous("env://")))
    # torchrun keeps its store over restarts: without a prefix of their own, processes that are started anew would find
    # the addresses of those before them, and wait for them.
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, size
