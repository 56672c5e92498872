"""The figures of a report, drawn with matplotlib's objects, without pyplot or global state."""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scipy import stats

from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.report.runs import Epoch, Run, labels
from stochastic_depth_lab.report.table import csv_text, is_index, time_share
from stochastic_depth_lab.report.theme import INK, MUTED, SERIES

_WIDE, _NARROW = 8.0, 4.2
"""Width in inches of a figure on a page and on a phone."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name (no suffix), the CSV file of its data, title and caption."""

    name: str
    data: str
    title: str
    caption: str
    figure: Figure
    narrow: Figure | None = None
    """The same for a phone, with the panels below one another. None: the figure itself, scaled down."""


@dataclass(frozen=True)
class _Series:
    """A run with its name and style in every figure. Dashes distinguish constant depth in gray print."""

    run: Run
    label: str
    color: str
    dashes: Literal["-", "--", ":"]
    time_share: float | None


def drawings(runs: Sequence[Run]) -> tuple[Drawing, ...]:
    """The figures of a report; call it, and save them, inside `figure_style`.

    For many runs, only those that show all of them at once: each run has its own page for the others.
    """
    series = _series(runs, labels(runs))
    if is_index(runs):
        return _curves(series), _gradient(series), _expectation(series)
    shown = [_curves(series), _gradient(series)]
    # Constant depth has no gates.
    if gated := [s for s in series if s.run.stochastic]:
        counted = [s for s in gated if s.run.depth_frequencies]
        shown += [_survival(gated), *([_depth(counted)] if counted else []), _expectation(gated)]
    return tuple(shown)


def curves(runs: Sequence[Run], names: Sequence[str]) -> Drawing:
    """Training loss and test error over epochs; runs with the same name have the same style."""
    return _curves(_series(runs, names))


def gradient(runs: Sequence[Run], names: Sequence[str]) -> Drawing:
    """Gradient of the first convolution over epochs; runs with the same name have the same style."""
    return _gradient(_series(runs, names))


def _series(runs: Sequence[Run], names: Sequence[str]) -> list[_Series]:
    numbers = _color_numbers({name: run.stochastic for run, name in zip(runs, names, strict=True)})
    return [
        _Series(
            run,
            name,
            color=SERIES[numbers[name] % len(SERIES)],
            dashes=("-" if run.stochastic else "--") if numbers[name] < len(SERIES) else ":",
            time_share=time_share(run, runs),
        )
        for run, name in zip(runs, names, strict=True)
    ]


def _color_numbers(stochastic: Mapping[str, bool]) -> dict[str, int]:
    """Each name's color number: 0 for the first of constant depth, 1 for the first of stochastic depth, always."""
    first = {False: 0, True: 1}
    numbers = {name: first.pop(kind) for name, kind in stochastic.items() if kind in first}
    later = itertools.count(2)
    return {name: numbers[name] if name in numbers else next(later) for name in stochastic}


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, ...]:
    """Write a figure as `name.png` and `name.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{name}.{form}" for form in ("png", "svg"))
    for path in paths:
        write_whole(path, rendered(figure, path.suffix[1:]))
    return paths


def rendered(figure: Figure, form: str, *, transparent: bool = False) -> bytes:
    """The bytes of a figure's PNG or SVG file, the same every time."""
    file = io.BytesIO()
    figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None, transparent=transparent)
    return file.getvalue()


def epochs_csv(runs: Sequence[Run]) -> str:
    """One line per run and epoch: the data of the curves and of the gradient figure."""
    keys = [key for key in Epoch.__dataclass_fields__ if not key.endswith("_counts")]
    return csv_text(
        ["run", *keys],
        [
            [label, *(getattr(e, key) for key in keys)]
            for label, run in zip(labels(runs), runs, strict=True)
            for e in run.epochs
        ],
    )


def survival_csv(runs: Sequence[Run]) -> str:
    """One line per run and block: the data of the survival figure."""
    return csv_text(
        ["run", "block", "name", "survival_prob", "realized_frequency", "band_low", "band_high", "num_steps"],
        [
            [label, number, name, prob, frequency, *band, run.num_steps]
            for label, run in zip(labels(runs), runs, strict=True)
            for number, (name, prob, frequency, band) in enumerate(
                zip(
                    run.names,
                    run.survival_probs,
                    run.open_frequencies,
                    _bands(run) or [(None, None)] * len(run.names),
                    strict=True,
                ),
                start=1,
            )
        ],
    )


