"""Stochastic depth (Huang et al. 2016) for residual networks, with every dropped branch really skipped."""
