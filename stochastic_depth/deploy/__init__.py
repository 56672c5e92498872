"""After training: plain weights, smaller networks, and uncertainty estimates."""

from stochastic_depth.deploy.fold import convert_rescale_, fold_
from stochastic_depth.deploy.monte_carlo import Prediction, monte_carlo
from stochastic_depth.deploy.recalibrate import recalibrate_batchnorm_
from stochastic_depth.deploy.subnetwork import branches_to_keep, subnetwork

__all__ = [
    "Prediction",
    "branches_to_keep",
    "convert_rescale_",
    "fold_",
    "monte_carlo",
    "recalibrate_batchnorm_",
    "subnetwork",
]
