"""Calibration of a network: a single forward compared with the mean of random subnetworks."""

from pathlib import Path

import torch
from torch import Tensor

import stochastic_depth as sd
from stochastic_depth_lab.after.trained import load_trained
from stochastic_depth_lab.data import batches
from stochastic_depth_lab.report.reliability import Bin, Reliability
from stochastic_depth_lab.training.evaluation import BATCH_SIZE
from stochastic_depth_lab.training.setup import reproducible

NUM_BINS = 15


def uncertainty(
    path: Path, num_samples: int, *, device: torch.device, data_root: Path | None = None
) -> list[Reliability]:
    """Error, loss, calibration and ranking of mistakes on the test part, for one forward and for subnetworks.

    Raises:
        ValueError: in one line, if the folder holds no run with weights, or one of constant depth.
    """
    run = load_trained(path, device=device, data_root=data_root)
    if run.depth is None:
        raise ValueError(f"{path} has constant depth: it has no random subnetworks.")
    single: list[Tensor] = []
    mean: list[Tensor] = []
    information: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad(), reproducible(run.experiment.recipe):
        for inputs, targets in batches(run.images.data.test, BATCH_SIZE, normalization=run.images.normalization):
            single.append(run.model(inputs).double().softmax(1))
            prediction = sd.monte_carlo(run.model, inputs, num_samples)
            assert prediction.mutual_information is not None
            mean.append(prediction.mean)
            information.append(prediction.mutual_information)
            labels.append(targets)
    truth = torch.cat(labels)
    return [
        reliability("one forward", torch.cat(single), truth),
        reliability(f"{num_samples} subnetworks", torch.cat(mean), truth),
        reliability(
            f"{num_samples} subnetworks, by mutual information", torch.cat(mean), truth, torch.cat(information)
        ),
    ]


def reliability(name: str, probabilities: Tensor, labels: Tensor, doubt: Tensor | None = None) -> Reliability:
    """Distance between confidence and accuracy, and how well doubt ranks the mistakes.

    The expected calibration error is the mean over all samples of |accuracy - confidence| of their bin, in 15 bins of
    equal width (Guo et al. 2017).

    Args:
        name: name of the prediction.
        probabilities: (N, C).
        labels: (N,).
        doubt: (N,), larger for likelier mistakes. None: the entropy of the prediction.
    """
    confidence, answers = probabilities.double().max(1)
    right = (answers == labels).double()
    doubt = torch.special.entr(probabilities.double()).sum(1) if doubt is None else doubt.double()
    # A confidence on an edge belongs to the bin below it.
    number = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    bins: list[Bin] = []
    for index in range(NUM_BINS):
        inside = number == index
        if inside.any():
            bins.append(Bin(int(inside.sum()), confidence[inside].mean().item(), right[inside].mean().item()))
    picked = probabilities.double().gather(1, labels[:, None]).clamp(min=torch.finfo(torch.float64).tiny)
    return Reliability(
        name=name,
        error=100 * (1 - right.mean().item()),
        loss=-picked.log().mean().item(),
        calibration_error=sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / len(labels),
        mistakes_found=_area_under_curve(doubt[right == 0], doubt[right == 1]),
        bins=tuple(bins),
    )


def _area_under_curve(wrong: Tensor, right: Tensor) -> float | None:
    """The probability that a mistake has more doubt than a right answer; ties count half (area under the ROC curve)."""
    if not len(wrong) or not len(right):
        return None
    difference = wrong[:, None] - right[None]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()
