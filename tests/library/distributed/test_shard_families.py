"""One FSDP2 unit per branch in other libraries' networks: correct, and a closed branch sends nothing.

The parameters of a branch are determined without the library: those without a gradient when only this branch is closed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from plain_training import assert_equal_to_rounding
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from traffic import counted_bytes

import stochastic_depth as sd

RATE = 0.6
NUM_STEPS = 3


def _timm_convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=RATE, num_classes=4)


def _timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4}
    return SwinTransformer(**sizes, drop_path_rate=RATE, num_classes=4)


def _timm_resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 8, 16, 16), drop_path_rate=RATE, num_classes=4)


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 8, [2, 1], [2, 4], [4, 4], stochastic_depth_prob=RATE, num_classes=4)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], RATE, num_classes=4)


def _transformers(family: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = getattr(transformers, f"{family}Config")(**sizes, **no_dropout, drop_path_rate=RATE, image_size=32)
        return getattr(transformers, f"{family}Model")(config)

    return build


# For each network the parameters that its blocks hold by themselves: no module of them can be made a unit.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "timm ConvNeXt": (_timm_convnext, ("gamma",)),
    "timm Swin": (_timm_swin, ()),
    "timm ResNet": (_timm_resnet, ()),
    "torchvision Swin": (_torchvision_swin, ()),
    "torchvision ConvNeXt": (_torchvision_convnext, ("layer_scale",)),
    "transformers Dinov2": (
        _transformers("Dinov2", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8), (),
    ),
    "transformers Swin": (
        _transformers("Swin", embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, patch_size=2), (),
    ),
}  # fmt: skip


def _build(family: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = FAMILIES[family][0]().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)  # gains of zero would hide a branch
    sd.make_stochastic_(net, granularity="batch", seed=3, **options)
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # frozen statistics: halves of a batch are the batch
    return net


def _backward(net: nn.Module, images: Tensor) -> None:
    outputs = net(images)
    (outputs if isinstance(outputs, Tensor) else outputs[0]).square().mean().backward()


def _images(step: int) -> Tensor:
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def _names_with_gradient(net: nn.Module, gates: list[bool]) -> set[str]:
    with sd.controller(net).gates(gates):
        _backward(net, _images(0))
    names = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    net.zero_grad()
    return names


def _branches_and_rest(family: str, num_shards: int) -> tuple[list[int], int]:
    """Bytes of each branch and of the rest, each parameter padded to a multiple of the shards."""
    net = _build(family, skipped_grad="none")
    num_branches = len(sd.controller(net).names)
    used = _names_with_gradient(net, [True] * num_branches)
    sizes = {
        name: 8 * math.ceil(parameter.shape[0] / num_shards) * num_shards * parameter[0].numel()
        for name, parameter in net.named_parameters()
        if name in used
    }
    closed = [used - _names_with_gradient(net, [i != j for j in range(num_branches)]) for i in range(num_branches)]
    branches = [sum(sizes[name] for name in names if not name.endswith(FAMILIES[family][1])) for names in closed]
    return branches, sum(sizes.values()) - sum(branches)


def _train(rank: int, family: str) -> dict[str, Any]:
    plain = _build(family)
    net = copy.deepcopy(plain)
    branches, rest = _branches_and_rest(family, 2)
    sd.shard_(net, init_device_mesh("cpu", (2,)))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.02, momentum=0.9) for each in (plain, net)]
    steps = []
    for step in range(NUM_STEPS):
        _backward(plain, _images(step))
        with counted_bytes() as sent:
            _backward(net, _images(step)[2 * rank : 2 * rank + 2])
        steps.append((sent, sd.controller(net).last_gates))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = {name: value.full_tensor() for name, value in dict(net.named_parameters()).items()}
    return {
        "state": state,
        "plain": dict(plain.named_parameters()),
        "steps": steps,
        "branches": branches,
        "rest": rest,
        "all": sum(8 * parameter.numel() for parameter in plain.parameters()),
    }


def _train_all(rank: int) -> dict[str, dict[str, Any]]:
    return {family: _train(rank, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def trained() -> list[dict[str, dict[str, Any]]]:
    return ranks.run(_train_all, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_foreign_network_sends_its_open_branches_and_the_rest(
    family: str, trained: list[dict[str, dict[str, Any]]]
) -> None:
    num_closed = 0
    for of_rank in trained:
        result = of_rank[family]
        assert min(result["branches"]) > 0
        for sent, gates in result["steps"]:
            of_open = sum(size for size, gate in zip(result["branches"], gates, strict=True) if gate)
            assert sent["scattered"] == result["rest"] + of_open
            assert sent["summed"] == 0
            # Parameters that this loss does not use are still gathered with the rest.
            assert sent["gathered"] >= result["rest"] + 2 * of_open
            num_closed += gates.count(0)
    assert num_closed


@pytest.mark.parametrize("family", FAMILIES)
def test_two_sharded_processes_train_a_foreign_network_as_one(
    family: str, trained: list[dict[str, dict[str, Any]]]
) -> None:
    for of_rank in trained:
        assert_equal_to_rounding(of_rank[family]["state"], of_rank[family]["plain"])
