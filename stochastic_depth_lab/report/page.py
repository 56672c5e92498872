"""The report: one self-contained page, with the figures and the data beside it."""

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import cast
from urllib.parse import quote
from xml.etree import ElementTree

from stochastic_depth_lab.errors import ReportError
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.report.evaluations import (
    ANALYSIS,
    analysis_csv,
    analysis_drawings,
    evaluation_drawings,
    evaluation_tables,
)
from stochastic_depth_lab.report.figures import (
    Drawing,
    drawings,
    epochs_csv,
    rendered,
    save,
    survival_csv,
)
from stochastic_depth_lab.report.runs import Run, labels, printable, read_runs
from stochastic_depth_lab.report.table import (
    NOTHING,
    constant_depth_of,
    html_table,
    is_index,
    remarks,
    summary_csv,
    time_share,
)
from stochastic_depth_lab.report.theme import CSS_NAMES, DARK, figure_style

_PAPER = "https://arxiv.org/abs/1603.09382"
_PAPER_TITLE = "Huang et al. 2016, Deep Networks with Stochastic Depth"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html`, `figures/` and `data/` into `out` and return the page's path.

    The page contains everything it shows, and is written last. For many runs it is an index that links to a page in
    each run's folder, which is written if it is missing or older than the run.

    Args:
        folders: the run folders to compare.
        out: output folder. None: the run's own, or the folder that holds all the runs.

    Raises:
        ReportError: if a folder holds no run to report on, or the report cannot be written.
    """
    runs = read_runs(folders)
    out = out or _own_folder(folders)
    try:
        with figure_style():
            index = is_index(runs)
            links = [link_to_page(folder, out) for folder in folders] if index else []
            figures = (*drawings(runs), *(() if index else (*analysis_drawings(runs), *evaluation_drawings(runs))))
            for figure in figures:
                save(figure.figure, out / "figures", figure.name)
            (out / "data").mkdir(exist_ok=True)
            tables = {"runs": summary_csv, "epochs": epochs_csv, "survival": survival_csv}
            if any(run.folder.joinpath(ANALYSIS).exists() for run in runs):
                tables["analysis"] = analysis_csv
            contents = {name: text(runs) for name, text in tables.items()}
            for table in evaluation_tables(runs):
                contents[table.stem] = table.read_text()
            for name, text in contents.items():
                write_whole(out / "data" / f"{name}.csv", text.encode("utf-8", "replace"))
            page = out / "report.html"
            write_whole(page, _page(runs, figures, links, contents).encode("utf-8", "replace"))
            return page
    except OSError as error:
        raise ReportError(f"the report cannot be written to {out}: {error.strerror}") from None


def _own_folder(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    parents = {folder.resolve().parent for folder in folders}
    if len(parents) > 1:
        raise ReportError("the runs are in different folders: choose the folder of their report with --out")
    return parents.pop()


def link_to_page(folder: Path, index: Path) -> str:
    """The link from a page in `index` to that of a run, which is written if it is missing or older than the run."""
    page = folder / "report.html"
    written = page.stat().st_mtime_ns if page.exists() else 0
    sources = [folder / name for name in ("metrics.jsonl", "result.json", ANALYSIS)]
    if any(source.stat().st_mtime_ns > written for source in sources if source.exists()):
        write_report([folder])
    return quote(Path(os.path.relpath(page, index)).as_posix())


def _page(runs: Sequence[Run], figures: Sequence[Drawing], links: Sequence[str], tables: Mapping[str, str]) -> str:
    return html_page(_title(runs), _lead(runs), html_table(runs, links), remarks(runs), figures, runs, tables)


def html_page(
    title: str,
    lead: str,
    table: str,
    remarks: Sequence[str],
    figures: Sequence[Drawing],
    runs: Sequence[Run],
    tables: Mapping[str, str],
) -> str:
    """A self-contained page; call it inside `figure_style`.

    Args:
        title: title of the page.
        lead: its message, in a few sentences.
        table: as HTML.
        remarks: notes below the table.
        figures: figures below the table.
        runs: their configurations and environments are listed at the end.
        tables: content of the figures' CSV files by name.
    """
    template = Template(
        resources.files("stochastic_depth_lab.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.substitute(
        title=escape(title),
        light=_variables({name: color for color, name in CSS_NAMES.items()}),
        dark=_variables(DARK),
        lead=escape(lead),
        about=_about(runs),
        table=table,
        remarks="".join(f"<li>{escape(remark)}</li>" for remark in remarks),
        figures="\n".join(_figure(figure, tables) for figure in figures),
        configuration=_settings(runs, [_flat(run.config) for run in runs], leave_out=("name", "title", "published")),
        environment=_settings(runs, [_flat(run.environment) for run in runs]),
    )


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return printable(str(runs[0].config.get("title") or runs[0].name))
    kinds = {run.stochastic for run in runs}
    return "Constant and stochastic depth, side by side" if len(kinds) == 2 else f"{len(runs)} runs, side by side"


def _lead(runs: Sequence[Run]) -> str:
    """The comparison in a sentence if there is one, otherwise an overview."""
    stochastic = [run for run in runs if run.stochastic]
    constant = constant_depth_of(stochastic[0], runs) if len(runs) == 2 and len(stochastic) == 1 else None
    if constant:
        run, share = stochastic[0], time_share(stochastic[0], runs)
        time = f" Training took {share:.3f} of the time" if share else " Training"
        if share and run.expected_time:
            time += f" (expected {run.expected_cost:.3f} of FLOPs, {run.expected_time:.3f} of time)"
        return (
            f"Test error {run.test_error:.2f} % with stochastic depth, {constant.test_error:.2f} % with constant depth."
            f"{time} and {run.realized_cost:.3f} of the FLOPs. One run of each (n = 1): this does not show how "
            "much such runs differ between seeds."
        )
    if len(runs) == 1:
        kind = "stochastic" if runs[0].stochastic else "constant"
        return f"Test error {runs[0].test_error:.2f} % with {kind} depth, after epoch {runs[0].best_epoch}."
    pages = " Each has its own page with more figures." if is_index(runs) else ""
    return f"{len(runs)} runs, {len(stochastic)} of them with stochastic depth.{pages}"


def _about(runs: Sequence[Run]) -> str:
    """Data, network, length, method and date, as HTML, for readers who have only the page."""

    def different(words: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(escape(printable(str(word))) for word in words if word is not None))

    def setting(run: Run, part: str, name: str) -> object:
        fields = run.config.get(part)
        return cast("Mapping[str, object]", fields).get(name) if isinstance(fields, Mapping) else None

    facts = {
        "Data": different(setting(run, "data", "dataset") for run in runs),
        "Network": different(f"ResNet, {setting(run, 'model', 'num_layers')} layers" for run in runs),
        "Epochs": different(setting(run, "recipe", "epochs") for run in runs),
        "Method": different(_method(run) for run in runs),
        "Trained": different(str(run.environment["started"])[:10] for run in runs if "started" in run.environment),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items() if text)
    return f'<dl class="about">{rows}<dt>Paper</dt><dd><a href="{_PAPER}">{_PAPER_TITLE}</a></dd></dl>'


def _method(run: Run) -> str:
    depth = run.config.get("depth")
    if not isinstance(depth, Mapping):
        return "constant depth"
    fields = cast("Mapping[str, object]", depth)
    schedule = str(fields.get("schedule", "")).replace("_", " ")
    return f"stochastic depth ({schedule} to {fields.get('final_survival_prob')}, one gate per {run.granularity})"


def _figure(drawing: Drawing, tables: Mapping[str, str]) -> str:
    wide = inline_svg(rendered(drawing.figure, "svg", transparent=True), drawing.name, drawing.title)
    if drawing.narrow is None:
        shown = f'<div class="wide">{wide}</div>'
    else:
        narrow = rendered(drawing.narrow, "svg", transparent=True)
        narrow = inline_svg(narrow, f"{drawing.name}-narrow", drawing.title)
        shown = f'<div class="wide wide-only">{wide}</div><div class="narrow-only">{narrow}</div>'
    contents = {
        f"{drawing.name}.svg": rendered(drawing.figure, "svg"),
        f"{drawing.name}.png": rendered(drawing.figure, "png"),
        f"{drawing.data}.csv": tables[drawing.data].encode("utf-8", "replace"),
    }
    links = [_download(name, content) for name, content in contents.items()]
    return (
        f"<figure>\n<h2>{escape(drawing.title)}</h2>\n{shown}\n"
        f'<figcaption>{escape(drawing.caption)} <span class="files">{" · ".join(links)}</span></figcaption>\n</figure>'
    )


def _download(name: str, content: bytes) -> str:
    """A link that contains its file, so that it works in a page that was mailed."""
    ending = name.rpartition(".")[2]
    kind = {"svg": "image/svg+xml", "png": "image/png", "csv": "text/csv"}[ending]
    data = base64.b64encode(content).decode()
    return f'<a download="{escape(name)}" href="data:{kind};base64,{data}">{ending.upper()}</a>'


def _settings(runs: Sequence[Run], settings: Sequence[Mapping[str, str]], leave_out: Sequence[str] = ()) -> str:
    """The settings in which the runs differ, with a column for each; the common settings are folded."""
    every = dict.fromkeys(key for flat in settings for key in flat if key.partition(".")[0] not in leave_out)
    values = {key: [flat.get(key, NOTHING) for flat in settings] for key in every}
    same = {key: row[:1] for key, row in values.items() if len(set(row)) == 1}
    different = {key: row for key, row in values.items() if key not in same}
    if len(runs) == 1:
        return _rows(same)
    return (
        _rows(different, labels(runs)) if different else "<p>Nothing differs.</p>"
    ) + f"<details><summary>The same for all runs ({len(same)})</summary>{_rows(same)}</details>"


def _rows(values: Mapping[str, Sequence[str]], head: Sequence[str] = ()) -> str:
    top = "".join(f'<th scope="col">{escape(label)}</th>' for label in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(printable(key))}</th>'
        + "".join(f"<td>{escape(printable(value))}</td>" for value in row)
        + "</tr>"
        for key, row in values.items()
    )
    return (
        '<div class="wide"><table class="settings">'
        + (f"<thead><tr><td></td>{top}</tr></thead>" if head else "")
        + f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _flat(settings: Mapping[str, object], above: str = "") -> dict[str, str]:
    """Nested settings as `recipe.batch_size: 128`, without those that are null: they are shown as missing."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(cast("dict[str, object]", value), f"{above}{key}.")
        elif (
            isinstance(value, list) and value and all(isinstance(entry, dict) for entry in cast("list[object]", value))
        ):
            # The environments in which a run was resumed.
            flat[above + key] = f"{len(cast('list[object]', value))} times"
        elif value is not None:
            flat[above + key] = str(value)
    return flat


def _variables(colors: Mapping[str, str]) -> str:
    return " ".join(f"{name}: {color};" for name, color in colors.items())


def inline_svg(svg: bytes, name: str, title: str) -> str:
    """The `<svg>` element of a file drawn in the colors of `theme`.

    Args:
        svg: the file, drawn without a background.
        name: prefix of every identifier: those of a page's figures must differ.
        title: for screen readers.
    """
    # Parsed, not searched: a run's name may look like an attribute or a color.
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            # The page has its own style; the figure's would apply to all of it.
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _with_prefix(value, name) for key, value in element.attrib.items()}
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _with_prefix(value: str, name: str) -> str:
    value = re.sub(r"^#(?![0-9a-f]{6}$)|(?<=url\()#", f"#{name}-", value)
    return re.sub(r"#[0-9a-f]{6}(?![\w-])", _variable, value)


def _variable(color: re.Match[str]) -> str:
    """The style sheet's name for a color of `theme`; the colors of a heat map stay."""
    name = CSS_NAMES.get(color.group())
    return f"var({name})" if name else color.group()
