"""The page: whole, self-contained, harmless whatever a run is called, the same every time."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from stochastic_depth_lab.report import ReportError, table, write_report
from stochastic_depth_lab.report import page as page_module
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
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
    for text in (
        "Constant and stochastic depth, side by side",
        "Test error 5.12 % with stochastic depth, 5.12 % with constant depth.",
        "Training took 0.700 of the time and 0.684 of the FLOPs.",
        "mean |gradient| of first convolution",
        "0 of 4 blocks lie outside",
        "depth.final_survival_prob",
        "train --out stochastic",
        "2.13.0",
    ):
        assert text in page.text
    written = {str(p.relative_to(path.parent)) for p in path.parent.rglob("*") if p.is_file()}
    links = {attrs["href"] for tag, attrs in page.elements if tag == "a"}
    assert links <= written
    assert {"data/runs.csv", "data/epochs.csv", "data/survival.csv", "figures/curves.png"} <= links
    assert not [name for name in written if name.endswith(".tmp")]


def test_page_asks_for_nothing_from_outside(pair_report):
    html = pair_report.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe|url\((?!#)", html)


def test_identifiers_are_unique_and_references_lead_somewhere(pair_report):
    html = pair_report.read_text()
    page = Reader()
    page.feed(html)
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers)) > 50
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))
    assert {first or second for first, second in references} <= set(identifiers)


def test_dark_has_a_colour_for_every_light_one(pair_report):
    html = pair_report.read_text()
    assert set(DARK) == set(CSS_NAMES.values())
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.search(r"(fill|stroke|color)[:=]\s*\"?(#|black|white|rgb)", svgs)
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", svgs)) <= set(DARK)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    ("page", "colours"),
    [("#ffffff", {name: colour for colour, name in CSS_NAMES.items()}), ("#161718", DARK)],
    ids=["light", "dark"],
)
def test_colours_can_be_read(page, colours):
    for name, colour in colours.items():
        # WCAG 2: 4.5 for text, 3 for lines. The grid may stay in the background.
        if name != "--grid":
            assert contrast(page, colour) >= (4.5 if name in ("--ink", "--muted") else 3), name


@pytest.mark.parametrize("num_runs", [1, 2], ids=["alone", "compared"])
def test_names_from_outside_stay_harmless(write_run, num_runs):
    evil = {"name": EVIL, "title": EVIL, "published": {"test_error": 1.0, "source": EVIL}, "model": {EVIL: EVIL}}
    folders = [write_run("evil", stochastic=True, config=evil), write_run("other")][:num_runs]
    path = write_report(folders)
    html = path.read_text()
    assert "<script" not in html
    page = read_page(path)
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
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


def test_page_comes_last(write_run, monkeypatch):
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


def test_runs_in_different_folders_need_a_place(write_run):
    with pytest.raises(ReportError, match="say with --out"):
        write_report([write_run("a"), write_run("deeper/b")])


def test_place_that_cannot_be_written(write_run, tmp_path):
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
    assert sum(tag == "svg" for tag, _ in page.elements) == 3
    links = [str(attrs["href"]) for tag, attrs in page.elements if tag == "a" and "report.html" in str(attrs["href"])]
    assert [(path.parent / unquote(urlsplit(link).path)).resolve() for link in links] == [
        each / "report.html" for each in folders
    ]
    assert "realised frequency" in read_page(folders[1] / "report.html").text

    # The next index writes the page of the run that has gone on, and no other.
    pages = [folder / "report.html" for folder in folders]
    before = [page.stat().st_mtime_ns for page in pages]
    later = max(before) + 1
    os.utime(folders[2] / "metrics.jsonl", ns=(later, later))
    write_report(folders, tmp_path / "index")
    assert [page.stat().st_mtime_ns != old for page, old in zip(pages, before, strict=True)] == [False, False, True]
