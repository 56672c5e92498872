"""What every test shares: the two operator schemas that torchvision needs beside a CPU build of PyTorch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import torchvision_schemas  # noqa: F401 -- torchvision's wheels register operators from CUDA libraries

sys.path.pop(0)
