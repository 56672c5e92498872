"""What people train with, around a retrofitted model: mixed precision and its scaler, averaged copies, accumulation."""

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import stochastic_depth as sd


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=48, num_classes=5, drop_path_rate=0.5
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_gradient_scaler_scales_and_unscales_what_was_skipped_too() -> None:
    model = vit()
    sd.make_stochastic_(model)
    reference = copy.deepcopy(model)
    reference(images()).square().sum().backward()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(images()).square().sum()).backward()
    scaler.unscale_(optimiser)
    assert_close(gradients(model), gradients(reference))
    scaler.step(optimiser)
    scaler.update()


def test_autocast_runs_the_branches_in_its_precision() -> None:
    model = vit()
    depth = sd.make_stochastic_(model)
    kinds: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith("mlp.fc1"):
            module.register_forward_hook(lambda _m, _i, output: kinds.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    output.float().sum().backward()
    assert kinds == {torch.bfloat16}
    assert depth.last_gates is not None
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("average", [AveragedModel, ModelEmaV3], ids=["torch", "timm"])
def test_an_averaged_copy_has_a_controller_of_its_own_and_evaluates_like_the_model(average: type[nn.Module]) -> None:
    model = vit()
    depth = sd.make_stochastic_(model)
    averaged = average(model)
    assert sd.controller(averaged) is not depth
    model(images())
    assert sd.controller(averaged).state_dict()["counter"] == 0
    model.eval()
    averaged.eval()
    assert torch.equal(averaged(images()), model(images()))


def test_accumulated_gradients_are_the_sum_of_those_of_the_micro_batches() -> None:
    model = vit()
    depth = sd.make_stochastic_(model)
    state = depth.state_dict()
    for part in images().chunk(2):
        model(part).square().sum().backward()
    accumulated = gradients(model)
    depth.load_state_dict(state)
    parts: list[dict[str, Tensor]] = []
    for part in images().chunk(2):
        model.zero_grad()
        model(part).square().sum().backward()
        parts.append(gradients(model))
    assert_close(accumulated, {name: parts[0][name] + parts[1][name] for name in accumulated})


@pytest.mark.skip(reason="open: these drop paths are masked, not skipped; the cause is in print(depth)")
@pytest.mark.parametrize("name", ["resnest14d", "efficientvim_m1", "coat_tiny"])
def test_every_drop_path_of_timm_is_really_skipped(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.2)
    assert sd.make_stochastic_(model).masked == []


@pytest.mark.skip(reason="open: b * (1 - p) < 1 should fall back to the mask by the static rule of the design")
def test_a_subset_that_cannot_pay_is_masked() -> None:
    model = vit()
    depth = sd.make_stochastic_(model, [0.99] * 8, granularity="sample")
    model(images(2))
    assert "mask" in str(depth)
