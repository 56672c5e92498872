"""Analyzes the blocks of a trained network: how much each adds, the error without it, and calibration."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import stochastic_depth as sd
from stochastic_depth_lab.after.trained import Trained, load_trained
from stochastic_depth_lab.after.uncertainty import reliability
from stochastic_depth_lab.data import PictureSplit, Split, batches
from stochastic_depth_lab.files import write_json
from stochastic_depth_lab.report.evaluations import ANALYSIS, Analysis
from stochastic_depth_lab.training.evaluation import BATCH_SIZE, evaluate_part
from stochastic_depth_lab.training.setup import reproducible


def analyze(
    path: Path,
    *,
    device: torch.device,
    data_root: Path | None = None,
    num_images: int = 2000,
    progress: Callable[[str], None] = lambda _: None,
) -> Analysis:
    """Measure the blocks of a run's network on test images, and write the results to the run folder, for its report.

    Args:
        path: the run folder; its best weights are used.
        device: where to compute.
        data_root: folder of the data sets. None: where the run found them.
        num_images: number of test images. They are evaluated once per block.
        progress: receives messages.

    Raises:
        ValueError: in one line, if the folder holds no run with weights.
    """
    run = load_trained(path, device=device, data_root=data_root)
    images = run.images.data.test.first(num_images)
    residuals = {name: each for name, each in run.model.named_modules() if isinstance(each, sd.Residual)}
    if not residuals:
        raise ValueError(f"{path}: --analyze works only for the paper's networks for small images.")

    with torch.no_grad(), reproducible(run.experiment.recipe):
        probabilities, shares = _forward(run, images, list(residuals.values()))
        lesion_errors: list[float] = []
        for number, (name, residual) in enumerate(residuals.items(), start=1):
            with _closed(residual):
                lesion_errors.append(evaluate_part(run.model, run.images, images).error)
            progress(f"block {number} of {len(residuals)}, {name}: error {lesion_errors[-1]:.2f} % without it")
    analysis = Analysis(
        names=tuple(residuals),
        branch_shares=tuple(shares),
        lesion_errors=tuple(lesion_errors),
        reliability=reliability("one forward", probabilities, images.labels),
        num_images=len(images),
    )
    write_json(path / ANALYSIS, asdict(analysis))
    return analysis


def _forward(run: Trained, images: Split | PictureSplit, residuals: list[sd.Residual]) -> tuple[Tensor, list[float]]:
    """Class probabilities, and per block mean |branch| / mean |shortcut| as they enter the sum."""
    branches, shortcuts = [0.0] * len(residuals), [0.0] * len(residuals)
    handles: list[RemovableHandle] = []
    for index, residual in enumerate(residuals):

        def measure(_: nn.Module, inputs: tuple[Tensor], output: Tensor, index: int = index) -> None:
            residual = residuals[index]
            shortcut = inputs[0] if residual.shortcut is None else residual.shortcut(inputs[0])
            shortcuts[index] += shortcut.double().abs().sum().item()
            # What the sum added to the shortcut: the branch, times p under the test-time rule.
            branches[index] += (output - shortcut).double().abs().sum().item()

        handles.append(residual.register_forward_hook(measure))
    logits = [run.model(inputs) for inputs, _ in batches(images, BATCH_SIZE, normalization=run.images.normalization)]
    for handle in handles:
        handle.remove()
    return torch.cat(logits).float().softmax(1), [b / max(s, 1e-30) for b, s in zip(branches, shortcuts, strict=True)]


@contextmanager
def _closed(residual: sd.Residual) -> Generator[None]:
    """A context in which one block is its shortcut. All others follow the test-time rule."""

    def zero(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    handle = residual.branch.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()
