"""Makes existing models stochastic in place: finds branches, swaps classes, and restores the original."""

from stochastic_depth.retrofit.apply import controller, make_stochastic_, restore_
from stochastic_depth.retrofit.controller import Controller, Verification
from stochastic_depth.retrofit.early_exit import (
    early_exit_loss,
    early_exit_losses,
    early_exit_weights,
    rotating_exits,
)
from stochastic_depth.retrofit.rules import DropPathRule, register_drop_path
from stochastic_depth.retrofit.running.block_branches import MaskedBranchWarning

__all__ = [
    "Controller",
    "DropPathRule",
    "MaskedBranchWarning",
    "Verification",
    "controller",
    "early_exit_loss",
    "early_exit_losses",
    "early_exit_weights",
    "make_stochastic_",
    "register_drop_path",
    "restore_",
    "rotating_exits",
]
