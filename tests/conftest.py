"""Shared by all tests: two operator schemas that torchvision needs with a CPU build of PyTorch, and GPU tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import torchvision_schemas  # noqa: F401 -- torchvision's wheels register operators from CUDA libraries

sys.path.pop(0)

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without one; benchmarks/reproduction_gpu.py runs them on one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
