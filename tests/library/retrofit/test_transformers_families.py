"""Vision families of transformers with drop paths, small: equal to the original under the same masks."""

import pytest
import torch
import transformers
from masked import assert_equals_original_under_mask, awake

import stochastic_depth as sd

RATE = {"drop_path_rate": 0.5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
PYRAMID = {"depths": [2, 2, 2, 2], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4]}
FAMILIES = {
    "Beit": {**VIT, **NO_DROPOUT, "patch_size": 8, "use_mask_token": False},
    "Data2VecVision": {**VIT, **NO_DROPOUT, "patch_size": 8},
    "Dinov2": {**VIT, **NO_DROPOUT, "patch_size": 8},
    "Dinov2WithRegisters": {**VIT, **NO_DROPOUT, "patch_size": 8},
    "DINOv3ViT": {**VIT, "patch_size": 8, "pos_embed_rescale": None},
    "ConvNext": {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 8, 16, 16], "image_size": 32},
    "ConvNextV2": {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 8, 16, 16], "image_size": 32},
    "Swin": {**SWIN, **NO_DROPOUT},
    "Swinv2": {**SWIN, **NO_DROPOUT},
    "FocalNet": {"embed_dim": 16, "depths": [1, 2], "focal_levels": [2, 2], "focal_windows": [3, 3], "image_size": 32},
    "Segformer": {
        "depths": [1, 2, 1, 1],
        "hidden_sizes": [8, 16, 16, 32],
        "num_attention_heads": [1, 2, 2, 4],
        **NO_DROPOUT,
    },
    "Pvt": {**PYRAMID, **NO_DROPOUT, "image_size": 64},
    "PvtV2": {**PYRAMID, **NO_DROPOUT, "image_size": 64},
    "PoolFormer": {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 16, 32]},
    "Hiera": {
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "image_size": [32, 32],
        "masked_unit_size": [4, 4],
        "query_stride": [2, 2],
        "num_query_pool": 1,
    },
}
SIZES = {"Segformer": 64, "Pvt": 64, "PvtV2": 64, "PoolFormer": 64}


def small(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**RATE, **FAMILIES[family])
    config._attn_implementation = "eager"
    return getattr(transformers, f"{family}Model")(config)


def images(family: str, num: int = 4) -> torch.Tensor:
    size = SIZES.get(family, 32)
    return torch.randn(num, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_original_under_the_same_mask(family: str) -> None:
    depth = assert_equals_original_under_mask(lambda: small(family), [images(family)])
    assert depth.masked == []


def test_a_drop_path_inside_of_a_dropped_branch_is_reached_only_with_it() -> None:
    model = awake(small("PoolFormer")).train()
    depth = sd.make_stochastic_(model)
    assert depth.masked == []
    model(images("PoolFormer")).last_hidden_state.sum().backward()
    assert depth.last_gates is not None
