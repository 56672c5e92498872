"""Many runs in separate processes: a crash does not affect the others, and finished runs are skipped."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import outcome, small, train

from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.cli.options import grid
from stochastic_depth_lab.experiments import STUDIES, find
from stochastic_depth_lab.experiments.config import Experiment, Study
from stochastic_depth_lab.report import StudyReport
from stochastic_depth_lab.runs import records
from stochastic_depth_lab.training import sweep


def seed(number: int, **recipe: object) -> Experiment:
    return replace(small(**recipe), seed=number)


class Watcher:
    """Notes every state that a job has been in, and does something when a run has finished an epoch."""

    def __init__(self, at_first_epoch=None) -> None:
        self.states: dict[str, list[str]] = {}
        self._at_first_epoch = at_first_epoch
        self._done = False

    def on_change(self, jobs) -> None:
        for job in jobs:
            seen = self.states.setdefault(job.folder.name, [])
            if not seen or seen[-1] != job.state:
                seen.append(job.state)
            if self._at_first_epoch and not self._done and job.state == "running" and sweep.epochs_done(job):
                self._done = True
                self._at_first_epoch(job)


def run(jobs, watcher=None, **options) -> None:
    settings = {"num_processes": 2, "device": "cpu", "data_root": None, "stop_requested": lambda: False}
    sweep.run(jobs, watcher or Watcher(), **{**settings, **options})


def test_a_killed_run_does_not_affect_others_and_resumes_next_time(tmp_path):
    def kill(job: sweep.Job) -> None:
        os.kill(int((job.folder / ".lock").read_text()), signal.SIGKILL)

    long = seed(0, epochs=400)
    jobs = sweep.jobs_for([long, seed(1), seed(2)], tmp_path)
    run(jobs, Watcher(kill), num_processes=1)
    assert [job.state for job in jobs] == ["failed", "done", "done"]
    assert jobs[0].reason == "killed by SIGKILL"
    assert json.loads((jobs[0].folder / "failed.json").read_text()) == {"exit_code": -9, "reason": "killed by SIGKILL"}
    train(seed(1), tmp_path.with_name("alone"))
    assert outcome(jobs[1].folder)["result"] == outcome(tmp_path.with_name("alone"))["result"]

    watcher = Watcher(lambda job: kill(job) if "seed-0" not in job.folder.name else None)
    again = sweep.jobs_for([long, seed(1), seed(2)], tmp_path)
    asked = iter([False] * 3 + [True] * 1000)
    run(again, watcher, stop_requested=lambda: next(asked))
    assert watcher.states["small-seed-1"] == ["done"]
    assert [job.state for job in again] == ["stopped", "done", "done"]
    assert not (again[0].folder / "failed.json").exists()
    assert "resuming in epoch" in (again[0].folder / "log.txt").read_text()


def test_a_run_that_cannot_begin_is_marked_with_its_reason(tmp_path):
    right = small()
    wrong = replace(right, name="wrong", model=replace(right.model, num_layers=21))
    jobs = sweep.jobs_for([wrong, seed(1, epochs=1)], tmp_path)
    run(jobs)
    assert [job.state for job in jobs] == ["failed", "done"]
    assert jobs[0].reason.startswith("num_layers must be 6n + 2")


def test_a_run_is_known_by_its_configuration(tmp_path):
    train(small(epochs=1), tmp_path / "whatever")
    job, other = sweep.jobs_for([replace(small(epochs=1), name="renamed"), small(epochs=2)], tmp_path)
    assert (job.folder.name, job.state) == ("whatever", "done")
    assert (other.folder.name, other.state) == ("small-seed-0", "waiting")

    (tmp_path / "whatever").rename(tmp_path / "small-seed-0")  # the name is taken by another configuration
    assert records.folder_for(tmp_path, small(epochs=2)).name == "small-seed-0-2"

    config = tmp_path / "small-seed-0" / "config.json"
    fields = json.loads(config.read_text())
    older = {name: value for name, value in fields.items() if name != "initial_weights"}
    config.write_text(json.dumps(older))
    assert sweep.jobs_for([small(epochs=1)], tmp_path)[0].state == "done"
    config.write_text(json.dumps({**fields, "of a newer version": 1}))
    assert records.folder_for(tmp_path, small(epochs=1)).name == "small-seed-0-2"


def test_shards_are_the_whole_and_share_nothing():
    runs = [seed(number) for number in range(11)]
    shards = [sweep.shard(runs, f"{i}/3") for i in range(3)]
    assert sorted(each.seed for part in shards for each in part) == list(range(11))


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "1/0", ""])
def test_bad_shards(text):
    with pytest.raises(ValueError, match="--shard must be i/n"):
        sweep.shard([], text)


@pytest.fixture
def tiny_study(monkeypatch) -> Study:
    """A table of two runs of a second, with published results."""
    pair = (replace(small(None), name="tiny-constant"), replace(small(), name="tiny-stochastic"))
    small_pair = tuple(replace(each, name=f"small-{each.name}", recipe=replace(each.recipe, epochs=1)) for each in pair)
    study = Study("tiny", "A tiny table", "It is tiny.", pair, small_pair, figures=("curves", "gradient"))
    monkeypatch.setitem(STUDIES, "tiny", study)
    return study


def test_reproduce_runs_what_is_missing_and_skips_what_is_done(tiny_study, tmp_path, capsys):
    command = ["reproduce", "tiny", "--scale", "small", "--jobs", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert sum(line.endswith(": done") for line in shown.err.splitlines()) == 2
    assert "A tiny table" in shown.out
    assert " ± " not in shown.out
    assert (tmp_path / "tiny.html").exists()
    assert (tmp_path / "tiny" / "figures" / "gradient.svg").exists()

    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert main([*command, "--seeds", "2"]) == 0
    shown = capsys.readouterr()
    assert sum(line.endswith(": done") for line in shown.err.splitlines()) == 4
    assert sum(line.endswith(": running") for line in shown.err.splitlines()) == 2
    assert " ± " in shown.out
    assert results.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}.items()
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 4


def test_reproduce_shows_what_there_is_when_a_run_fails(tiny_study, tmp_path, capsys, monkeypatch):
    constant, stochastic = tiny_study.small_experiments
    wrong = replace(stochastic, model=replace(stochastic.model, num_layers=21))
    monkeypatch.setitem(STUDIES, "tiny", replace(tiny_study, small_experiments=(constant, wrong)))
    assert main(["reproduce", "tiny", "--scale", "small", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    *_, last = shown.err.splitlines()
    assert last == "1 of 2 runs failed: small-tiny-stochastic-seed-0."
    assert "small-tiny-stochastic, seed 0: failed" in shown.out


def test_a_pair_of_a_small_scale_is_called_after_its_own_networks(tmp_path, monkeypatch):
    shown = []

    def write(study, *_arguments, **_options):
        shown.append(study.title)
        return StudyReport(tmp_path, "")

    def done(experiments, out):
        return [sweep.Job(each, out, "done") for each in experiments]

    monkeypatch.setattr("stochastic_depth_lab.report.write_study", write)
    monkeypatch.setattr(sweep, "jobs_for", done)
    for scale in ("small", "full"):
        assert main(["reproduce", "cifar10-110", "--scale", scale, "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert shown == ["CIFAR-10, 32 layers", "CIFAR-10, 110 layers"]


def test_a_sweep_is_every_combination(tmp_path, capsys):
    combinations = grid(find("digits-stochastic"), ["model.num-layers=8,14", "recipe.weight-decay=0,1e-3"])
    found = [(each.model.num_layers, each.recipe.weight_decay) for each in combinations]
    assert found == [(8, 0.0), (8, 1e-3), (14, 0.0), (14, 1e-3)]

    fields = ["model.num-layers=8,14", "recipe.epochs=1"]  # --quick has five, which the grid changes
    for part in ("0/2", "1/2"):
        command = ["sweep", "digits-stochastic", "--quick", "--out", str(tmp_path), "--grid", *fields, "--shard", part]
        assert main(command) == 0
        assert len(list(tmp_path.glob("*/result.json"))) == 1 + int(part[0])
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")]
    assert sorted((each["model"]["num_layers"], each["recipe"]["epochs"]) for each in configs) == [(8, 1), (14, 1)]
    assert (tmp_path / "report.html").exists()
    assert capsys.readouterr().out


MISTAKES = {
    "reproduce survival --scale tiny --out OUT": "--scale must be full or small, but is 'tiny'",
    "reproduce survival --seeds 0 --out OUT": "--seeds must be at least 1, but is 0",
    "reproduce survival --jobs 0 --out OUT": "--jobs must be at least 1, but is 0",
    "reproduce surviva --out OUT": "Did you mean 'survival'?",
    "sweep digits-stochastic --out OUT --grid recipe.epochs": "--grid takes FIELD=VALUE,VALUE",
    "sweep digits-stochastic --out OUT --grid recipe.epoch=3": "'--recipe.epoch'. Did you mean '--recipe.epochs'?",
    "sweep digits-stochastic --out OUT --grid recipe.epochs=0": "recipe.epochs must be at least 1, but is 0",
    "sweep digits --out OUT --grid recipe.epochs=3": "--grid changes one experiment, but digits is a table",
    "sweep digits --out OUT --shard 2/2": "--shard must be i/n",
    "reproduce gradients --out OUT --tensorboard": "--weights, --tensorboard and --cuda-graphs are for train",
    "sweep digits --out OUT --weights FILE": "--weights, --tensorboard and --cuda-graphs are for train",
}


@pytest.mark.parametrize("line", MISTAKES, ids=str)
def test_a_mistake_is_one_line_and_nothing_is_written(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert MISTAKES[line] in shown
    assert not list(Path().iterdir())


UNDER_TORCHRUN = """
import sys
from dataclasses import replace
from pathlib import Path

