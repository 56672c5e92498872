"""Error and loss of a network, by the test-time rule: every block runs, its branch counted with p (`model.eval()`)."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth_lab.data import ImageData, batches
from stochastic_depth_lab.experiments.config import Precision, as_json
from stochastic_depth_lab.runs import checkpoint, records
from stochastic_depth_lab.training.setup import build_network, load_images, reproducible, set_epoch

BATCH_SIZE = 500
"""Images in a batch of evaluation; the result does not depend on it."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """What a network gives on one part of the data."""

    error: float
    """Wrong answers, in percent."""
    loss: float
    """Mean cross-entropy, in nats."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Within, the network computes in this precision; weights, sums and losses stay float32."""
    return torch.autocast(device.type, dtype=_AUTOCAST.get(precision), enabled=precision in _AUTOCAST)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision = "fp32",
    sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Evaluation:
    """Error and loss over batches of inputs and labels, in evaluation mode; the mode is restored.

    Args:
        model: the network.
        batches: of this process.
        precision: to compute in.
        sum_over_processes: adds up what the processes have found on their parts.

    Raises:
        ValueError: if there is no batch.
    """
    was_training = model.training
    model.eval()
    try:
        wrong, loss, num_samples = [], [], 0
        for inputs, labels in batches:
            with autocast(inputs.device, precision):
                logits = model(inputs).float()
            # Kept on the device: reading a number would wait for it in every batch.
            wrong.append((logits.argmax(1) != labels).sum())
            loss.append(F.cross_entropy(logits, labels, reduction="sum").to(_sum_dtype(logits.device)))
            num_samples += len(labels)
    finally:
        model.train(was_training)
    device = wrong[0].device if wrong else torch.device("cpu")
    sums = torch.zeros(3, dtype=_sum_dtype(device), device=device)
    if wrong:
        sums = torch.stack([torch.stack(wrong).sum().to(sums.dtype), torch.stack(loss).sum(), sums[2] + num_samples])
    num_wrong, total_loss, num_samples = sum_over_processes(sums).tolist()
    if not num_samples:
        raise ValueError("there is no batch to evaluate on.")
    return Evaluation(error=100 * num_wrong / num_samples, loss=total_loss / num_samples)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Metal does not have


def evaluate_run(
    path: Path, *, device: torch.device, data_root: Path | None = None, data: ImageData | None = None
) -> dict[str, dict[str, Evaluation]]:
    """Evaluate a run's weights again, those of the lowest validation error and the last ones.

    Args:
        path: the run folder.
        device: where.
        data_root: where the data lie. None: where the run found them.
        data: images in place of the experiment's, if it was trained on such.

    Returns:
        For "best" and "last", if they are there, the evaluations on the "validation" and the "test" part.

    Raises:
        ValueError: in one line, if the folder holds no run, no weights yet, or damaged ones.
    """
    experiment = records.read_experiment(path)
    state, _ = checkpoint.load(path / "checkpoints", as_json(experiment))
    if state is None:
        raise records.RunError(f"{path} holds no weights yet: its run has not come to a checkpoint.")
    # With each the epoch whose survival probabilities it was trained with.
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
                part: evaluate(
                    model, batches(split, BATCH_SIZE, normalisation=images.normalisation), experiment.precision
                )
                for part, split in (("validation", images.data.validation), ("test", images.data.test))
            }
    return evaluations
