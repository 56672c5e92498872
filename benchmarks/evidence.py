"""Runs the experiments behind RESULTS.md and docs/results, most valuable first, over several sessions.

    python benchmarks/evidence.py plan     # finished and missing runs, and an estimate of the time
    python benchmarks/evidence.py run      # resumes; --jobs 2 for two concurrent runs; --until 05:10 stops and saves
    python benchmarks/evidence.py report   # draws every study from the finished runs

Runs are in `runs/evidence`. A finished run is copied, without its weights, into `results/STUDY/runs.jsonl`. Commit this
file: if the folder is lost, `run` restores finished runs from it and repeats only unfinished ones. Ctrl-C and SIGTERM
save; `kill -9` loses at most 200 steps.

Each run is a new process that imports the code again. To keep working on the code in the meantime, start `run` in a
clone of the repository, with EVIDENCE_ROOT set to the folder for runs and results.
"""

import argparse
import datetime
import fnmatch
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stochastic_depth_lab.experiments import STUDIES, few
from stochastic_depth_lab.experiments.config import Experiment
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.runs import records
from stochastic_depth_lab.training import sweep

ROOT = Path(os.environ.get("EVIDENCE_ROOT") or Path(__file__).parent.parent)
RUNS = ROOT / "runs" / "evidence"
RESULTS = ROOT / "results"
PAGES = ROOT / "docs" / "results" / "few-images"
PLAN: tuple[tuple[str, int, str], ...] = (
    ("digits", 5, "*"),
    ("learning-rates", 3, "digits-56-300-*"),
    ("survival", 5, "*"),
    ("over-time", 5, "*"),
    ("regularizers", 5, "*"),
    ("learning-rates-cifar10", 2, "cifar10-32-1000-*"),
    ("table1", 3, "cifar10-*"),
    ("cifar10-all", 1, "*"),
    # Deep networks do not train at the paper's rate: theirs come first, then `deeper` with them.
    ("learning-rates-deeper", 1, "*"),
    # One seed misleads: a rate of 1.6 is the best of constant depth with 20 layers in one, and bad in another.
    ("learning-rates-deeper", 3, "digits-20-*-constant"),
    ("learning-rates-deeper", 2, "digits-??-*"),
    ("learning-rates-deeper", 2, "digits-110-*"),
    ("deeper", 1, "*"),
    ("deeper", 5, "digits-??-*"),
    ("deeper", 5, "digits-110-*"),
    ("deeper", 3, "digits-302-*"),
    ("gradients", 5, "*"),
    ("depth-survival", 5, "*"),
    # The best rate depends on the number of steps, so each has its own.
    ("learning-rates", 3, "digits-56-100-*"),
    ("learning-rates", 3, "digits-56-1000-*"),
    ("learning-rates", 1, "*"),
    ("payoff", 1, "digits-*"),
    ("learning-rates-cifar10", 1, "*"),
    ("learning-rates-cifar10", 2, "cifar10-32-[13]00-*"),
    ("payoff", 1, "*"),
    # Another seed on both sides of the rule's edge: 50 and 15 passes over the images.
    ("payoff", 2, "cifar10-100-images-1000-*"),
    ("payoff", 2, "cifar10-100-images-300-*"),
    ("learning-rates-cifar10", 2, "*"),
    ("payoff", 2, "digits-*"),
    ("learning-rates-deeper", 2, "digits-302-*"),
    ("learning-rates", 2, "*"),
    ("payoff", 2, "cifar10-*-?00-steps-*"),
    ("payoff", 2, "cifar10-*-?000-steps-*"),
    ("payoff", 3, "cifar10-*"),
    ("payoff", 3, "*"),
    ("deeper", 5, "digits-302-*"),
    ("cifar10-all", 2, "*"),
    ("table1", 5, "*"),
    ("curves", 5, "*"),
    ("deeper", 3, "*"),
    ("learning-rates-deeper", 2, "*"),
    ("learning-rates", 3, "*"),
)
"""Studies, seeds of each, and which of their experiments; most valuable first. `plan` says how many hours they take."""
SEEDS = {study: max(seeds for name, seeds, _ in PLAN if name == study) for study, *_ in PLAN}
"""The most seeds of each study."""
S_PER_STEP = {"digits": 0.1 / 56, "cifar10": 0.34 / 32}
"""Process time of a step of 50 images and a layer at constant depth, one thread of a shared AMD EPYC."""
FILES = ("config.json", "environment.json", "branches.json", "result.json")


