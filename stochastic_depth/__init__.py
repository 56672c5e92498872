"""Stochastic depth (Huang et al. 2016) for residual networks. Dropped branches are skipped, not computed."""

import re

import torch

__version__ = "0.2.0"

_OLDEST = (2, 8)
# Compare the first two numbers only: builds such as 2.8.0a0+34c6371 count as 2.8.
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < _OLDEST:
    raise ImportError(
        f"stochastic-depth needs PyTorch {_OLDEST[0]}.{_OLDEST[1]} or newer, but {torch.__version__} is installed.",
        name=__name__,
    )

from stochastic_depth import models
from stochastic_depth.cost import Cost
from stochastic_depth.deploy import (
    Prediction,
    branches_to_keep,
    convert_rescale_,
    fold_,
    monte_carlo,
    recalibrate_batchnorm_,
    subnetwork,
)
from stochastic_depth.display import GateInfo
from stochastic_depth.distributed import shard_
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit import (
    Controller,
    DropPathRule,
    MaskedBranchWarning,
    Verification,
    controller,
    early_exit_loss,
    early_exit_losses,
    early_exit_weights,
    make_stochastic_,
    register_drop_path,
    restore_,
    rotating_exits,
)
from stochastic_depth.schedules import (
    SCHEDULES,
    LayerSchedule,
    Schedule,
    convnext,
    efficientnet,
    expected_depth,
    layerdrop,
    layerskip,
    linear_decay,
    progressive_layer_dropping,
    uniform,
)

# Not in __all__: `from stochastic_depth import *` must not hide the package timm.
from stochastic_depth.schedules import timm as timm

__all__ = [
    "SCHEDULES",
    "Controller",
    "Cost",
    "DropPathRule",
    "GateInfo",
    "LayerSchedule",
    "MaskedBranchWarning",
    "Prediction",
    "Residual",
    "Schedule",
    "Verification",
    "branches_to_keep",
    "controller",
    "convert_rescale_",
    "convnext",
    "early_exit_loss",
    "early_exit_losses",
    "early_exit_weights",
    "efficientnet",
    "expected_depth",
    "fold_",
    "layerdrop",
    "layerskip",
    "linear_decay",
    "make_stochastic_",
    "models",
    "monte_carlo",
    "progressive_layer_dropping",
    "recalibrate_batchnorm_",
    "register_drop_path",
    "restore_",
    "rotating_exits",
    "shard_",
    "subnetwork",
    "uniform",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__", "timm"]
