"""The augmentation on the device against the plain definition: one image, one pixel at a time."""

import pytest
import torch

from stochastic_depth_lab.data import Augmentation


def plain(image: torch.Tensor, down: int, right: int, flipped: int) -> torch.Tensor:
    """The authors' `sampleIndices`, word for word: a shift into zeros, then a flip."""
    _, height, width = image.shape
    moved = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[:, y, x] = image[:, y - down, x - right]
    if flipped:
        moved = torch.stack([moved[:, :, width - 1 - x] for x in range(width)], dim=2)
    return moved


def every_draw(translation: int) -> torch.Tensor:
    shifts = torch.arange(-translation, translation + 1)
    return torch.cartesian_prod(shifts, shifts, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("shape", "translation"), [((3, 9, 9), 4), ((2, 5, 8), 3), ((1, 4, 4), 4)], ids=["color", "oblong", "moved out"]
)
def test_every_shift_and_flip_equals_the_plain_definition(shape: tuple[int, ...], translation: int) -> None:
    draws = every_draw(translation)
    images = torch.randn(len(draws), *shape, generator=torch.Generator().manual_seed(0))
    augmented = Augmentation(translation=translation)(images, draws)
    expected = torch.stack([plain(image, *draw) for image, draw in zip(images, draws.tolist(), strict=True)])
    assert torch.equal(augmented, expected)


def test_pad_and_crop_is_the_same_thing() -> None:
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image, [4, 4, 4, 4])
    augmented = Augmentation()(image, torch.tensor([[3, -2, 0]]))
    assert torch.equal(augmented, padded[:, :, 1:33, 6:38])


def test_draws_are_uniform_over_all_shifts_and_flips() -> None:
    num_images = 162_000
    draws = Augmentation(translation=4).draw(num_images, torch.Generator().manual_seed(0))
    cells = ((draws[:, 0] + 4) * 9 + (draws[:, 1] + 4)) * 2 + draws[:, 2]
    counts = cells.bincount(minlength=162).double()
    chi_square = float(((counts - 1000).square() / 1000).sum())
    assert len(counts) == 162
    assert 110 < chi_square < 220  # 161 degrees of freedom: 161 +- 18, fixed seed


def test_without_flip_nothing_is_flipped() -> None:
    assert not Augmentation(flip=False).draw(1000, torch.Generator().manual_seed(0))[:, 2].any()


def test_no_translation_and_no_flip_changes_nothing() -> None:
    images = torch.randn(4, 1, 8, 8)
    augmentation = Augmentation(translation=0, flip=False)
    assert torch.equal(augmentation(images, augmentation.draw(4, torch.Generator())), images)


def test_negative_translation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 pixels, but is -1"):
        Augmentation(translation=-1)