def experiments(study: str, num_seeds: int, pattern: str = "*") -> list[Experiment]:
    """All experiments with the first seed, then with the next, so that an early stop leaves complete pairs."""
    first = STUDIES[study].first_seed
    return [
        replace(each, seed=seed)
        for seed in range(first, first + num_seeds)
        for each in STUDIES[study].small_experiments
        if fnmatch.fnmatchcase(each.name, pattern)
    ]


def archived() -> Iterator[dict[str, Any]]:
    """Every run that `results` holds."""
    for path in (RESULTS / study / "runs.jsonl" for study in SEEDS):
        for line in path.read_text().splitlines() if path.exists() else ():
            yield json.loads(line)


def restore() -> None:
    """Put finished runs back into their folders."""
    for run in archived():
        folder = RUNS / run["folder"]
        if not (folder / "result.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = "".join(json.dumps(row) + "\n" for row in run["metrics"])
            write_whole(folder / "metrics.jsonl", rows.encode())
            for name in FILES:
                write_whole(folder / name, json.dumps(run[name], indent=2).encode())


def archive(study: str, folder: Path) -> None:
    """Archive a finished run, once."""
    if any(run["folder"] == folder.name for run in archived()):
        return
    run: dict[str, Any] = {"folder": folder.name, **{name: json.loads((folder / name).read_text()) for name in FILES}}
    run["metrics"] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    path = RESULTS / study / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    write_whole(path, before + json.dumps(run).encode() + b"\n")


def jobs() -> list[tuple[str, sweep.Job]]:
    """Every run of the plan, once."""
    found: dict[Path, tuple[str, sweep.Job]] = {}
    for study, num_seeds, pattern in PLAN:
        for job in sweep.jobs_for(experiments(study, num_seeds, pattern), RUNS):
            found.setdefault(job.folder, (study, job))
    return list(found.values())


def run(num_processes: int, until: datetime.datetime | None) -> None:
    """Work through the plan until it is done, a signal comes, or the time is over."""
    restore()
    planned = jobs()
    stopped = False

    def note(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)

    class Archive:
        def on_change(self, _: Sequence[sweep.Job]) -> None:
            for study, job in planned:
                if job.state == "done" and job.folder not in kept:
                    kept.add(job.folder)
                    archive(study, job.folder)
                    result = records.read_json(job.folder / "result.json")
                    done = sum(job.state == "done" for _, job in planned)
                    print(
                        f"{datetime.datetime.now():%H:%M} {done}/{len(planned)} {job.folder.name}: "
                        f"{result['final_test_error']:.2f} % {result['process_s']:.0f} s",
                        flush=True,
                    )

    kept = {RUNS / run["folder"] for run in archived()}
    sweep.run(
        [job for _, job in planned],
        Archive(),
        num_processes=num_processes,
        device="cpu",
        data_root=None,
        stop_requested=lambda: stopped or (until is not None and datetime.datetime.now() >= until),
    )
    for _, job in planned:
        if job.state == "failed":
            print(f"{job.folder.name}: {job.reason}", flush=True)


def plan() -> None:
    """Print the progress of each study."""
    restore()
    known: set[Path] = set()
    total = 0.0
    for study, num_seeds, pattern in PLAN:
        own = [job for job in sweep.jobs_for(experiments(study, num_seeds, pattern), RUNS) if job.folder not in known]
        known |= {job.folder for job in own}
        left = sum(expected_s(job.experiment) for job in own if job.state != "done") / 3600
        total += left
        done = sum(job.state == "done" for job in own)
        print(
            f"{study:<22} {pattern:<24} {num_seeds} seeds: {done:>3} of {len(own):>3} done, "
            f"{left:.1f} h left, {total:.1f} h so far"
        )


def expected_s(experiment: Experiment) -> float:
    """Process time of a run's training."""
    recipe, data = experiment.recipe, experiment.data
    num_images = 45_000 if data.images_per_class is None else 10 * data.images_per_class
    share = 1.0 if experiment.depth is None else 0.75
    num_shown = recipe.epochs * recipe.epoch_passes * num_images
    return share * num_shown / few.BATCH_SIZE * experiment.model.num_layers * S_PER_STEP[data.dataset]


def report() -> None:
    """Draw every study of the plan from its finished runs into `results`, and write its page of `docs/results`."""
    restore()
    PAGES.mkdir(parents=True, exist_ok=True)
    for study in SEEDS:
        write_whole(PAGES / f"{study}.md", page(study).encode())


def page(study: str) -> str:
    """A study's page, whose figures and tables are drawn into `results`."""
    from stochastic_depth_lab.after.baselines import baselines
    from stochastic_depth_lab.report import write_study  # every run imports this file: matplotlib takes seconds
    from stochastic_depth_lab.report.study.verdicts import RULE

    title, claim = STUDIES[study].title, STUDIES[study].claim
    runs = [(job.experiment, job.folder) for job in sweep.jobs_for(experiments(study, SEEDS[study]), RUNS)]
    finished = [(experiment, folder) for experiment, folder in runs if (folder / "result.json").exists()]
    done = f"{len(finished)} of {len(runs)} runs done"
    if not finished:
        return f"# {title}\n\n{claim}\n\n{command(study)}, {done}.\n"
    written = write_study(
        STUDIES[study],
        runs,
        RUNS.parent / "report",
        baselines(experiment for experiment, _ in finished) if STUDIES[study].baselines else None,
        run_pages=False,
        width=140,
    )
    made = written.page.with_suffix("")
    figures = {f"{each.name}.svg": each for each in written.figures}
    drawn = [made / "figures" / name for name in figures]
    (RESULTS / study).mkdir(parents=True, exist_ok=True)
    new = [Path(shutil.copy(path, RESULTS / study)) for path in (*(made / "data").glob("*.csv"), *drawn)]
    for path in {*(RESULTS / study).glob("*.csv"), *(RESULTS / study).glob("*.svg")}.difference(new):
        path.unlink()  # of an earlier form of the study
    return PAGE.format(
        title=title,
        claim=claim,
        command=command(study),
        done=done,
        table=written.text.split("\n", 1)[1].strip("\n"),  # without its title
        figures="".join(
            f"![{each.title}](../../../results/{study}/{name})\n\n*{each.title}.* {each.caption}\n\n"
            for name, each in figures.items()
        ),
        rule=f" Verdicts are computed from runs paired by seed. {RULE}" if STUDIES[study].claims else "",
        study=study,
        machines="; ".join(sorted({machine(records.read_json(run / "environment.json")) for _, run in finished})),
    )


PAGE = """\
# {title}

{claim}

{command}, {done}.

```text
{table}
```

{figures}[Few images](../few-images.md) says what follows,
[the small versions](../../reproduce.md#the-small-versions) which images, networks and learning rates these are.{rule}

{machines}. Other jobs ran at the same time, so times are process times. `python benchmarks/evidence.py report` writes
this page from `results/{study}/runs.jsonl`; do not edit it.
"""


def command(study: str) -> str:
    """The command that repeats the study."""
    scale = "" if study == "digits" else " --scale small"
    return f"`stochastic-depth reproduce {study}{scale} --seeds {SEEDS[study]} --jobs 2 --out runs/{study}`"


def machine(environment: Mapping[str, Any]) -> str:
    """Processor, threads and versions of a run."""
    versions = environment["versions"]
    return (
        f"{environment['cpu']}, {environment['num_threads']} thread, Python {versions['python']}, "
        f"PyTorch {versions['torch']}"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["plan", "run", "report"])
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs (default: 1)")
    parser.add_argument("--until", help="stop and save at this time of day, HH:MM")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.command == "plan":
        plan()
    elif options.command == "run":
        until = None
        if options.until:
            clock = datetime.time.fromisoformat(options.until)
            until = datetime.datetime.combine(datetime.date.today(), clock)
            if until < datetime.datetime.now():
                until += datetime.timedelta(days=1)
        run(options.jobs, until)
    else:
        report()


if __name__ == "__main__":
    main()
