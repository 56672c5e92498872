"""The page: complete, self-contained, safe for any name of a run, the same every time."""

import base64
import csv
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from stochastic_depth_lab.report import ReportError, table, write_report
from stochastic_depth_lab.report import page as page_module
from stochastic_depth_lab.report.reliability import Bin, Reliability, read_reliability, write_reliability
from stochastic_depth_lab.report.subnetwork_curve import Point, write_curve
from stochastic_depth_lab.report.theme import CSS_NAMES, DARK

EVIL = "<script>alert(1)</script>\"' onload='x' style=\"fill: #d55e00\" </text></svg>"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collects elements and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_page_holds_table_figures_and_settings(pair, pair_report):
    path = pair_report
    assert path == pair[0].parent / "report.html"
    page = read_page(path)
    assert sum(tag == "svg" for tag, _ in page.elements) == 8  # four figures, each for a wide and a narrow screen
    for text in (
        "ResNet, 14 layers",
        "stochastic depth (linear decay to 0.5, one gate per batch)",
        "Huang et al. 2016",
        "Constant and stochastic depth, side by side",
        "Test error 5.12 % with stochastic depth, 5.12 % with constant depth.",
        "Training took 0.700 of the time (expected 0.688 of FLOPs, 0.766 of time) and 0.684 of the FLOPs.",
        "mean |gradient| of first convolution",
        "0 of 4 blocks lie outside",
        "depth.final_survival_prob",
        "train --out stochastic",
        "2.13.0",
    ):
        assert text in page.text
    assert not list(path.parent.rglob("*.tmp"))


def test_the_links_of_a_page_that_was_mailed_still_work(pair_report):
    """They hold their files: the same bytes as beside the page."""
    links = {attrs["download"]: attrs["href"] for tag, attrs in read_page(pair_report).elements if "download" in attrs}
    assert {"runs.csv", "epochs.csv", "survival.csv", "curves.png", "curves.svg"} <= links.keys()
    for name, link in links.items():
        folder = "data" if name.endswith(".csv") else "figures"
        content = base64.b64decode(link.partition("base64,")[2])
        assert content == (pair_report.parent / folder / name).read_bytes(), name
    others = [attrs["href"] for tag, attrs in read_page(pair_report).elements if tag == "a" and "download" not in attrs]
    assert others == ["https://arxiv.org/abs/1603.09382"]


def test_page_loads_nothing_from_outside(pair_report):
    html = pair_report.read_text().replace('<a href="https://arxiv.org/abs/1603.09382">', "")
    html = re.sub(r"base64,[\w+/=]*", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe|url\((?!#)", html)


def test_identifiers_are_unique_and_references_lead_somewhere(pair_report):
    html = pair_report.read_text()
    page = Reader()
    page.feed(html)
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers)) > 50
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))
    assert {first or second for first, second in references} <= set(identifiers)


def test_dark_has_a_color_for_every_light_one(pair_report):
    html = pair_report.read_text()
    assert set(DARK) == set(CSS_NAMES.values())
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.search(r"(fill|stroke|color)[:=]\s*\"?(#|black|white|rgb)", svgs)
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", svgs)) <= set(DARK)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    ("page", "colors"),
    [("#ffffff", {name: color for color, name in CSS_NAMES.items()}), ("#161718", DARK)],
    ids=["light", "dark"],
)
def test_colors_can_be_read(page, colors):
    for name, color in colors.items():
        # WCAG 2: 4.5 for text, 3 for lines. The grid may stay in the background.
        if name != "--grid":
            assert contrast(page, color) >= (4.5 if name in ("--ink", "--muted") else 3), name


@pytest.mark.parametrize("num_runs", [1, 2], ids=["alone", "compared"])
def test_names_from_outside_stay_harmless(write_run, num_runs):
    evil = {"name": EVIL, "title": EVIL, "published": {"test_error": 1.0, "source": EVIL}, "model": {EVIL: EVIL}}
    folders = [write_run("evil", stochastic=True, config=evil), write_run("other")][:num_runs]
    path = write_report(folders)
    html = path.read_text()
    assert "<script" not in html
    page = read_page(path)
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert sum(tag == "svg" for tag, _ in page.elements) == 8
    assert EVIL in page.text
    assert "<script" not in (path.parent / "figures" / "survival.svg").read_text()


