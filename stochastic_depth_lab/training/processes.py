"""The processes that train together, as torchrun started them; a single one without torchrun."""

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
_POLL_S = 0.2


@dataclass(frozen=True)
class Processes:
    """This process among those that train together. Only rank 0 reads and writes the run folder."""

    rank: int = 0
    size: int = 1
    """Number of processes."""
    control: Any = None
    """A group of all processes that communicates on the CPU, so that nothing waits for a GPU."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def on_rank_zero(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 and return its result on every rank.

        Raises:
            ValueError: and other input or disk errors, on every rank, so that no rank waits for one that has ended.
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
        """Whether the flag is true on any rank. Every rank must call it."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def wrapped(self, model: nn.Module, device: torch.device, *, synchronize_batch_norm: bool) -> nn.Module:
        """The model to train: in DistributedDataParallel if there are several processes.

        Raises:
            ValueError: if BatchNorm is to be synchronized on CPUs.
        """
        if self.size == 1:
            return model
        if synchronize_batch_norm:
            if device.type != "cuda":
                raise ValueError("recipe.batch_norm is synchronized, which PyTorch supports on GPUs only: use local.")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0, BatchNorm's running statistics, to all ranks, before an evaluation."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def rank_and_size() -> tuple[int, int]:
    """Rank of this process and number of processes that torchrun started; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int | None:
    """Rank of this process on its machine; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def joined(device: torch.device) -> Generator[Processes]:
    """Join the processes that torchrun started, over NCCL on GPUs and gloo on CPUs.

    Once per process: a second group would find the addresses of the first.
    """
    if rank_and_size()[1] == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = _rendezvous()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def wait_for_all(stop_requested: Callable[[], bool]) -> None:
    """Wait until all processes that torchrun started have called this, or a stop is requested."""
    if rank_and_size()[1] == 1:
        return
    store, rank, size = _rendezvous()
    store.set(f"done {rank}", "")
    while not stop_requested() and not store.check([f"done {other}" for other in range(size)]):
        time.sleep(_POLL_S)


def _rendezvous() -> tuple[dist.Store, int, int]:
    """The store through which the processes find each other, the rank, and the number of processes."""
    store, rank, size = next(iter(rendezvous("env://")))
    # torchrun keeps its store over restarts: without a new prefix, restarted processes would wait for the addresses of
    # their predecessors.
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, size
