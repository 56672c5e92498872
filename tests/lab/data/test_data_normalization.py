"""Both normalizations against numpy in float64."""

import numpy as np
import pytest
import torch

from stochastic_depth_lab.data import DataError, Normalization


@pytest.fixture
def images() -> torch.Tensor:
    """2,500 images: more than two chunks, and not a multiple of one."""
    return torch.randint(0, 256, (2500, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixel_is_a_mean_image_and_one_deviation_of_all_bytes(images: torch.Tensor) -> None:
    fitted, values = Normalization.fit(images, "pixel"), images.double().numpy()
    assert fitted.mean.shape == (1, 3, 4, 6)
    assert fitted.std.numel() == 1
    np.testing.assert_array_equal(fitted.mean.numpy(), values.mean(0, keepdims=True).astype(np.float32))
    np.testing.assert_array_equal(fitted.std.item(), np.float32(values.std(ddof=1)))


def test_channel_is_a_mean_and_a_deviation_of_each_channel(images: torch.Tensor) -> None:
    images[:, 1] //= 3
    fitted, values = Normalization.fit(images, "channel"), images.double().numpy()
    assert fitted.mean.shape == fitted.std.shape == (1, 3, 1, 1)
    np.testing.assert_array_equal(fitted.mean.flatten().numpy(), values.mean((0, 2, 3)).astype(np.float32))
    np.testing.assert_array_equal(fitted.std.flatten().numpy(), values.std((0, 2, 3), ddof=1).astype(np.float32))


@pytest.mark.parametrize("kind", ["pixel", "channel"])
def test_what_it_was_fitted_on_gets_mean_0_and_deviation_about_1(images: torch.Tensor, kind: str) -> None:
    normalized = Normalization.fit(images, kind)(images)  # type: ignore[arg-type]
    assert normalized.dtype == torch.float32
    assert abs(float(normalized.double().mean())) < 1e-6
    assert abs(float(normalized.double().std()) - 1) < 1e-3


def test_sums_do_not_overflow() -> None:
    """The squares at one pixel of 40,000 white images sum up to more than 2**31."""
    images = torch.full((40_000, 1, 2, 2), 255, dtype=torch.uint8)
    images[::2] = 254
    values = images.double().numpy()
    assert Normalization.fit(images, "pixel").std.item() == pytest.approx(values.std(ddof=1), rel=1e-6)


def test_state_is_plain_tensors_and_comes_back(images: torch.Tensor) -> None:
    fitted = Normalization.fit(images, "pixel")
    again = Normalization.from_state_dict(fitted.state_dict())
    assert torch.equal(again(images[:10]), fitted(images[:10]))


def test_constant_images_are_refused() -> None:
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    images[:, 0] = torch.arange(5, dtype=torch.uint8).view(5, 1, 1)
    Normalization.fit(images, "pixel")
    with pytest.raises(DataError, match="constant"):
        Normalization.fit(images, "channel")


def test_unknown_kind_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one of pixel, channel, but is 'image'"):
        Normalization.fit(images, "image")  # type: ignore[arg-type]