def test_same_bytes_every_time(pair, pair_report, tmp_path):
    write_report(pair, tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    assert len(files) == 12
    for file in files:
        assert (tmp_path / file).read_bytes() == (pair_report.parent / file).read_bytes(), file


def test_interrupted_report_leaves_the_old_page(write_run, monkeypatch):
    folder = write_run()
    old = write_report([folder]).read_bytes()

    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report([folder])
    assert (folder / "report.html").read_bytes() == old


def test_page_is_written_last(write_run, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(page_module, "write_whole", lambda path, _content: written.append(path.name))
    write_report([write_run()])
    assert written[-1] == "report.html"


def test_one_run_is_written_into_its_folder_its_resumptions_counted(write_run):
    folder = write_run()
    (folder / "environment.json").write_text(
        '{"versions": {"torch": "2.13.0"}, "resumed": [{"cpu": "A"}, {"cpu": "B"}]}'
    )
    path = write_report([folder])
    assert path == folder / "report.html"
    for text in ("Digits, 14 layers", "versions.torch", "2 times"):
        assert text in read_page(path).text


def test_runs_in_different_folders_need_an_output_folder(write_run):
    with pytest.raises(ReportError, match="choose the folder of their report with --out"):
        write_report([write_run("a"), write_run("deeper/b")])


def test_folder_that_cannot_be_written(write_run, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ReportError, match=r"cannot be written to .*file"):
        write_report([write_run()], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_damaged_run_writes_nothing(write_run, tmp_path):
    good, bad = write_run("good"), write_run("bad")
    (bad / "metrics.jsonl").write_text("{\n")
    with pytest.raises(ReportError):
        write_report([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_runs_have_an_index_that_leads_to_their_pages(write_run, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_MOST_COLUMNS", 2)
    folders = [write_run(f"run #{seed}", config={"seed": seed}, stochastic=seed == 1) for seed in range(3)]
    path = write_report(folders, tmp_path / "index")
    page = read_page(path)
    assert sum(tag == "svg" for tag, _ in page.elements) == 6
    links = [str(attrs["href"]) for tag, attrs in page.elements if tag == "a" and "report.html" in str(attrs["href"])]
    assert [(path.parent / unquote(urlsplit(link).path)).resolve() for link in links] == [
        each / "report.html" for each in folders
    ]
    assert "realized frequency" in read_page(folders[1] / "report.html").text

    # The next index rewrites only the page of the run that has continued.
    pages = [folder / "report.html" for folder in folders]
    before = [page.stat().st_mtime_ns for page in pages]
    later = max(before) + 1
    os.utime(folders[2] / "metrics.jsonl", ns=(later, later))
    write_report(folders, tmp_path / "index")
    assert [page.stat().st_mtime_ns != old for page, old in zip(pages, before, strict=True)] == [False, False, True]


@pytest.mark.parametrize("stochastic", [False, True], ids=["constant", "stochastic"])
def test_a_color_means_the_same_on_every_page(write_run, stochastic):
    """Stochastic depth is blue beside constant depth, and alone."""
    pair = write_report([write_run("constant"), write_run("stochastic", stochastic=True)])
    alone = write_report([write_run("alone", stochastic=stochastic)])
    of_pair, of_alone = (
        re.findall(r"(?:stroke|color|fill): var\((--series-\d)\)", page.read_text()) for page in (pair, alone)
    )
    assert set(of_pair) == {"--series-0", "--series-1"}
    assert set(of_alone) == {f"--series-{int(stochastic)}"}


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1100])
def test_nothing_overflows_the_screen(pair_report, tmp_path, width):
    """In Chromium's layout, content that is wider than the window can be scrolled."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    measure = """<script>addEventListener("load", () => {
      const wide = [...document.querySelectorAll("main *:not(svg *)")].filter(
        each => each.getBoundingClientRect().right > innerWidth + 1);
      parent.postMessage(`${innerWidth} wide: ${wide.map(each => each.outerHTML.slice(0, 80))}.`, "*");
    });</script></body>"""
    (tmp_path / "page.html").write_text(pair_report.read_text().replace("</body>", measure))
    # In a frame: Chromium's own windows are at least 500 pixels wide.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe><script>'
        "addEventListener('message', event => { document.body.textContent = event.data; });</script></body>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run([chromium, *options, outer.as_uri()], capture_output=True, text=True, timeout=300).stdout
    assert f"{width} wide: ." in dom, dom[-500:]


def test_what_evaluate_found_is_on_the_run_s_page(write_run):
    folder = write_run(stochastic=True)
    write_curve(
        [Point("run", 2, 50, 500, 1.25, 12.5, 10.0), Point("run", 4, 100, 1000, 2.5, 5.0, 5.0)], folder / "evaluation"
    )
    measured = [Reliability("one forward", 10.0, 0.5, 0.03, None, (Bin(3, 0.9, 0.8), Bin(1, 0.4, 0.5)))]
    write_reliability(measured, folder / "evaluation")
    page = write_report([folder])
    text = read_page(page).text
    assert "Subnetworks" in text
    assert "Calibration" in text
    for name in ("subnetworks", "reliability"):
        assert (folder / "data" / f"{name}.csv").read_bytes() == (folder / "evaluation" / f"{name}.csv").read_bytes()
        assert (folder / "figures" / f"{name}.svg").exists()
    rows = list(csv.DictReader((folder / "evaluation" / "reliability.csv").read_text().splitlines()))
    assert read_reliability(rows) == measured
    (folder / "evaluation" / "subnetworks.csv").write_text("run\nx\n")
    with pytest.raises(ReportError, match=r"subnetworks\.csv is damaged \(KeyError\)"):
        write_report([folder])
