"""A table or figure of the paper beside ours: several seeds of each run, and a verdict on each claim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stochastic_depth_lab.errors import ReportError
from stochastic_depth_lab.experiments.config import Experiment, Study
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.report.figures import Drawing, epochs_csv, save
from stochastic_depth_lab.report.page import html_page, link_to_page
from stochastic_depth_lab.report.study.claims import verdict_lines, verdicts_csv, verdicts_html, verdicts_on, wrapped
from stochastic_depth_lab.report.study.drawings import DRAWINGS, chosen_rates, rules_of_thumb
from stochastic_depth_lab.report.study.rows import read_rows, seeds_sentence, setting_line
from stochastic_depth_lab.report.study.table import cells_of, runs_csv, table_text
from stochastic_depth_lab.report.table import sortable_table
from stochastic_depth_lab.report.theme import figure_style


@dataclass(frozen=True)
class StudyReport:
    """What `write_study` wrote."""

    page: Path
    text: str
    """The table and the verdicts."""
    figures: tuple[Drawing, ...] = ()


def write_study(
    study: Study,
    folders: Sequence[tuple[Experiment, Path]],
    out: Path,
    baselines: Mapping[str, Sequence[float]] | None = None,
    *,
    run_pages: bool = True,
    width: int = 80,
) -> StudyReport:
    """Write `NAME.html`, which links to a page of each run, and its figures and data under `NAME/`.

    Args:
        study: the table or figure.
        folders: experiments, one for each seed, in the order of the table, with their run folders. Missing and
            unfinished runs are left out, and the page says so.
        out: output folder.
        baselines: test errors in percent, one per seed, of other methods on the same images.
        run_pages: whether to write pages of the runs, which takes many minutes for hundreds of runs.
        width: characters per line of the text.

    Raises:
        ReportError: if no run is finished.
    """
    seeds, remarks = read_rows(folders)
    rows = [row for row in seeds if row.runs]
    runs = [run for row in rows for run in row.runs]
    if not runs:
        raise ReportError(f"{study.name}: none of its {len(folders)} runs is finished")
    judged = verdicts_on(study, rows)
    found = [*chosen_rates(study, rows), *rules_of_thumb(study, rows)]
    others = {name: tuple(errors) for name, errors in (baselines or {}).items()}
    inner = out / study.name
    with figure_style():
        figures = [figure for name in study.figures for figure in DRAWINGS[name](rows)]
        for figure in figures:
            save(figure.figure, inner / "figures", figure.name)
        (inner / "data").mkdir(exist_ok=True, parents=True)
        tables = {"runs": runs_csv(rows, others), "epochs": epochs_csv(runs)}
        if judged:
            tables["verdicts"] = verdicts_csv(judged)
        for name, text in tables.items():
            write_whole(inner / "data" / f"{name}.csv", text.encode())
        page = out / f"{study.name}.html"
        lead = " ".join(part for part in (study.claim, seeds_sentence(rows), *found) if part)
        links: list[dict[str, str]] = [{} for _ in rows]
        if run_pages:
            links = [{f"seed {run.config['seed']}": link_to_page(run.folder, out) for run in row.runs} for row in rows]
        cells = cells_of(study, rows, others, lambda column: column.name)
        table = sortable_table(cells, links + [{} for _ in others]) + verdicts_html(judged, rows)
        write_whole(page, html_page(study.title, lead, table, remarks, figures, runs, tables).encode())
    regime = setting_line(rows)
    text = [*wrapped(study.title, width), *wrapped(regime, width), "", table_text(study, rows, others, width)]
    for each in judged:
        text += ["", *verdict_lines(each, rows, width)]
    for sentence in (*found, *remarks):
        text += ["", *wrapped(sentence, width)] if sentence in found else wrapped(sentence, width)
    return StudyReport(page, "\n".join(text), tuple(figures))
