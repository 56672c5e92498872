"""Shows a controller as text, as a table in a notebook, or as a plot."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 80
_MOST_ROWS = 8
"""Models with more branches are shown by stage."""


@dataclass(frozen=True)
class GateInfo:
    """The gate of one branch.

    Attributes:
        name: name of the branch.
        survival_prob: probability that the gate is open, in (0, 1].
        treatment: what a closed gate does. "skip": the branch does not run. "subset": the branch runs on the samples
            whose gates are open. "mask": the branch runs and its output is multiplied by the gate. "always runs": the
            gate is never closed.
        cause: why the branch is masked; empty if it is not.
        frequency: share of the samples for which the gate was open, over all draws of this process; None before the
            first.
    """

    name: str
    survival_prob: float
    treatment: str
    cause: str = ""
    frequency: float | None = None


@dataclass(frozen=True)
class Overview:
    """The contents of `print(depth)`, of the notebook table and of the plot.

    Attributes:
        gates: the model's gates.
        expected_depth: expected number of branches that run in a training step.
        flops_share: expected share of the training FLOPs of constant depth; None if the cost was not counted.
        settings: the other arguments of `make_stochastic_`.
        notes: what was found but is not a branch, each as "name: reason".
        num_draws: number of draws in this process.
        remarks: lines below the settings.
    """

    gates: Sequence[GateInfo]
    expected_depth: float
    flops_share: float | None
    settings: Mapping[str, object]
    notes: Sequence[str]
    num_draws: int
    remarks: Sequence[str] = ()

    @property
    def skipped_share(self) -> float:
        """Share of the branch runs that an average training step skips."""
        return sum(1 - gate.survival_prob for gate in self.gates if gate.treatment != "mask") / len(self.gates)

    @property
    def headline(self) -> str:
        """The model in one line."""
        branches = "1 branch" if len(self.gates) == 1 else f"{len(self.gates)} branches"
        return (
            f"{branches}, expected depth {self.expected_depth:.2f}: an average step skips "
            f"{self.skipped_share:.1%} of branch runs"
        )

    @property
    def cost(self) -> str:
        """The cost in one line; empty if it was not counted."""
        return "" if self.flops_share is None else f"training FLOPs: {self.flops_share:.1%} of constant depth"

    @property
    def details(self) -> list[str]:
        """Lines below the table: settings, causes of masks, and what is not a branch."""
        settings = ", ".join(f"{name} {value!r}" for name, value in self.settings.items())
        masked = [f"{gate.name}: mask, nothing is saved: {gate.cause}" for gate in self.gates if gate.cause]
        return [
            *textwrap.wrap(settings, _WIDTH),
            *self.remarks,
            *_without_repetitions(masked),
            *(f"no branch: {note}" for note in _without_repetitions(self.notes)),
        ]


# ------------------------------------------------------------------------------------------ stages


@dataclass(frozen=True)
class Stage:
    """Gates that are shown in one row.

    Attributes:
        label: what their names have in common, such as `blocks.1-11.drop_path*`.
        gates: the gates.
    """

    label: str
    gates: Sequence[GateInfo]

    @property
    def survival(self) -> str:
        """Survival probability of the first and the last gate, or the lowest and the highest if it goes up and down."""
        probs = [gate.survival_prob for gate in self.gates]
        ends = (probs[0], probs[-1]) if probs in (sorted(probs), sorted(probs)[::-1]) else (min(probs), max(probs))
        return f"{ends[0]:.4f}" if ends[0] == ends[1] else f"{ends[0]:.4f} to {ends[1]:.4f}"

    @property
    def survival_prob(self) -> float:
        """Mean of the survival probabilities."""
        return sum(gate.survival_prob for gate in self.gates) / len(self.gates)

    @property
    def frequency(self) -> float | None:
        """Mean of the frequencies; None before the first draw."""
        frequencies = [gate.frequency for gate in self.gates if gate.frequency is not None]
        return sum(frequencies) / len(frequencies) if frequencies else None


def stages(gates: Sequence[GateInfo]) -> list[Stage]:
    """The rows of a table: one per gate, or, if there are many gates, one per stage of the network and treatment.

    A stage is a run of modules that a number in their names tells apart, such as `layers.2.blocks.0`,
    `layers.2.blocks.1`, ...
    """
    if len(gates) <= _MOST_ROWS:
        return [Stage(gate.name, [gate]) for gate in gates]
    split = _split_at_number([gate.name for gate in gates])
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, gate in enumerate(gates):
        rows.setdefault((split[index][0], gate.treatment), []).append(index)
    return [Stage(_label([split[index] for index in row]), [gates[index] for index in row]) for row in rows.values()]


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.#])")


def _split_at_number(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Split each name at the number that counts the blocks of a stage: text before, number, text after.

    That number is the last one in the name that differs between names of the same form.
    """
    numbers = [_NUMBER.findall(name) for name in names]
    forms = [_NUMBER.sub("*", name) for name in names]
    differs: dict[tuple[str, int], set[str]] = {}
    for form, found in zip(forms, numbers, strict=True):
        for place, number in enumerate(found):
            differs.setdefault((form, place), set()).add(number)
    split: list[tuple[str, str, str]] = []
    for name, form in zip(names, forms, strict=True):
        matches = list(_NUMBER.finditer(name))
        counting = [match for place, match in enumerate(matches) if len(differs[form, place]) > 1]
        if counting:
            split.append((name[: counting[-1].start()], counting[-1].group(), name[counting[-1].end() :]))
        else:
            split.append((name, "", ""))
    return split


