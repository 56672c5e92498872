"""What a trained network does with its blocks: how much each adds, what its loss costs, whether confidence is right."""

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
from stochastic_depth_lab.report.analysis import FILE_NAME, Analysis
from stochastic_depth_lab.training.evaluation import BATCH_SIZE, evaluate
from stochastic_depth_lab.training.setup import reproducible


def analyse(
    path: Path,
    *,
    device: torch.device,
    data_root: Path | None = None,
    num_images: int = 2000,
    progress: Callable[[str], None] = lambda _: None,
) -> Analysis:
    """Look into a run's network on the first test images, and leave what was found in the run folder, for its report.

    Args:
        path: the run folder; its best weights are taken.
        device: where.
        data_root: where the data lie. None: where the run found them.
        num_images: test images. As many evaluations as there are blocks are made of them.
        progress: is told a line now and then.

    Raises:
        ValueError: in one line, if the folder holds no run with weights.
    """
    run = load_trained(path, device=device, data_root=data_root)
    images = run.images.data.test.first(num_images)
    residuals = {name: each for name, each in run.model.named_modules() if isinstance(each, sd.Residual)}
    if not residuals:
        raise ValueError(f"{path}: --analyse knows the blocks of the paper's networks for small images only.")

    def evaluate_again() -> float:
        return evaluate(run.model, batches(images, BATCH_SIZE, normalisation=run.images.normalisation)).error

    with torch.no_grad(), reproducible(run.experiment.recipe):
        probabilities, shares = _forward(run, images, list(residuals.values()))
        lesion_errors: list[float] = []
        for number, (name, residual) in enumerate(residuals.items(), start=1):
            with _closed(residual):
                lesion_errors.append(evaluate_again())
            progress(f"block {number} of {len(residuals)}, {name}: error {lesion_errors[-1]:.2f} % without it")
    analysis = Analysis(
        names=tuple(residuals),
        branch_shares=tuple(shares),
        lesion_errors=tuple(lesion_errors),
        reliability=reliability("one forward", probabilities, images.labels),
        num_images=len(images),
    )
    write_json(path / FILE_NAME, asdict(analysis))
    return analysis


def _forward(run: Trained, images: Split | PictureSplit, residuals: list[sd.Residual]) -> tuple[Tensor, list[float]]:
    """Probabilities of the classes, and per block mean |branch| / mean |shortcut| as both enter the sum."""
    branches, shortcuts = [0.0] * len(residuals), [0.0] * len(residuals)
    handles: list[RemovableHandle] = []
    for index, residual in enumerate(residuals):

        def note(_: nn.Module, inputs: tuple[Tensor], output: Tensor, index: int = index) -> None:
            residual = residuals[index]
            shortcut = inputs[0] if residual.shortcut is None else residual.shortcut(inputs[0])
            shortcuts[index] += shortcut.double().abs().sum().item()
            # What the sum added to the shortcut: the branch, times p where it counts with p.
            branches[index] += (output - shortcut).double().abs().sum().item()

        handles.append(residual.register_forward_hook(note))
    logits = [run.model(inputs) for inputs, _ in batches(images, BATCH_SIZE, normalisation=run.images.normalisation)]
    for handle in handles:
        handle.remove()
    return torch.cat(logits).float().softmax(1), [b / max(s, 1e-30) for b, s in zip(branches, shortcuts, strict=True)]


@contextmanager
def _closed(residual: sd.Residual) -> Generator[None]:
    """Within, a block is its shortcut; all others follow the test-time rule."""

    def nothing(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    handle = residual.branch.register_forward_hook(nothing)
    try:
        yield
    finally:
        handle.remove()
