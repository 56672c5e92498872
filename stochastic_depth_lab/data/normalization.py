"""Bytes to network inputs: subtract a mean, divide by a standard deviation, both fitted on the training part only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stochastic_depth_lab.errors import DataError

Kind = Literal["pixel", "channel"]


@dataclass(frozen=True, eq=False)
class Normalization:
    """Normalizes images: (images - mean) / std, in float32.

    Args:
        mean: float32, in gray levels 0..255; broadcasts against (N, C, H, W).
        std: float32, likewise, positive.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, images: Tensor, kind: Kind) -> "Normalization":
        """The normalization of a training part.

        Args:
            images: uint8, (N, C, H, W).
            kind: `"pixel"`: a mean image, (1, C, H, W), and one standard deviation, of all bytes about their common
                mean (the authors' code, `cifar-dataset.lua`, computes it before it subtracts the mean image).
                `"channel"`: mean and standard deviation of each channel, (1, C, 1, 1) (the paper's text). Both
                deviations have N - 1 in the denominator, like Torch's `std`.

        Raises:
            DataError: if a standard deviation is 0: the images are constant.
            ValueError: for another kind.

        Example:
            >>> images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
            >>> fitted = Normalization.fit(images, "channel")
            >>> fitted.mean.item(), round(fitted.std.item(), 3)
            (127.5, 180.312)
        """
        if kind not in get_args(Kind):
            raise ValueError(f"normalization must be one of {', '.join(get_args(Kind))}, but is {kind!r}.")
        # Integer sums are exact in any order. A thousand images at a time: int64 takes eight times the memory.
        total = torch.zeros(images.shape[1:], dtype=torch.int64, device=images.device)
        total_of_squares = torch.zeros_like(total)
        for chunk in images.split(1024):
            values = chunk.long()
            total += values.sum(0)
            total_of_squares += values.square().sum(0)
        std = _std(total, total_of_squares, len(images), dims=(0, 1, 2) if kind == "pixel" else (1, 2))
        mean = (total if kind == "pixel" else total.sum((1, 2), keepdim=True)).cpu().double()
        mean /= len(images) * (total.numel() // mean.numel())
        if not bool((std > 0).all()):
            raise DataError("the training images are constant: a standard deviation is 0.")
        return cls(mean[None].float().to(images.device), std[None].float().to(images.device))

    def __call__(self, images: Tensor) -> Tensor:
        """Network inputs, float32 (N, C, H, W), from uint8 images."""
        return torch.sub(images, self.mean).div_(self.std)

    def to(self, device: torch.device | str) -> "Normalization":
        """The same on another device."""
        return Normalization(self.mean.to(device), self.std.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for a checkpoint."""
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Normalization":
        """The normalization that `state_dict` returned."""
        return cls(state["mean"], state["std"])


def _std(total: Tensor, total_of_squares: Tensor, num_images: int, dims: tuple[int, ...]) -> Tensor:
    """Standard deviation over `dims`, kept as 1, of bytes, from their sums (C, H, W); float64, on the CPU."""
    first = total.sum(dims, keepdim=True).cpu().double()
    second = total_of_squares.sum(dims, keepdim=True).cpu().double()
    count = num_images * (total.numel() // first.numel())
    return ((second - first.square() / count) / max(count - 1, 1)).clamp(min=0).sqrt()