def _curves(series: Sequence[_Series]) -> Drawing:
    (figure, note), (narrow, _) = (_curves_figure(series, narrow=narrow) for narrow in (False, True))
    return Drawing("curves", "epochs", "Training loss and test error", note, figure, narrow)


def _curves_figure(series: Sequence[_Series], *, narrow: bool) -> tuple[Figure, str]:
    figure = Figure(figsize=(_NARROW, 5.4) if narrow else (_WIDE, 3.3), layout="constrained")
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    _plot_epochs(left, series, lambda e: e.train_loss, log=True)
    left.set_title("training loss")
    _plot_epochs(right, series, lambda e: e.test_error)
    for s in series:
        right.plot(s.run.best_epoch, s.run.test_error, "o", color=s.color, markersize=6, markeredgecolor=INK)
    # The errors of the first epochs would flatten the rest. At least half of each curve is shown.
    highest = 1.05 * max(e.test_error for s in series for e in s.run.epochs)
    medians = [sorted(e.test_error for e in s.run.epochs)[len(s.run.epochs) // 2] for s in series]
    top = min(highest, max(4 * max(s.run.test_error for s in series), 1.2 * max(medians)))
    right.set_ylim(0, top or 1)
    right.set_title("test error, %" + (f" (above {top:.0f} not shown)" if top < highest else ""))
    _runs_legend(figure, series)
    note = "Dot: the epoch of the lowest validation error, whose test error is in the table."
    return figure, note + (" Dotted: the learning rate drops." if _drops(series) else "")


def _gradient(series: Sequence[_Series]) -> Drawing:
    return Drawing(
        "gradient",
        "epochs",
        "Gradient of the first convolution",
        "Mean magnitude over the weights and the steps of an epoch."
        + (" Dotted: the learning rate drops to the value shown." if _drops(series) else ""),
        _gradient_figure(series, narrow=False),
        _gradient_figure(series, narrow=True),
    )


def _gradient_figure(series: Sequence[_Series], *, narrow: bool) -> Figure:
    figure = Figure(figsize=(_NARROW if narrow else _WIDE, 3.3), layout="constrained")
    axes = figure.subplots()
    _plot_epochs(axes, series, lambda e: e.first_conv_grad, log=True)
    for place, after in _drops(series):
        # Curves fall at a drop: the space above and right of it is free.
        axes.annotate(
            f"→ {after}",
            (place, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            color=MUTED,
        )
    axes.set_title("mean |gradient| of the first convolution's weights")
    _runs_legend(figure, series)
    return figure


def _survival(series: Sequence[_Series]) -> Drawing:
    (figure, counts), (narrow, _) = (_survival_figure(series, narrow=narrow) for narrow in (False, True))
    return Drawing(
        "survival",
        "survival",
        "Survival probabilities and realized frequencies",
        "How often each block was open, and the difference to its survival probability. "
        + ("Band: 95 % of random draws (exact binomial), so one block in twenty may lie outside. " if counts else "")
        + " ".join(counts),
        figure,
        narrow,
    )


def _survival_figure(series: Sequence[_Series], *, narrow: bool) -> tuple[Figure, list[str]]:
    figure = Figure(
        figsize=(_NARROW if narrow else _WIDE, 0.9 + (4.4 if narrow else 2.2) * len(series)), layout="constrained"
    )
    # For each run a row of two panels, or on a phone two rows of one.
    shape = (2 * len(series), 1) if narrow else (len(series), 2)
    panels = figure.subplots(*shape, squeeze=False).reshape(-1, 2)
    counts: list[str] = []
    for (left, right), s in zip(panels, series, strict=True):
        probs, frequencies, bands = s.run.survival_probs, s.run.open_frequencies, _bands(s.run)
        blocks = range(1, len(probs) + 1)
        dots = {"color": s.color, "marker": "o", "markersize": 4 if len(blocks) <= 60 else 2, "linestyle": ""}
        # Each block is one unit wide, including the first and the last.
        edges = [block - 0.5 for block in range(1, len(probs) + 2)]
        left.stairs(probs, edges, baseline=None, color=MUTED, linewidth=1.6)
        left.plot(blocks, frequencies, **dots)
        left.set_ylim(0, 1.05)
        left.set_title(f"{s.label}: share of {s.run.num_steps:,} steps")
        right.axhline(0, color=MUTED)
        right.plot(blocks, [frequency - prob for frequency, prob in zip(frequencies, probs, strict=True)], **dots)
        right.set_title("realized frequency \N{MINUS SIGN} survival probability")
        if bands:
            low, high = ([bounds[side] - prob for bounds, prob in zip(bands, probs, strict=True)] for side in (0, 1))
            right.stairs(high, edges, baseline=low, fill=True, color=MUTED, alpha=0.25)
            outside = sum(not low <= f <= high for f, (low, high) in zip(frequencies, bands, strict=True))
            counts.append(f"{s.label}: {outside} of {len(blocks)} blocks lie outside.")
        right.use_sticky_edges = False  # show the edge of the band
        right.yaxis.set_major_formatter(FuncFormatter(_plain))
        for axes in (left, right):
            axes.xaxis.set_major_locator(whole_numbers())
    for axes in panels[-1][-1:] if narrow else panels[-1]:
        axes.set_xlabel("block, from the input")
    entries: list[tuple[Line2D | Patch, str]] = [
        (Line2D([], [], color=MUTED), "survival probability"),
        (Line2D([], [], color=INK, marker="o", markersize=4, linestyle=""), "realized frequency"),
    ]
    if counts:
        entries.append((Patch(color=MUTED, alpha=0.25, linewidth=0), "95 % band"))
    legend(figure, entries)
    return figure, counts


def _depth(series: Sequence[_Series]) -> Drawing:
    return Drawing(
        "depth",
        "epochs",
        "Realized depth",
        "The number of blocks that the steps ran.",
        _depth_figure(series, narrow=False),
        _depth_figure(series, narrow=True),
    )


def _depth_figure(series: Sequence[_Series], *, narrow: bool) -> Figure:
    figure = Figure(figsize=(_NARROW if narrow else _WIDE, 0.9 + 1.7 * len(series)), layout="constrained")
    panels = figure.subplots(len(series), 1, squeeze=False)
    for (axes,), s in zip(panels, series, strict=True):
        frequencies = s.run.depth_frequencies
        axes.bar(range(len(frequencies)), frequencies, width=0.9, color=s.color)
        axes.axvline(s.run.expected_depth, color=INK, linewidth=1.6)
        shown = [depth for depth, frequency in enumerate(frequencies) if frequency]
        axes.set_xlim(min(shown) - 1, max(shown) + 1)
        axes.xaxis.set_major_locator(whole_numbers())
        axes.set_title(f"{s.label}: share of {s.run.num_steps:,} steps")
    panels[-1][0].set_xlabel("blocks run in a step")
    legend(figure, [(Line2D([], [], color=INK), "expected depth")])
    return figure


def _expectation(series: Sequence[_Series]) -> Drawing:
    return Drawing(
        "expectation",
        "runs",
        "Depth, cost and time against expectation",
        "The expected time is what would be left of constant depth's if closed blocks took none, measured when the "
        "run began. Time is training per epoch, evaluation not included.",
        _expectation_figure(series, narrow=False),
        _expectation_figure(series, narrow=True),
    )


def _expectation_figure(series: Sequence[_Series], *, narrow: bool) -> Figure:
    height = 1.1 + 3 * (0.2 + 0.27 * len(series))
    figure = Figure(figsize=(_NARROW if narrow else _WIDE, height), layout="constrained")
    axes = figure.subplots()
    measures: list[tuple[str, Callable[[_Series], float | None], Callable[[_Series], float]]] = [
        ("depth", lambda s: s.run.realized_depth / len(s.run.names), lambda s: s.run.expected_depth / len(s.run.names)),
        ("training FLOPs", lambda s: s.run.realized_cost, lambda s: s.run.expected_cost),
        ("training time", lambda s: s.time_share, lambda s: s.run.expected_time or s.run.expected_cost),
    ]
    pitch = len(series) + 0.7
    longest = max([1.0, *(realized_of(s) or 0 for _, realized_of, _ in measures for s in series)])
    for number, (_, realized_of, expected_of) in enumerate(measures):
        for row, s in enumerate(series):
            y, realized, expected = number * pitch + row, realized_of(s), expected_of(s)
            text = "no constant depth" if narrow else "no constant-depth run"
            if realized is not None:
                axes.barh(y, realized, height=0.74, color=s.color)
                axes.plot([expected, expected], [y - 0.46, y + 0.46], color=INK, linewidth=2)
                text = f"{realized:.3f} ({expected:.3f})" if narrow else f"{realized:.3f} (expected {expected:.3f})"
            axes.text(longest + 0.03, y, text, va="center")
    axes.axvline(1, color=MUTED, linewidth=1.2, linestyle="--", zorder=0.5)
    axes.set_xlim(0, (1.7 if narrow else 1.35) * longest)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xlabel("share of constant depth (dashed)", loc="left")
    axes.set_ylim(2 * pitch + len(series) - 0.4, -0.6)
    names = [name.replace(" ", "\n") if narrow else name for name, *_ in measures]
    axes.set_yticks([number * pitch + (len(series) - 1) / 2 for number in range(3)], names)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    legend(figure, [(Patch(color=s.color), s.label) for s in series] + [(Line2D([], [], color=INK), "expected")])
    return figure


def _bands(run: Run) -> list[tuple[float, float]]:
    """The exact 95 % band of each block's frequency; none for gates per sample, or if survival changes over the epochs.

    Gates per sample round the number of open samples of each step up or down, so their frequency varies far less.
    """
    if run.granularity == "sample" or run.changes:
        return []
    low, high = stats.binom.interval(0.95, run.num_steps, run.survival_probs)
    return list(zip((low / run.num_steps).tolist(), (high / run.num_steps).tolist(), strict=True))


def _plot_epochs(axes: Axes, series: Sequence[_Series], value: Callable[[Epoch], float], *, log: bool = False) -> None:
    """Draw a line per run over the epochs, and where the learning rate drops."""
    values = [[value(e) for e in s.run.epochs] for s in series]
    for s, line in zip(series, values, strict=True):
        marker = "o" if len(line) == 1 else None
        axes.plot(range(1, len(line) + 1), line, color=s.color, linestyle=s.dashes, marker=marker)
    for place, _ in _drops(series):
        axes.axvline(place, color=MUTED, linewidth=1, linestyle=":", zorder=0.5)
    positive = [v for line in values for v in line if v > 0]
    if log and positive:
        axes.set_yscale("log")
        spread = max(positive) / min(positive)
        # With powers of ten alone, an axis of less than a decade has no number.
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if spread < 200 else (1,)) if spread > 5 else MaxNLocator(5)
        )
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(whole_numbers())
    axes.set_xlabel("epoch")


def whole_numbers() -> MaxNLocator:
    """Ticks for epochs or blocks."""
    return MaxNLocator(8, integer=True, steps=[1, 2, 5, 10])


def _plain(value: float, _position: int | None = None) -> str:
    """A number without an exponent: 0.00005. Matplotlib passes the position of a tick too."""
    return f"{value:.10f}".rstrip("0").rstrip(".").replace("-", "\N{MINUS SIGN}")


def _drops(series: Sequence[_Series]) -> list[tuple[float, str]]:
    """Where the learning rate of any run drops by a step: (between which epochs, to what; with several, to each).

    A step at least halves the rate, and has a plateau before or after it; a cosine has no steps.
    """
    found: dict[float, set[float]] = {}
    for s in series:
        rates = [e.learning_rate for e in s.run.epochs]
        for i in range(1, len(rates)):
            before, after = rates[max(i - 2, 0) : i], rates[i : i + 2]
            plateau = len(set(before)) < len(before) or len(set(after)) < len(after)
            if plateau and after[0] <= before[-1] / 2:
                found.setdefault(i + 0.5, set()).add(float(f"{after[0]:.3g}"))
    return [(place, ", ".join(map(_plain, sorted(rates, reverse=True)))) for place, rates in sorted(found.items())]


def _runs_legend(figure: Figure, series: Sequence[_Series]) -> None:
    looks = {s.label: Line2D([], [], color=s.color, linestyle=s.dashes) for s in series}
    legend(figure, [(look, label) for label, look in looks.items()])


def legend(figure: Figure, entries: Sequence[tuple[Line2D | Patch, str]]) -> None:
    """A legend above the panels, in as many columns as fit."""
    longest = max(len(name) for _, name in entries)
    num_rows = math.ceil(len(entries) / max(1, int(14 * figure.get_figwidth()) // (longest + 8)))
    handles = [handle for handle, _ in entries]
    drawn = figure.legend(
        handles, ["-"] * len(handles), loc="outside upper left", ncols=math.ceil(len(entries) / num_rows)
    )
    # Set afterward: `legend` would leave out names that start with an underscore.
    for text, (_, name) in zip(drawn.get_texts(), entries, strict=True):
        text.set_text(name)
