"""Horizontal flip and translation with zero fill, one batch at a time, on its device."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Shift each image by up to `translation` pixels in both directions, then flip it with probability 1/2.

    The border is filled with 0. The images are *normalized* first, as in the authors' code (`cifar-dataset.lua`), so
    the fill is the mean color, not black. With `translation=4` this is the usual "pad 4, random crop, random flip".

    Drawing is separate from applying: an epoch's draws are made up front, and a run can start in the middle of it.

    Args:
        translation: largest shift in pixels, at least 0; each of its 2 * translation + 1 values is equally likely.
        flip: whether to flip. Do not flip digits.

    Raises:
        ValueError: if `translation` is negative.

    Example:
        >>> image = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).view(1, 1, 2, 3)
        >>> Augmentation(translation=1)(image, torch.tensor([[1, 0, 0]])).tolist()  # down by one
        [[[[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]]]
        >>> Augmentation(translation=1)(image, torch.tensor([[0, 1, 1]])).tolist()  # right by one, then flipped
        [[[[2.0, 1.0, 0.0], [5.0, 4.0, 0.0]]]]
    """

    translation: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.translation < 0:
            raise ValueError(f"translation must be at least 0 pixels, but is {self.translation}.")

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """For each image: shift down, shift right, flipped (1) or not (0); int64, (num_images, 3), CPU."""
        shifts = torch.randint(-self.translation, self.translation + 1, (num_images, 2), generator=generator)
        flips = torch.randint(0, 1 + self.flip, (num_images, 1), generator=generator)
        return torch.cat([shifts, flips], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augmented images.

        Args:
            images: normalized, (N, C, H, W).
            draws: rows of `draw`, (N, 3), on the device of the images.
        """
        num_images, num_channels, height, width = images.shape
        padded = F.pad(images, [self.translation] * 4)
        down, right, flipped = draws.split(1, dim=1)
        columns = torch.arange(width, device=images.device)
        from_rows = torch.arange(height, device=images.device) + (self.translation - down)
        from_columns = torch.where(flipped.bool(), columns.flip(0), columns) + (self.translation - right)
        # One gather by flat index shifts and flips. On a CPU it is faster than unfold and than slices (RESULTS.md).
        sources = from_rows[:, :, None] * padded.shape[3] + from_columns[:, None, :]
        sources = sources.view(num_images, 1, height * width).expand(-1, num_channels, -1)
        return padded.flatten(2).gather(2, sources).view(images.shape)