def _label(split: Sequence[tuple[str, str, str]]) -> str:
    before, number, rest = split[0]
    if len(split) == 1:
        return before + number + rest
    numbers = sorted({int(number) for _, number, _ in split})
    rests = sorted({rest for _, _, rest in split})
    shared = rests[0]
    while not all(rest.startswith(shared) for rest in rests):
        shared = shared[:-1]
    return f"{before}{_ranges(numbers)}{shared}{'*' if len(rests) > 1 else ''}"


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _without_repetitions(lines: Sequence[str]) -> list[str]:
    """Merge lines "name: reason" that have the same reason."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        name, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]


# ------------------------------------------------------------------------------------------ text


def as_text(overview: Overview) -> str:
    """The overview for `print`."""
    rows = stages(overview.gates)
    with_count = len(rows) < len(overview.gates)
    table = [["branch", "count", "survival", "treatment"]]
    table += [[row.label, str(len(row.gates)), row.survival, row.gates[0].treatment] for row in rows]
    if not with_count:
        table = [[cells[0], *cells[2:]] for cells in table]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    lines = [overview.headline, overview.cost] if overview.cost else [overview.headline]
    for cells in table:
        aligned = [
            cell.rjust(width) if with_count and column == 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, *overview.details])


# ------------------------------------------------------------------------------------------ notebook

# Colors are shades of the notebook's own, so that the table is readable on white and on black.
_STYLE = """
.stochastic-depth { max-width: 56em; overflow-x: auto; font-size: 13px; line-height: 1.5; }
.stochastic-depth > div { min-width: 44em; }
.stochastic-depth table { width: 100%; table-layout: fixed; border-collapse: collapse; margin: 0; font-size: inherit; }
.stochastic-depth table tr, .stochastic-depth table tr:nth-child(even) { background: none; }
.stochastic-depth th, .stochastic-depth td, .stochastic-depth summary > span {
  text-align: left; padding: 2px 6px; overflow-wrap: anywhere; vertical-align: middle; }
.stochastic-depth summary {
  display: grid; grid-template-columns: 34% 24% 18% 11% 13%; align-items: center; cursor: pointer; }
