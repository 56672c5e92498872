"""The figures of a report, drawn with matplotlib's objects: no pyplot, no display, nothing global left behind."""

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

from stochastic_depth_lab.atomic import write_whole
from stochastic_depth_lab.report.binomial import central_band
from stochastic_depth_lab.report.runs import Epoch, Run, labels
from stochastic_depth_lab.report.table import csv_text, is_index, time_share
from stochastic_depth_lab.report.theme import INK, MUTED, SERIES

_WIDE, _NARROW = 8.0, 4.2
"""Inches: of a figure on a page, and of its form for a phone."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name (no ending), the CSV file of its data, and what a reader must know to read it."""

    name: str
    data: str
    title: str
    caption: str
    figure: Figure
    narrow: Figure | None = None
    """The same for a phone: its panels below one another. None: the figure itself, made smaller."""


@dataclass(frozen=True)
class _Series:
    """A run with its name and look, the same in every figure. Dashes tell constant depth apart in grey print."""

    run: Run
    label: str
    colour: str
    dashes: Literal["-", "--", ":"]
    time_share: float | None


def drawings(runs: Sequence[Run]) -> tuple[Drawing, ...]:
    """The figures of a report; call it, and save them, inside `figure_style`.

    Of many runs only those that show all of them at once: each has a page of its own for the others.
    """
    series = _series(runs, labels(runs))
    if is_index(runs):
        return _curves(series), _gradient(series), _expectation(series)
    shown = [_curves(series), _gradient(series)]
    # Constant depth has nothing to show about gates.
    if gated := [s for s in series if s.run.stochastic]:
        counted = [s for s in gated if s.run.depth_frequencies]
        shown += [_survival(gated), *([_depth(counted)] if counted else []), _expectation(gated)]
    return tuple(shown)


def curves(runs: Sequence[Run], names: Sequence[str]) -> Drawing:
    """Training loss and test error over epochs; runs of one name, such as its seeds, look the same."""
    return _curves(_series(runs, names))


def gradient(runs: Sequence[Run], names: Sequence[str]) -> Drawing:
    """Gradient of the first convolution over epochs; runs of one name look the same."""
    return _gradient(_series(runs, names))


def _series(runs: Sequence[Run], names: Sequence[str]) -> list[_Series]:
    numbers = _colour_numbers({name: run.stochastic for run, name in zip(runs, names, strict=True)})
    return [
        _Series(
            run,
            name,
            colour=SERIES[numbers[name] % len(SERIES)],
            dashes=("-" if run.stochastic else "--") if numbers[name] < len(SERIES) else ":",
            time_share=time_share(run, runs),
        )
        for run, name in zip(runs, names, strict=True)
    ]


