"""One small model per block class of timm: equal to the original under the same masks, and nothing runs when closed."""

import pytest
import timm
import torch
from masked import assert_equals_original_under_mask, awake, calls_when_closed

import stochastic_depth as sd

SIZE = {"img_size": 32}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {**SIZE, "patch_size": 8, "depth": 3}, 32),
    "vit_layer_scale": ("deit3_small_patch16_224", {**SIZE, "patch_size": 8, "depth": 2}, 32),
    "swin": ("swin_tiny_patch4_window7_224", {**SIZE, "window_size": 4, "embed_dim": 24, "depths": (2, 2)}, 32),
    "cait": ("cait_xxs24_224", {**SIZE, "patch_size": 8, "depth": 2}, 32),
    "beit": ("beit_base_patch16_224", {**SIZE, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4}, 32),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, 32),
    "resnet": ("resnet18", {}, 32),
}


def small(case: str, rate: float = 0.5) -> torch.nn.Module:
    name, options, _ = MODELS[case]
    torch.manual_seed(0)
    return timm.create_model(name, drop_path_rate=rate, num_classes=3, **options)


@pytest.mark.parametrize("case", MODELS)
def test_equals_the_original_under_the_same_mask(case: str) -> None:
    inputs = [torch.randn(4, 3, MODELS[case][2], MODELS[case][2], dtype=torch.float64)]
    depth = assert_equals_original_under_mask(lambda: small(case), inputs)
    assert all(branch.treatment == "skip" for branch in depth._branches), depth


@pytest.mark.parametrize("case", MODELS)
def test_a_closed_gate_calls_nothing(case: str) -> None:
    model = awake(small(case)).train()
    depth = sd.make_stochastic_(model)
    inputs = [torch.randn(2, 3, MODELS[case][2], MODELS[case][2], dtype=torch.float64)]
    assert calls_when_closed(model, depth, inputs) == []