.stochastic-depth summary > span:first-child::before { content: "\\25B8\\00A0"; }
.stochastic-depth details[open] > summary > span:first-child::before { content: "\\25BE\\00A0"; }
.stochastic-depth details, .stochastic-depth td { border-top: 1px solid rgba(128, 128, 128, 0.3); }
.stochastic-depth details td:first-child { padding-left: 20px; }
.stochastic-depth .track { display: block; position: relative; height: 10px; background: rgba(128, 128, 128, 0.25); }
.stochastic-depth .fill { display: block; height: 10px; background: #4a83d4; }
.stochastic-depth .mark { position: absolute; top: -2px; width: 3px; height: 14px; background: #e08a1e; }
.stochastic-depth .small { opacity: 0.75; }
"""

_COLUMNS = "<colgroup>" + "".join(f'<col style="width:{width}%">' for width in (34, 24, 18, 11, 13)) + "</colgroup>"


def as_html(overview: Overview) -> str:
    """The overview as a table for notebooks, with a bar for each survival probability, folded by stage if long."""
    header = "".join(f"<th>{name}</th>" for name in ("branch", "", "survival", "observed", "treatment"))
    parts = [
        f"<p><b>Average saving: {_saving(overview)}</b></p>",
        _bar(overview.skipped_share, None, f"{overview.skipped_share:.1%} of branch runs skipped"),
        f"<p>{html.escape(overview.headline)}</p>",
        f"<table>{_COLUMNS}<thead><tr>{header}</tr></thead></table>",
    ]
    for row in stages(overview.gates):
        rows = ["".join(f"<td>{cell}</td>" for cell in _cells(Stage(gate.name, [gate]))) for gate in row.gates]
        table = f"<table>{_COLUMNS}<tbody>{''.join(f'<tr>{cells}</tr>' for cells in rows)}</tbody></table>"
        if len(row.gates) > 1:
            summary = " ".join(f"<span>{cell}</span>" for cell in _cells(row))
            table = f"<details><summary>{summary}</summary>{table}</details>"
        parts.append(table)
    if overview.num_draws:
        parts.append(f'<p class="small">Orange: observed frequency over {_steps(overview.num_draws)}.</p>')
    parts.append(f'<p class="small">{"<br>".join(map(html.escape, overview.details))}</p>')
    return f'<div class="stochastic-depth"><style>{_STYLE}</style><div>{"".join(parts)}</div></div>'


def _saving(overview: Overview) -> str:
    saving = f"{overview.skipped_share:.1%} of branch runs"
    return saving if overview.flops_share is None else f"{saving}, {1 - overview.flops_share:.1%} of training FLOPs"


def _cells(row: Stage) -> list[str]:
    count = f" ({len(row.gates)})" if len(row.gates) > 1 else ""
    return [
        f"<code>{html.escape(row.label)}</code>{count}",
        _bar(row.survival_prob, row.frequency, row.survival),
        row.survival,
        "" if row.frequency is None else f"{row.frequency:.3f}",
        html.escape(row.gates[0].treatment),
    ]


def _bar(share: float, mark: float | None, title: str) -> str:
    marked = "" if mark is None else f'<span class="mark" style="left:calc({mark:.2%} - 2px)"></span>'
    return (
        f'<span class="track" title="{html.escape(title)}">'
        f'<span class="fill" style="width:{share:.2%}"></span>{marked}</span>'
    )


def _steps(num_draws: int) -> str:
    return "1 training step" if num_draws == 1 else f"{num_draws:,} training steps"


# ------------------------------------------------------------------------------------------ plot


def plot(overview: Overview, ax: Axes | None = None) -> Axes:
    """Plot survival probabilities, and how often the gates were open.

    Args:
        overview: the contents.
        ax: axes to draw in; None makes a new figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("depth.plot() needs matplotlib: pip install matplotlib", name="matplotlib") from None
    axes: Any = plt.subplots(figsize=(8, 3.2), layout="constrained")[1] if ax is None else ax
    gates = overview.gates
    places = list(range(len(gates)))
    axes.bar(places, [gate.survival_prob for gate in gates], color="#4a83d4", alpha=0.5, label="survival probability")
    frequencies = [gate.frequency for gate in gates]
    if overview.num_draws:
        label = f"observed frequency, {_steps(overview.num_draws)}"
        axes.plot(places, frequencies, "o", markersize=4, color="#e08a1e", label=label)
    # Names of single branches would overlap in a long model, so each stage has one label in its middle.
    rows = stages(gates)
    place_of = {gate.name: place for place, gate in enumerate(gates)}
    middles = [sum(place_of[gate.name] for gate in row.gates) / len(row.gates) for row in rows]
    tilt = {"rotation": 30, "ha": "right"} if len(rows) > 4 else {}
    axes.set_xticks(middles, [row.label for row in rows], fontsize="small", **tilt)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("probability of running")
    axes.set_title(overview.headline, fontsize="medium")
    axes.legend(loc="lower left", fontsize="small")
    return axes
