"""The experiments behind RESULTS.md: every study is in the queue, and runs survive the loss of their folder."""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stochastic_depth_lab.experiments import STUDIES
from stochastic_depth_lab.experiments.config import from_json

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402

sys.path.pop(0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with this repository's runs of the gradients, and no others."""
    monkeypatch.setattr(evidence, "RUNS", tmp_path / "runs" / "evidence")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "PAGES", tmp_path / "docs" / "results" / "few-images")
    monkeypatch.setattr(evidence, "SEEDS", {"gradients": 5, "deeper": 5})
    (tmp_path / "results" / "gradients").mkdir(parents=True)
    (tmp_path / "results" / "gradients" / "runs.jsonl").write_bytes(
        (ROOT / "results" / "gradients" / "runs.jsonl").read_bytes()
    )
    return tmp_path


def runs_of(study: str) -> list[dict]:
    path = ROOT / "results" / study / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_study_is_in_the_queue() -> None:
    # The small form of table2 is that of table1.
    assert {*evidence.SEEDS} == {*STUDIES} - {"table2"}
    for study, _, pattern in evidence.PLAN:
        assert evidence.experiments(study, 1, pattern), f"no experiment of {study} matches {pattern}"


@pytest.mark.parametrize("study", evidence.SEEDS)
def test_archived_runs_are_those_of_the_queue(study: str) -> None:
    """Runs of other configurations would be repeated, and the page would not show them."""
    planned = {job.folder.name: job.experiment for _, job in evidence.jobs()}
    for run in runs_of(study):
        assert from_json(run["config.json"]) == planned[run["folder"]]


def test_a_run_survives_the_loss_of_its_folder_and_is_archived_once(root: Path) -> None:
    archive = root / "results" / "gradients" / "runs.jsonl"
    evidence.restore()
    folders = sorted(evidence.RUNS.iterdir())
    assert [each.name for each in folders] == sorted(run["folder"] for run in runs_of("gradients"))
    before = archive.read_text()
    for folder in folders:
        evidence.archive("gradients", folder)
    assert archive.read_text() == before
    archive.unlink()
    for folder in folders:
        evidence.archive("gradients", folder)
    assert sorted(archive.read_text().splitlines()) == sorted(before.splitlines())


def test_the_page_of_a_study_has_the_means_of_its_runs(root: Path) -> None:
    (root / "results" / "gradients" / "of-an-earlier-form.svg").touch()
    evidence.report()
    made = {each.name for each in (root / "results" / "gradients").iterdir()}
    assert made == {"runs.jsonl", "runs.csv", "epochs.csv", "verdicts.csv", "gradient.svg", "curves.svg"}
    page = (evidence.PAGES / "gradients.md").read_text()
    for kind in ("constant", "stochastic"):
        errors = [
            run["metrics"][-1]["test_error"]
            for run in runs_of("gradients")
            if run["config.json"]["name"].endswith(kind)
        ]
        assert len(errors) == 5
        row = rf"{kind} depth, rate 0\.1 +{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} "
        assert re.search(row, page)
    assert "10 of 20 runs done" in page
    for figure in re.findall(r"!\[[^]]*\]\((.*?)\)", page):
        assert (evidence.PAGES / figure).resolve().is_file()
    assert "0 of 50 runs done" in (evidence.PAGES / "deeper.md").read_text()


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All archived runs in their folders, as those of one study may belong to another one too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "RUNS", tmp_path_factory.mktemp("runs"))
        evidence.restore()
        yield


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("study", evidence.SEEDS)
def test_pages_are_up_to_date(study: str) -> None:
    """`python benchmarks/evidence.py report` has been run since the last run was archived."""
    page = (ROOT / "docs" / "results" / "few-images" / f"{study}.md").read_text()
    planned = evidence.sweep.jobs_for(evidence.experiments(study, evidence.SEEDS[study]), evidence.RUNS)
    done = [job for job in planned if (job.folder / "result.json").exists()]
    assert f"{len(done)} of {len(planned)} runs done" in page
