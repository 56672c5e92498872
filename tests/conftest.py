"""What every test shares: the two operator schemas that torchvision needs beside a CPU build of PyTorch."""

import torch

# torchvision's wheels register these operators from CUDA libraries; without them `import torchvision` (and timm) fails.
_SCHEMAS = torch.library.Library("torchvision", "DEF")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    if not hasattr(torch.ops.torchvision, _schema.split("(")[0]):
        _SCHEMAS.define(_schema)
