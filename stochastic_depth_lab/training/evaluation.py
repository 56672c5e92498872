"""Error and loss of a network in evaluation mode: every block runs, its branch multiplied by p (`model.eval()`)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth_lab.data import PictureSplit, Split, batches
from stochastic_depth_lab.experiments.config import Precision
from stochastic_depth_lab.training.setup import Images, autocast

BATCH_SIZE = 500
"""Images in a batch of evaluation. The result does not depend on it."""


@dataclass(frozen=True)
class Evaluation:
    """Error and loss on one part of the data."""

    error: float
    """Wrong answers, in percent."""
    loss: float
    """Mean cross-entropy, in nats."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision = "fp32",
    sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Evaluation:
    """Error and loss over batches of inputs and labels, in evaluation mode. Restores the mode.

    Args:
        model: the network.
        batches: the batches of this process.
        precision: of the computation.
        sum_over_processes: adds up the results of all processes.

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
            # Kept on the device: reading a number in every batch would wait for it.
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


def evaluate_part(
    model: nn.Module, images: Images, part: Split | PictureSplit, precision: Precision = "fp32"
) -> Evaluation:
    """Error and loss on one part of an experiment's images."""
    return evaluate(model, batches(part, BATCH_SIZE, normalization=images.normalization), precision)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
