"""The page: whole, self-contained, harmless whatever a run is called, the same every time."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stochastic_depth_lab.report import ReportError, write_report
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


def test_page_holds_table_figures_and_settings(write_run):
    constant, stochastic = write_run("constant"), write_run("stochastic", stochastic=True)
    path = write_report([constant, stochastic])
    assert path == constant.parent / "report.html"
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


def test_one_run_is_written_into_its_folder(write_run):
    folder = write_run(stochastic=True)
    path = write_report([folder])
    assert path == folder / "report.html"
    assert "Digits, 14 layers" in read_page(path).text


def test_page_asks_for_nothing_from_outside(write_run):
    html = write_report([write_run("a"), write_run("b", stochastic=True)]).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe|url\((?!#)", html)


def test_identifiers_are_unique_and_references_lead_somewhere(write_run):
    html = write_report([write_run("a"), write_run("b", stochastic=True)]).read_text()
    page = Reader()
    page.feed(html)
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers)) > 50
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))
    assert {first or second for first, second in references} <= set(identifiers)


def test_dark_has_a_colour_for_every_light_one(write_run):
    html = write_report([write_run("a"), write_run("b", stochastic=True)]).read_text()
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


def test_names_from_outside_stay_harmless(write_run):
    evil = {"name": EVIL, "title": EVIL, "published": {"test_error": 1.0, "source": EVIL}, "model": {EVIL: EVIL}}
    single = write_run("evil", stochastic=True, config=evil)
    for path in (write_report([single]), write_report([single, write_run("other")])):
        html = path.read_text()
        assert "<script" not in html
        page = read_page(path)
        assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
        assert sum(tag == "svg" for tag, _ in page.elements) == 4
    assert EVIL in read_page(single / "report.html").text
    assert "<script" not in (single / "figures" / "survival.svg").read_text()


def test_same_bytes_every_time(write_run, tmp_path):
    folders = [write_run("a"), write_run("b", stochastic=True)]
    write_report(folders, tmp_path / "one")
    write_report(folders, tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_interrupted_report_leaves_the_old_page(write_run, monkeypatch):
    folder = write_run()
    old = write_report([folder]).read_bytes()

    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        page_module.write_whole(folder / "report.html", b"half a pa")
    assert (folder / "report.html").read_bytes() == old
    assert not list(folder.glob(".*tmp"))


def test_page_comes_last(write_run, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(page_module, "write_whole", lambda path, _content: written.append(path.name))
    write_report([write_run()])
    assert written[-1] == "report.html"


def test_runs_in_different_folders_need_a_place(write_run, tmp_path):
    folders = [write_run("a"), write_run("deeper/b")]
    with pytest.raises(ReportError, match="say with --out"):
        write_report(folders)
    assert write_report(folders, tmp_path / "out") == tmp_path / "out" / "report.html"


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
