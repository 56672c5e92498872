"""Makes an existing model stochastic in place: finds its branches, swaps their classes, and undoes it."""

from stochastic_depth.retrofit.apply import controller, make_stochastic_, restore_
from stochastic_depth.retrofit.controller import Controller, Verification

__all__ = ["Controller", "Verification", "controller", "make_stochastic_", "restore_"]
