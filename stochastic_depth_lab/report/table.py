"""The side-by-side table, as text, HTML and CSV."""

import csv
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape

from stochastic_depth_lab.experiments.config import Regularizers
from stochastic_depth_lab.report.runs import Run, labels, printable

NOTHING = "\N{EN DASH}"
_MOST_COLUMNS = 6
"""Largest number of runs side by side; more become rows of an index."""
_SORTING = """\
<script>
// A click on a column head sorts by it, numbers as numbers; a second click reverses the order.
for (const head of document.querySelectorAll("table.sortable thead th")) {
  head.style.cursor = "pointer";
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const value = row => row.cells[column].textContent.replaceAll(",", "");
    const order = head.dataset.order = head.dataset.order === "1" ? "-1" : "1";
    const compare = (a, b) => parseFloat(value(a)) - parseFloat(value(b)) || value(a).localeCompare(value(b));
    body.append(...[...body.rows].sort((a, b) => order * compare(a, b)));
  });
}
</script>
"""
_NO_REGULARIZERS = asdict(Regularizers())
_HARDWARE = ("cpu", "num_threads", "device", "gpu")


@dataclass(frozen=True)
class Row:
    """One quantity of every run; None for runs without it. `key` is its name in CSV files."""

    key: str
    label: str
    form: Callable[[float], str]
    values: tuple[float | None, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The values as shown."""
        return tuple(NOTHING if value is None else self.form(value) for value in self.values)


def rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    """The rows of the table, with the published results if there are any."""

    def row(key: str, label: str, form: Callable[[float], str], value: Callable[[Run], float | None]) -> Row:
        return Row(key, label, form, tuple(value(run) for run in runs))

    published = row(
        "published_test_error",
        "published test error, %",
        _two_decimals,
        lambda r: r.published and r.published.test_error,
    )
    table = (
        row("test_error", "test error at lowest validation error, %", _two_decimals, lambda r: r.test_error),
        published,
        row("final_test_error", "final test error, %", _two_decimals, lambda r: r.epochs[-1].test_error),
        row("validation_error", "lowest validation error, %", _two_decimals, lambda r: r.validation_error),
        row("best_epoch", "reached at epoch", _count, lambda r: r.best_epoch),
        row("epochs", "epochs", _count, lambda r: len(r.epochs)),
        row("train_s", "training time, s", _seconds, lambda r: r.train_s),
        row("time_share", "training time per epoch, share of constant depth", _share, lambda r: time_share(r, runs)),
        row("expected_time", "expected time if closed blocks take none, share", _share, lambda r: r.expected_time),
        row("expected_depth", "expected depth, blocks", _two_decimals, lambda r: r.expected_depth),
        row("realized_depth", "realized depth, blocks", _two_decimals, lambda r: r.realized_depth),
        row("expected_cost", "expected cost, share of training FLOPs", _share, lambda r: r.expected_cost),
        row("realized_cost", "realized cost, share of training FLOPs", _share, lambda r: r.realized_cost),
        row("first_conv_grad", "mean |gradient| of first convolution", _three_digits, lambda r: r.first_conv_grad),
        row("num_parameters", "parameters", _count, lambda r: r.result and r.result.num_parameters),
    )
    return tuple(r for r in table if r is not published or any(v is not None for v in published.values))


def constant_depth_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The constant-depth run of the same network, data and batch, without regularizers.

    One of the same seed is preferred, and among these one of the same length.
    """
    same = [
        other
        for other in runs
        if not other.stochastic
        and other.config.get("regularizers") in (None, _NO_REGULARIZERS)
        and all(other.config.get(key) == run.config.get(key) for key in ("model", "data"))
        and _batch_size(other) == _batch_size(run)
    ]
    return min(
        same,
        key=lambda other: (other.config.get("seed") != run.config.get("seed"), _length(other) != _length(run)),
        default=None,
    )


def _batch_size(run: Run) -> object:
    return _of_recipe(run, "batch_size")


def _length(run: Run) -> tuple[object, object]:
    return _of_recipe(run, "epochs"), _of_recipe(run, "epoch_passes")


def _of_recipe(run: Run, key: str) -> object:
    recipe = run.config.get("recipe")
    return recipe.get(key) if isinstance(recipe, Mapping) else None


def time_share(run: Run, runs: Sequence[Run]) -> float | None:
    """Training time relative to constant depth; per epoch, because a run may be unfinished."""
    constant = constant_depth_of(run, runs)
    if constant is None or constant.train_s == 0:
        return None
    return (run.train_s / len(run.epochs)) / (constant.train_s / len(constant.epochs))


def remarks(runs: Sequence[Run]) -> tuple[str, ...]:
    """Notes on the numbers: missing values, differences in hardware, sources of published results."""
    named = tuple(zip(labels(runs), runs, strict=True))
    notes = [f"{label}: {note}" for label, run in named for note in run.notes]
    sources = [
        f"{label}: published test error {_two_decimals(run.published.test_error)} %, {printable(run.published.source)}"
        for label, run in named
        if run.published
    ]
    return (*notes, *_timing_warnings(named, runs), *sources)


def _timing_warnings(named: Sequence[tuple[str, Run]], runs: Sequence[Run]) -> list[str]:
    """Warnings about runs whose time is compared with that of another machine or precision."""
    warnings: list[str] = []
    for label, run in named:
        if constant := constant_depth_of(run, runs):
            keys = [k for k in _HARDWARE if run.environment.get(k) != constant.environment.get(k)]
            keys += ["precision"] if run.config.get("precision") != constant.config.get("precision") else []
            if keys:
                warnings.append(f"{label}: its time is compared across a difference in {', '.join(keys)}")
    return warnings


def text_table(runs: Sequence[Run], width: int = 80) -> str:
    """The table as aligned plain text, its remarks below.

    Args:
        runs: the runs: a column each, or a row each if they are many.
        width: characters per line; labels are wrapped.
    """
    table = rows(runs)
    if is_index(runs):
        known = [row for row in table if any(value is not None for value in row.values)]
        by_run = zip(labels(runs), *(row.cells for row in known), strict=True)
        text = fitted([*_heads([row.label for row in known]), *by_run], width, least=width // 2)
    else:
        text = fitted([["", *labels(runs)], *([row.label, *row.cells] for row in table)], width)
    notes = [textwrap.fill(remark, width, subsequent_indent="  ") for remark in remarks(runs)]
    return "\n\n".join([text, *(["\n".join(notes)] if notes else [])])


def _heads(names: Sequence[str]) -> list[list[str]]:
    """The heads of columns of numbers, broken into lines that end at the bottom."""
    broken = [textwrap.wrap(name, _WIDEST_HEAD) for name in names]
    height = max(map(len, broken))
    return [["", *(([""] * (height - len(name)) + name)[i] for name in broken)] for i in range(height)]


_WIDEST_HEAD = 12


def fitted(lines: Sequence[Sequence[str]], width: int, least: int = 24) -> str:
    """Rows of a label and cells as aligned plain text in which no line is too long.

    Labels are broken into lines, and columns that do not fit side by side follow below.

    Args:
        lines: head and rows.
        width: characters of a line.
        least: how many of them labels get at least, if they are so long.

    Example:
        >>> print(fitted([["", "error", "time"], ["constant depth, all layers", "12.50", "1.00"]], 32))
                             error
        constant depth, all
        layers               12.50
        <BLANKLINE>
                                    time
        constant depth, all layers  1.00
    """
    titles, *columns = zip(*lines, strict=True)
    least = min(least, max(map(len, titles)))
    blocks: list[str] = []
    while columns:
        count = 1
        while count < len(columns) and _widths(columns[: count + 1]) + least <= width:
            count += 1
        shown, columns = columns[:count], columns[count:]
        room = max(width - _widths(shown), least)
        broken: list[list[str]] = []
        for title, *cells in zip(titles, *shown, strict=True):
            *above, last = textwrap.wrap(title, room) or [""]
            broken += [[part, *[""] * count] for part in above]
            broken.append([last, *cells])
        # A head of several lines may be shorter in these columns.
        blocks.append(aligned([line for line in broken if any(line)], left=1))
    return "\n\n".join(blocks)


def _widths(columns: Sequence[Sequence[str]]) -> int:
    return sum(2 + max(map(len, column)) for column in columns)


def aligned(cells: Sequence[Sequence[str]], left: int = 0) -> str:
    """Rows of cells as text, columns two spaces apart, numbers to the right.

    Args:
        cells: head and rows.
        left: number of columns that are aligned to the left.

    Example:
        >>> print(aligned([["block", "error"], ["first", "1.50"], ["last", "12.25"]], left=1))
        block  error
        first   1.50
        last   12.25
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def sortable_table(cells: Sequence[Sequence[str]], links: Sequence[Mapping[str, str]] = ()) -> str:
    """Head and rows as escaped HTML; a click on a column head sorts.

    Args:
        cells: head and rows.
        links: for each row, links by their words: the first cell itself, or words after it. Empty: no links.
    """
    head, *body = cells
    names = [_linked(first, of_row) for (first, *_), of_row in zip(body, links or [{}] * len(body), strict=True)]
    return (
        '<table class="sortable">\n<thead><tr>'
        + "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        + "</tr></thead>\n<tbody>\n"
        + "\n".join(
            f'<tr><th scope="row">{name}</th>'
            + "".join(f"<td>{escape(_unbroken(cell))}</td>" for cell in rest)
            + "</tr>"
            for name, (_, *rest) in zip(names, body, strict=True)
        )
        + f"\n</tbody>\n</table>\n{_SORTING}"
    )


def _linked(name: str, links: Mapping[str, str]) -> str:
    anchors = {word: f'<a href="{escape(link)}">{escape(word)}</a>' for word, link in links.items()}
    own = anchors.pop(name, escape(name))
    return f'{own} <span class="files">{" · ".join(anchors.values())}</span>' if anchors else own


def _unbroken(cell: str) -> str:
    """The cell without line breaks between a mean and its deviation."""
    return cell.replace(" \N{PLUS-MINUS SIGN} ", "\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}")


def is_index(runs: Sequence[Run]) -> bool:
    """Whether there are too many runs to show side by side: then each gets a row and its own page."""
    return len(runs) > _MOST_COLUMNS


def html_table(runs: Sequence[Run], links: Sequence[str] = ()) -> str:
    """The table as escaped HTML, with a column for each run, or a row if there are many.

    Args:
        runs: the runs.
        links: their pages, if there are many.
    """
    if is_index(runs):
        table = rows(runs)
        by_run = zip(labels(runs), *(row.cells for row in table), strict=True)
        cells = [["run", *(row.label for row in table)], *map(list, by_run)]
        return sortable_table(
            cells, [{label: link} for label, link in zip(labels(runs), links, strict=True)] if links else ()
        )
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels(runs))
    body = "\n".join(
        f'<tr class="{row.key}"><th scope="row">{escape(row.label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells)
        + "</tr>"
        for row in rows(runs)
    )
    return f"<table>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def csv_text(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Lines of a CSV file, numbers at full precision, nothing for None."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *lines])
    return file.getvalue()


def records_csv(records: Sequence[Mapping[str, object]]) -> str:
    """A CSV file of records by column name. The first one has all columns; later ones may lack some."""
    header = list(records[0]) if records else []
    return csv_text(header, [[record.get(name) for name in header] for record in records])


def summary_csv(runs: Sequence[Run]) -> str:
    """One line per run, one column per row of the table, numbers at full precision."""
    table = rows(runs)
    return csv_text(
        ["run", *(row.key for row in table)],
        [[label, *(row.values[i] for row in table)] for i, label in enumerate(labels(runs))],
    )


def _two_decimals(value: float) -> str:
    return f"{value:.2f}"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")
