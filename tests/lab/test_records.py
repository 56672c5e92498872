"""The run folder: refused when in use, truncated to what the checkpoint knows, never overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from small_runs import CPU, small, train

from stochastic_depth_lab.errors import RunError
from stochastic_depth_lab.experiments.config import as_json
from stochastic_depth_lab.runs.records import RunFolder
from stochastic_depth_lab.training.loop import Interrupted

HOLD = """
import sys, time
from pathlib import Path
from stochastic_depth_lab.runs import records
from stochastic_depth_lab.experiments.config import as_json
from stochastic_depth_lab.experiments import find
with records.RunFolder(Path(sys.argv[1]), find("digits-constant")).opened(resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_on_one_folder_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"another run is writing in .*run \(process {process.pid}\)"):
            train(small(), tmp_path / "run", resume=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (tmp_path / "run" / ".lock").exists()
    with RunFolder(tmp_path / "run", small()).opened(resume=False):  # contains only the lock: counts as empty
        pass


def test_the_lock_is_free_after_the_run(tmp_path):
    with RunFolder(tmp_path / "run", small()).opened(resume=False):
        pass
    with RunFolder(tmp_path / "run", small()).opened(resume=False):
        pass


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"exists and is not empty: give another folder\.$"):
        train(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    train(small(epochs=1), tmp_path / "run")
    with pytest.raises(RunError, match=r"give another folder, or --resume to resume its run\.$"):
        train(small(epochs=1), tmp_path / "run")
    with pytest.raises(RunError, match="is a file"):
        train(small(), tmp_path / "notes.txt")


def test_a_run_of_another_configuration_is_refused_and_named(tmp_path):
    train(small(epochs=1), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = replace(small(epochs=2), precision="bf16")
    with pytest.raises(RunError, match=r"recipe.epochs: 1, not 2; precision: fp32, not bf16"):
        train(other, tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resume_on_a_finished_run_gives_its_result_and_writes_nothing(tmp_path):
    result = train(small(epochs=1), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(small(epochs=1), tmp_path / "run", resume=True) == result
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_metrics_are_cut_to_the_epochs_of_the_checkpoint(tmp_path):
    folder = RunFolder(tmp_path, small())
    for epoch in (1, 2, 3):
        folder.append_metrics({"epoch": epoch})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epo')
    folder.keep_epochs(2)
    assert folder.metrics() == [{"epoch": 1}, {"epoch": 2}]
    with pytest.raises(RunError, match="has 2 epochs, the checkpoint 3"):
        folder.keep_epochs(3)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 7}\n')
    with pytest.raises(RunError, match="line 2 is not epoch 2"):
        folder.keep_epochs(2)


def test_the_environment_says_what_a_number_needs(tmp_path):
    train(small(epochs=1), tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["versions"].keys() >= {"python", "stochastic-depth", "torch", "numpy"}
    assert environment["num_cpus"] == os.cpu_count()
    assert environment["device"] == str(CPU)
    assert environment["command"]
    started = time.strptime(environment["started"], "%Y-%m-%dT%H:%M:%S+00:00")
    assert abs(time.mktime(started) - time.mktime(time.gmtime())) < 3600
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == as_json(small(epochs=1))


def test_a_run_of_version_0_1_resumes_and_its_rows_count(tmp_path):
    """That version spelled some fields the British way: in config.json, metrics.jsonl and the checkpoint."""
    whole = train(small(), tmp_path / "whole")
    run = tmp_path / "run"
    asked = iter([False] * 10)
    with pytest.raises(Interrupted):
        train(small(), run, stop_requested=lambda: next(asked, True))
    for name, fields in {
        "config.json": ("normalization", "regularizers"),
        "metrics.jsonl": ("realized_depth", "realized_cost"),
    }.items():
        text = (run / name).read_text()
        for field in fields:
            assert f'"{field}"' in text
            text = text.replace(f'"{field}"', f'"{field.replace("iz", "is")}"')
        (run / name).write_text(text)
    resumed = train(small(), run, resume=True)
    assert resumed["realized_depth"] == whole["realized_depth"]
    assert resumed["test_error"] == whole["test_error"]
