"""Fine-tunes a subnetwork: a normal run that starts from its weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from stochastic_depth_lab.experiments.config import Experiment
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.runs import records
from stochastic_depth_lab.runs.checkpoint import as_safetensors
from stochastic_depth_lab.training import loop


def finetune(
    experiment: Experiment,
    network: nn.Module,
    *,
    epochs: int,
    folder: Path,
    observers: Sequence[loop.Observer],
    device: torch.device,
    data_root: Path | None = None,
) -> float:
    """Continue training a subnetwork with its run's recipe, at constant depth, and return the test error in percent.

    The learning rate rises to a tenth of the recipe's highest rate and falls to zero (`one_cycle`). The test error is
    that at the lowest validation error. A finished fine-tuning with the same recipe and weights is not repeated, an
    interrupted one is resumed.

    Args:
        experiment: experiment of the subnetwork, from `Trained.smaller`.
        network: the subnetwork; it is not changed.
        epochs: number of epochs.
        folder: where to write the run folder, with the initial weights next to it.
        observers: receive progress callbacks.
        device: where to train.
        data_root: folder of the data sets.

    Raises:
        ValueError: in one line, if it cannot be trained.
    """
    recipe = replace(
        experiment.recipe,
        epochs=epochs,
        learning_rate=experiment.recipe.learning_rate / 10,
        lr_schedule="one_cycle",
        warmup_epochs=0,
    )
    num_blocks = len(experiment.model.keep or ())
    weights = as_safetensors(network.state_dict())
    experiment = replace(
        experiment,
        name=f"{experiment.name}-{num_blocks}-blocks",
        title=f"{experiment.title}, {num_blocks} blocks, fine-tuned",
        recipe=recipe,
        initial_weights=hashlib.sha256(weights).hexdigest(),
    )
    run = records.folder_for(folder, experiment)
    folder.mkdir(parents=True, exist_ok=True)
    file = run.with_name(f"{run.name}.safetensors")
    write_whole(file, weights)
    result = loop.train(experiment, run, observers, device=device, data_root=data_root, weights=file, resume=True)
    return result["test_error"]