from small_runs import small
from stochastic_depth_lab.cli import training_commands
from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.experiments import EXPERIMENTS

if __name__ == "__main__":  # the processes of the sweep's runs import this file
    EXPERIMENTS["small"] = small(epochs=1)
    training_commands.find_pair = lambda _: [small(epochs=1), replace(small(None, epochs=1), name="constant")]
    out = Path(sys.argv[1])
    pair = ["reproduce", "pair", "--out", str(out / "pair"), "--device", "cpu"]
    # The first process has both runs that fail, the second both that do not, one of which is long.
    grid = ["--grid", "recipe.epochs=1,60", "recipe.learning-rate=1e30,0.02"]
    sys.exit(main(pair) or main(["sweep", "small", *grid, "--out", str(out / "sweep"), "--device", "cpu"]))
"""


@pytest.mark.slow
def test_torchrun_trains_a_pair_with_all_its_processes_and_divides_a_sweep_among_them(tmp_path):
    """The processes join once for two runs; a process whose runs failed waits until the others have finished."""
    (tmp_path / "commands.py").write_text(UNDER_TORCHRUN)
    command = [*shlex.split("-m torch.distributed.run --nproc-per-node 2"), tmp_path / "commands.py", tmp_path / "out"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    names = [f"small-epochs-{epochs}-learning-rate-{rate}-seed-0" for epochs in (1, 60) for rate in ("1e30", "0.02")]
    finished = [(tmp_path / "out" / "sweep" / name / "result.json").exists() for name in names]
    assert finished == [False, True, False, True], done.stderr
    assert done.stderr.count(": running\n") == 4
    assert done.stderr.count(f"2 of 4 runs failed: {names[0]}, {names[2]}.") == 1
    assert done.stdout.count("\nreport: ") == 2
    assert "small-epochs-1-learning-rate-0.02" in done.stdout
    assert "small-epochs-60-learning-rate-0.02" in done.stdout  # which the second process had not finished yet
    assert (tmp_path / "out" / "pair" / "report.html").exists()
    assert (tmp_path / "out" / "sweep" / "report.html").exists()


def test_a_sweep_on_a_terminal_shows_a_table(tmp_path, capsys):
    from rich.console import Console
    from rich.live import Live

    from stochastic_depth_lab.training.sweep_display import SweepTable

    jobs = sweep.jobs_for([seed(1), seed(2)], tmp_path)
    jobs[0].state, jobs[1].state, jobs[1].reason = "running", "failed", "killed by SIGKILL"
    with Live(console=Console(file=sys.stdout, force_terminal=True, width=80)) as live:
        SweepTable(live).on_change(jobs)
    shown = capsys.readouterr().out
    assert "0 of 2 runs done" in shown
    assert "small-seed-1" in shown
    assert "killed by SIGKILL" in shown


def test_a_sweep_of_long_names_keeps_a_line_for_each_run_and_ends_in_one(tmp_path):
    from rich.console import Console
    from rich.live import Live

    from stochastic_depth_lab.training.sweep_display import SweepTable

    name = "digits-stochastic-final-survival-prob-0.3-weight-decay-1e-4-draw"
    runs = [
        replace(small(), name=f"{name}-{draw}", depth=replace(small().depth, draw=draw))
        for draw in ("bernoulli", "equal_cost")
    ]
    jobs = sweep.jobs_for(runs, tmp_path)
    jobs[0].state, jobs[1].state = "running", "failed"
    jobs[1].reason = "the loss is nan in epoch 1, step 3 of 7: nothing was saved since the last checkpoint"
    shown = io.StringIO()
    with Live(console=Console(file=shown, force_terminal=True, width=80)) as live:
        table = SweepTable(live)
        table.on_change(jobs)
        *_, first, second, _bottom = live.console.render_lines(live.renderable, pad=False)
        lines = ["".join(segment.text for segment in line) for line in (first, second)]
        for job in jobs:
            job.state = "done"
        table.on_change(jobs)
        (last,) = live.console.render_lines(live.renderable, pad=False)
    assert "".join(segment.text for segment in last) == "2 of 2 runs done"
    assert "│ bernoulli  │ running " in lines[0]
    assert "│ equal cost │ the loss is nan in epoch 1,… " in lines[1]
    assert all(len(line) <= 80 for line in lines)
