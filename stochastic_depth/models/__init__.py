"""The paper's plain networks. They know nothing of gates."""

from stochastic_depth.models.cifar_resnet import CifarResNet, cifar_resnet

__all__ = ["CifarResNet", "cifar_resnet"]
