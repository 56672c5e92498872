"""Evaluates a finished or interrupted run again, without training."""

from pathlib import Path
from typing import Any

import torch

from stochastic_depth_lab.data import ImageData
from stochastic_depth_lab.errors import RunError
from stochastic_depth_lab.experiments.config import as_json
from stochastic_depth_lab.runs import checkpoint, records
from stochastic_depth_lab.training.evaluation import Evaluation, evaluate_part
from stochastic_depth_lab.training.setup import build_network, load_images, reproducible, set_epoch


def evaluate_run(
    path: Path, *, device: torch.device, data_root: Path | None = None, data: ImageData | None = None
) -> dict[str, dict[str, Evaluation]]:
    """Evaluate a run's last weights, and those of the lowest validation error.

    Args:
        path: the run folder.
        device: where to compute.
        data_root: folder of the data sets. None: where the run found them.
        data: images to use instead of the experiment's, if it was trained on such.

    Returns:
        For "best", if there are such weights, and "last", the evaluations on the "validation" and the "test" part.

    Raises:
        ValueError: in one line, if the folder holds no run, no weights yet, or damaged ones.
    """
    experiment = records.read_experiment(path)
    state, _ = checkpoint.load(path / "checkpoints", as_json(experiment))
    if state is None:
        raise RunError(f"{path} holds no weights yet: its run has not reached a checkpoint.")
    # The weights, and the epoch whose survival probabilities they were trained with.
    weights: dict[str, tuple[dict[str, Any], int]] = {}
    if (path / "checkpoints" / checkpoint.BEST).exists():
        weights["best"] = checkpoint.read(path / "checkpoints" / checkpoint.BEST), state["best"]["epoch"]
    weights["last"] = state["model"], state["epoch"] - (state["tally"]["step"] == 0)
    evaluations: dict[str, dict[str, Evaluation]] = {}
    with reproducible(experiment.recipe):
        images = load_images(experiment, device, data_root or records.data_root_of(path), data)
        model, depth = build_network(experiment, images.data)
        for name, (state_dict, epoch) in weights.items():
            model.load_state_dict(state_dict)
            set_epoch(experiment, depth, max(epoch, 1))
            evaluations[name] = {
                part: evaluate_part(model, images, split, experiment.precision)
                for part, split in (("validation", images.data.validation), ("test", images.data.test))
            }
    return evaluations
