"""One thread for the small tensors of these tests, unless OMP_NUM_THREADS asks for more: more would be slower."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch


@pytest.fixture(autouse=True)
def _few_threads() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)
