"""The survival probabilities of a schedule, as text and as a figure."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from stochastic_depth_lab.errors import ReportError
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.report.figures import rendered, whole_numbers
from stochastic_depth_lab.report.runs import printable
from stochastic_depth_lab.report.theme import MUTED, SERIES, figure_style

_MOST_LINES = 30
_BAR = 40


def schedule_text(names_or_numbers: Sequence[str | int], survival_probs: Sequence[float]) -> str:
    """A bar per block, or every few blocks of a deep network, with the expected depth and saving below.

    Raises:
        ReportError: unless there is one probability in (0, 1] for each block.

    Example:
        >>> print(schedule_text([1, 2], [0.75, 0.5]))
        block  survival probability
            1  0.750  ██████████████████████████████
            2  0.500  ████████████████████
        expected depth 1.25 of 2 blocks: 37.5 % of the work is saved if all blocks cost the same
    """
    _check(names_or_numbers, survival_probs)
    names = [printable(str(name)) for name in names_or_numbers]
    width = max(len("block"), *map(len, names))
    every = math.ceil(len(names) / _MOST_LINES)
    # The survival probability of the last block is p_L.
    shown = sorted({*range(0, len(names), every), len(names) - 1})
    bars = [f"{names[i]:>{width}}  {survival_probs[i]:.3f}  {'█' * round(_BAR * survival_probs[i])}" for i in shown]
    of_every = f", every {every} blocks and the last" if every > 1 else ""
    return "\n".join([f"{'block':>{width}}  survival probability{of_every}", *bars, _summary(survival_probs)])


def schedule_figure(names_or_numbers: Sequence[str | int], survival_probs: Sequence[float], path: Path) -> Path:
    """Write the survival probabilities to a PNG or SVG file, depending on the suffix of `path`.

    Raises:
        ReportError: unless there is one probability in (0, 1] for each block, or for another suffix.
    """
    _check(names_or_numbers, survival_probs)
    form = path.suffix.lower().removeprefix(".")
    if form not in {"png", "svg"}:
        raise ReportError(f"a figure's file name ends in .png or .svg, but {path.name} was given")
    with figure_style():
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        blocks = range(1, len(survival_probs) + 1)
        axes.vlines(blocks, 0, survival_probs, color=SERIES[1], linewidth=1.2 if len(blocks) <= 100 else 0.4)
        axes.plot(blocks, survival_probs, "o", color=SERIES[1], markersize=4 if len(blocks) <= 100 else 2)
        mean = sum(survival_probs) / len(survival_probs)
        axes.axhline(mean, color=MUTED, linewidth=1.2, linestyle="--")
        axes.set_ylim(0, 1.05)
        axes.xaxis.set_major_locator(whole_numbers())
        axes.set_xlabel(f"block, {printable(str(names_or_numbers[0]))} to {printable(str(names_or_numbers[-1]))}")
        axes.set_ylabel("survival probability (mean: dashed)")
        axes.set_title(_summary(survival_probs))
        try:
            write_whole(path, rendered(figure, form))
        except OSError as error:
            raise ReportError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _check(names: Sequence[str | int], survival_probs: Sequence[float]) -> None:
    if not survival_probs or len(names) != len(survival_probs):
        raise ReportError(f"one survival probability per block is expected: {len(survival_probs)} for {len(names)}")
    for name, prob in zip(names, survival_probs, strict=True):
        if not 0 < prob <= 1:
            raise ReportError(
                f"the survival probability of block {printable(str(name))} must be in (0, 1], but is {prob}"
            )


def _summary(survival_probs: Sequence[float]) -> str:
    expected, num_blocks = math.fsum(survival_probs), len(survival_probs)
    saving = 100 * (1 - expected / num_blocks)
    return (
        f"expected depth {expected:.2f} of {num_blocks} blocks: "
        f"{saving:.1f} % of the work is saved if all blocks cost the same"
    )
