"""Stochastic depth (Huang et al. 2016) for residual networks, with every dropped branch really skipped."""

from stochastic_depth import models
from stochastic_depth.deploy import (
    Prediction,
    convert_rescale_,
    fold_,
    monte_carlo,
    recalibrate_batchnorm_,
    subnetwork,
)
from stochastic_depth.distributed import shard_
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit import (
    Controller,
    DropPathRule,
    MaskedBranchWarning,
    Verification,
    controller,
    make_stochastic_,
    register_drop_path,
    restore_,
)
from stochastic_depth.schedules import (
    SCHEDULES,
    Schedule,
    convnext,
    efficientnet,
    expected_depth,
    linear_decay,
    timm,
    uniform,
)

__all__ = [
    "SCHEDULES",
    "Controller",
    "DropPathRule",
    "MaskedBranchWarning",
    "Prediction",
    "Residual",
    "Schedule",
    "Verification",
    "controller",
    "convert_rescale_",
    "convnext",
    "efficientnet",
    "expected_depth",
    "fold_",
    "linear_decay",
    "make_stochastic_",
    "models",
    "monte_carlo",
    "recalibrate_batchnorm_",
    "register_drop_path",
    "restore_",
    "shard_",
    "subnetwork",
    "timm",
    "uniform",
]
