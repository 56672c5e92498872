"""Loads a finished run: its experiment, its images, and the network with its best weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab.data import PictureSplit, Split, batches
from stochastic_depth_lab.errors import RunError
from stochastic_depth_lab.experiments.config import Experiment, as_json
from stochastic_depth_lab.runs import checkpoint, records
from stochastic_depth_lab.training.setup import Images, branch_names, build_network, load_images, set_epoch

NUM_RECALIBRATION = 1000
"""Number of training images, without augmentation, for the BatchNorm statistics of a subnetwork."""
NUM_LESION = 250
"""Number of training images on which lesions are measured."""


@dataclass(frozen=True)
class Trained:
    """A run's network, in evaluation mode, and its images."""

    experiment: Experiment
    images: Images
    model: nn.Module
    depth: sd.Controller | None
    """None at constant depth."""

    def inputs(self, split: Split | PictureSplit, num_images: int) -> Tensor:
        """The first images of a part, normalized, (N, C, H, W)."""
        return self.images.normalization(split.first(num_images).images)

    def training_batches(self, num_images: int, batch_size: int = 250) -> list[tuple[Tensor, Tensor]]:
        """The first training images, without augmentation, with their labels."""
        few = self.images.data.train.first(num_images)
        return list(batches(few, batch_size, normalization=self.images.normalization))

    @property
    def num_blocks(self) -> int:
        """Number of residual branches."""
        return len(branch_names(self.model, self.depth))

    def smaller(self, keep: Sequence[int]) -> Experiment:
        """The experiment of the subnetwork with these blocks, at constant depth."""
        numbers = self.experiment.model.keep or range(self.num_blocks)
        model = replace(self.experiment.model, keep=tuple(numbers[index] for index in keep))
        return replace(self.experiment, model=model, depth=None, published=None)


def load_trained(path: Path, *, device: torch.device, data_root: Path | None = None) -> Trained:
    """Load a run's network with the weights of the lowest validation error, or the last ones if there are none yet.

    Raises:
        ValueError: in one line, if the folder holds no run, no weights, or damaged ones.
    """
    experiment = records.read_experiment(path)
    best, epoch = path / "checkpoints" / checkpoint.BEST, experiment.recipe.epochs
    over_time = experiment.depth is not None and experiment.depth.over_time != "constant"
    weights: dict[str, Any] = checkpoint.read(best) if best.exists() else {}
    if over_time or not weights:
        state, _ = checkpoint.load(path / "checkpoints", as_json(experiment))
        if state is None:
            raise RunError(f"{path} holds no weights yet: its run has not reached a checkpoint.")
        weights, epoch = weights or state["model"], max(state["best"]["epoch"], 1)
    images = load_images(experiment, device, data_root or records.data_root_of(path))
    model, depth = build_network(experiment, images.data)
    model.load_state_dict(weights)
    set_epoch(experiment, depth, epoch)  # the survival probabilities that the weights were trained with
    return Trained(experiment, images, model.eval(), depth)
