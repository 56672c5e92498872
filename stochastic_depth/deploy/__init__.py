"""After training: plain weights, smaller networks, and what a network does not know."""

from stochastic_depth.deploy.fold import convert_rescale_, fold_
from stochastic_depth.deploy.subnetwork import subnetwork

__all__ = ["convert_rescale_", "fold_", "subnetwork"]
