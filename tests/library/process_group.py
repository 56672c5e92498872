"""A process group of this process alone."""

import contextlib
import time
from collections.abc import Generator

import torch.distributed as dist


@contextlib.contextmanager
def group_of_one(device: str = "cpu") -> Generator[None]:
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        # Gloo's threads release what the last reduction holds, and wait for Python's lock, which the next line keeps
        # while it waits for them.
        time.sleep(0.2)
        dist.destroy_process_group()