def _colour_numbers(stochastic: Mapping[str, bool]) -> dict[str, int]:
    """Each name's number of a color: the first of constant depth has 0, the first of stochastic depth 1, always."""
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
    """The bytes of a figure's PNG or SVG file, the same ones every time."""
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
    """One line per run and block: the data of the survival figure; no band where none is drawn."""
    return csv_text(
        ["run", "block", "name", "survival_prob", "realised_frequency", "band_low", "band_high", "num_steps"],
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
        right.plot(s.run.best_epoch, s.run.test_error, "o", color=s.colour, markersize=6, markeredgecolor=INK)
    # The first epochs guess: shown whole, they press the rest of the curves flat. Half of each curve is always shown.
    highest = 1.05 * max(e.test_error for s in series for e in s.run.epochs)
    medians = [sorted(e.test_error for e in s.run.epochs)[len(s.run.epochs) // 2] for s in series]
    top = min(highest, max(4 * max(s.run.test_error for s in series), 1.2 * max(medians)))
    right.set_ylim(0, top or 1)
    right.set_title("test error, %" + (f" (above {top:.0f} not shown)" if top < highest else ""))
    _runs_legend(figure, series)
    note = "Dot: the epoch of the lowest validation error, whose test error the table gives."
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
    for place, _, after in _drops(series):
        # Curves fall at a drop: the corner above, right of it, is free.
        axes.annotate(
            f"→ {_plain(float(f'{after:.3g}'))}",
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
        "How often each block was open, and how far that is from its survival probability. "
        + ("Band: 95 % of fair draws (exact binomial), so that one block in twenty may lie outside. " if counts else "")
        + " ".join(counts),
        figure,
        narrow,
    )


def _survival_figure(series: Sequence[_Series], *, narrow: bool) -> tuple[Figure, list[str]]:
    figure = Figure(
        figsize=(_NARROW if narrow else _WIDE, 0.9 + (4.4 if narrow else 2.2) * len(series)), layout="constrained"
    )
    # A row of two panels for each run, or on a phone two rows of one.
    shape = (2 * len(series), 1) if narrow else (len(series), 2)
    panels = figure.subplots(*shape, squeeze=False).reshape(-1, 2)
    counts: list[str] = []
    for (left, right), s in zip(panels, series, strict=True):
        probs, frequencies, bands = s.run.survival_probs, s.run.open_frequencies, _bands(s.run)
        blocks = range(1, len(probs) + 1)
        dots = {"color": s.colour, "marker": "o", "markersize": 4 if len(blocks) <= 60 else 2, "linestyle": ""}
        # From half a block before to half a block after, so that the first and last are as wide as the rest.
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
        right.use_sticky_edges = False  # the band's edge is to be seen
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
        "How many blocks the steps ran: each is a network of another depth.",
        _depth_figure(series, narrow=False),
        _depth_figure(series, narrow=True),
    )


def _depth_figure(series: Sequence[_Series], *, narrow: bool) -> Figure:
    figure = Figure(figsize=(_NARROW if narrow else _WIDE, 0.9 + 1.7 * len(series)), layout="constrained")
    panels = figure.subplots(len(series), 1, squeeze=False)
    for (axes,), s in zip(panels, series, strict=True):
        frequencies = s.run.depth_frequencies
        axes.bar(range(len(frequencies)), frequencies, width=0.9, color=s.colour)
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
        "Only the FLOPs of closed blocks are saved, so the expected time is the expected cost. Time is training per "
        "epoch, evaluation not included.",
        _expectation_figure(series, narrow=False),
        _expectation_figure(series, narrow=True),
    )


def _expectation_figure(series: Sequence[_Series], *, narrow: bool) -> Figure:
    height = 1.1 + 3 * (0.2 + 0.27 * len(series))
    figure = Figure(figsize=(_NARROW if narrow else _WIDE, height), layout="constrained")
    axes = figure.subplots()
    measures: list[tuple[str, Callable[[_Series], float | None], Callable[[_Series], float]]] = [
        ("depth", lambda s: s.run.realised_depth / len(s.run.names), lambda s: s.run.expected_depth / len(s.run.names)),
        ("training FLOPs", lambda s: s.run.realised_cost, lambda s: s.run.expected_cost),
        ("training time", lambda s: s.time_share, lambda s: s.run.expected_cost),
    ]
    pitch = len(series) + 0.7
    longest = max([1.0, *(realised_of(s) or 0 for _, realised_of, _ in measures for s in series)])
    for number, (_, realised_of, expected_of) in enumerate(measures):
        for row, s in enumerate(series):
            y, realised, expected = number * pitch + row, realised_of(s), expected_of(s)
            text = "no constant depth" if narrow else "no constant-depth run"
            if realised is not None:
                axes.barh(y, realised, height=0.74, color=s.colour)
                axes.plot([expected, expected], [y - 0.46, y + 0.46], color=INK, linewidth=2)
                text = f"{realised:.3f} ({expected:.3f})" if narrow else f"{realised:.3f} (expected {expected:.3f})"
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
    legend(figure, [(Patch(color=s.colour), s.label) for s in series] + [(Line2D([], [], color=INK), "expected")])
    return figure


def _bands(run: Run) -> list[tuple[float, float]]:
    """The 95 % band of each block's frequency; none for gates per sample, or where survival changes over the epochs.

    Gates per sample round the number of open samples of each step up or down, so that their frequency varies far less.
    """
    if run.granularity == "sample" or run.changes:
        return []
    bands = {prob: central_band(prob, run.num_steps) for prob in set(run.survival_probs)}
    return [bands[prob] for prob in run.survival_probs]


def _plot_epochs(axes: Axes, series: Sequence[_Series], value: Callable[[Epoch], float], *, log: bool = False) -> None:
    """A line per run over the epochs, and where the learning rate drops."""
    values = [[value(e) for e in s.run.epochs] for s in series]
    for s, line in zip(series, values, strict=True):
        marker = "o" if len(line) == 1 else None
        axes.plot(range(1, len(line) + 1), line, color=s.colour, linestyle=s.dashes, marker=marker)
    for place, *_ in _drops(series):
        axes.axvline(place, color=MUTED, linewidth=1, linestyle=":", zorder=0.5)
    positive = [v for line in values for v in line if v > 0]
    if log and positive:
        axes.set_yscale("log")
        spread = max(positive) / min(positive)
        # Powers of ten alone leave an axis of less than a decade without a number.
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if spread < 200 else (1,)) if spread > 5 else MaxNLocator(5)
        )
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(whole_numbers())
    axes.set_xlabel("epoch")


def whole_numbers() -> MaxNLocator:
    """Ticks of an axis of epochs or blocks."""
    return MaxNLocator(8, integer=True, steps=[1, 2, 5, 10])


def _plain(value: float, _position: int | None = None) -> str:
    """A number without an exponent: 0.00005. As a tick's label, it is told the tick's position too."""
    return f"{value:.10f}".rstrip("0").rstrip(".").replace("-", "\N{MINUS SIGN}")


def _drops(series: Sequence[_Series]) -> list[tuple[float, float, float]]:
    """Where the learning rate of any run drops by a step: (between which epochs, rate before, rate after).

    A step halves the rate at least, and has a plateau before or after it; a cosine has no steps.
    """
    found: set[tuple[float, float, float]] = set()
    for s in series:
        rates = [e.learning_rate for e in s.run.epochs]
        for i in range(1, len(rates)):
            before, after = rates[max(i - 2, 0) : i], rates[i : i + 2]
            plateau = len(set(before)) < len(before) or len(set(after)) < len(after)
            if plateau and after[0] <= before[-1] / 2:
                found.add((i + 0.5, before[-1], after[0]))
    return sorted(found)


def _runs_legend(figure: Figure, series: Sequence[_Series]) -> None:
    looks = {s.label: Line2D([], [], color=s.colour, linestyle=s.dashes) for s in series}
    legend(figure, [(look, label) for label, look in looks.items()])


def legend(figure: Figure, entries: Sequence[tuple[Line2D | Patch, str]]) -> None:
    """A legend above the panels, in as many columns as fit."""
    longest = max(len(name) for _, name in entries)
    num_rows = math.ceil(len(entries) / max(1, int(14 * figure.get_figwidth()) // (longest + 8)))
    handles = [handle for handle, _ in entries]
    drawn = figure.legend(
        handles, ["-"] * len(handles), loc="outside upper left", ncols=math.ceil(len(entries) / num_rows)
    )
    # Given at once, a name that starts with an underscore would be left out of the legend.
    for text, (_, name) in zip(drawn.get_texts(), entries, strict=True):
        text.set_text(name)
