"""The verdict on each claim of a study, as text, HTML and CSV."""

import textwrap
from collections.abc import Sequence
from html import escape

from stochastic_depth_lab.experiments.config import Comparison, Study
from stochastic_depth_lab.report.study.rows import Seeds, short_titles
from stochastic_depth_lab.report.study.verdicts import RULE, Judged, Paired, judge
from stochastic_depth_lab.report.table import records_csv


def verdicts_on(study: Study, rows: Sequence[Seeds]) -> list[Judged]:
    """The verdict on each claim that these runs can test."""
    judged = [judge(claim, _paired(claim.comparisons, rows)) for claim in study.claims]
    return [each for each in judged if each.paired]


def _paired(comparisons: Sequence[Comparison], rows: Sequence[Seeds]) -> list[Paired]:
    by_name = {row.experiment.name: row for row in rows}
    found: list[Paired] = []
    for comparison in comparisons:
        if comparison.less in by_name and comparison.more in by_name:
            less, more = (
                {run.config["seed"]: by_name[name].measured(run, comparison.measure) for run in by_name[name].runs}
                for name in (comparison.less, comparison.more)
            )
            if common := [seed for seed in less if seed in more]:
                found.append(Paired(comparison, tuple(less[seed] - more[seed] for seed in common)))
    return found


_UNITS = {"test_error": " points", "train_loss": "", "process_s": " s", "late_gradient": ""}


_MEASURES = {
    "test_error": "test error",
    "train_loss": "training loss",
    "process_s": "process time",
    "late_gradient": "gradient after the rate drops",
}


def verdict_lines(judged: Judged, rows: Sequence[Seeds], width: int) -> list[str]:
    """The verdict as plain text."""
    lines = wrapped(f"{judged.verdict.upper()}: {judged.claim.text}", width)
    for paired in judged.paired:
        lines += wrapped(f"- {_sentence(paired, rows)}", width, indent="  ")
    return lines


def _sentence(paired: Paired, rows: Sequence[Seeds]) -> str:
    short = short_titles(rows)
    comparison, n = paired.comparison, len(paired.differences)
    form = ".4f" if comparison.measure in ("train_loss", "late_gradient") else ".2f"
    interval = ""
    if n > 1:
        low, high = paired.mean - paired.half_width, paired.mean + paired.half_width
        interval = f" (95 % interval {low:+{form}} to {high:+{form}})"
    p = (
        f"p = {_p(paired.p)} (paired t), {_p(paired.exact_p)} (exact sign flips)"
        if n > 2
        else "too few seeds for a test"
    )
    return (
        f"{_MEASURES[comparison.measure]}, {short[comparison.less]} minus {short[comparison.more]}: "
        f"{paired.mean:+{form}}{_UNITS[comparison.measure]}{interval}; lower in {paired.num_wins} of {n} seeds; {p}"
    )


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def verdicts_html(judged: Sequence[Judged], rows: Sequence[Seeds]) -> str:
    """The verdicts and their numbers as a section of the page."""
    if not judged:
        return ""
    items = "".join(
        f"<li><strong>{each.verdict}</strong>: {escape(each.claim.text)}<ul>"
        + "".join(f"<li>{escape(_sentence(paired, rows))}</li>" for paired in each.paired)
        + "</ul></li>"
        for each in judged
    )
    return f'<h2>Verdicts</h2>\n<ul class="verdicts">{items}</ul>\n<p>{escape(RULE)}</p>'


def verdicts_csv(judged: Sequence[Judged]) -> str:
    """The verdicts and their numbers, a line for each comparison."""
    rows = [
        {
            "claim": each.claim.text,
            "verdict": each.verdict,
            "less": paired.comparison.less,
            "more": paired.comparison.more,
            "measure": paired.comparison.measure,
            "seeds": len(paired.differences),
            "mean_difference": paired.mean,
            "half_width_95": paired.half_width if len(paired.differences) > 1 else None,
            "num_lower": paired.num_wins,
            "p_paired_t": paired.p,
            "p_exact_sign_flip": paired.exact_p,
        }
        for each in judged
        for paired in each.paired
    ]
    return records_csv(rows)


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most 100 characters, on a wide terminal too."""
    return textwrap.wrap(text, min(width, 100), initial_indent=indent, subsequent_indent=indent + "  " * bool(indent))
