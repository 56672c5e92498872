"""Import this before torchvision or timm: a CPU build of PyTorch lacks two operators of torchvision's wheels."""

import importlib.util
from pathlib import Path

import torch


def _registers_itself() -> bool:
    """Whether torchvision's own library can be loaded: it defines the operators, which must not be defined twice."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return False
    try:
        for library in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


if not _registers_itself():
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        _LIBRARY.define(_schema)
