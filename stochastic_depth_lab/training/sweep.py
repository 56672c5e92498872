"""Many runs, each in its own process: a crash does not affect the other runs.

Finished runs are skipped, unfinished ones resume. Each run writes its output to `log.txt` in its folder; `failed.json`
there says how a failed run ended, until it starts again.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, Protocol

from stochastic_depth_lab.experiments.config import Experiment
from stochastic_depth_lab.files import write_json
from stochastic_depth_lab.runs import records
from stochastic_depth_lab.training import loop
from stochastic_depth_lab.training.processes import local_rank
from stochastic_depth_lab.training.progress import Lines
from stochastic_depth_lab.training.setup import find_device

State = Literal["waiting", "running", "done", "failed", "stopped"]
_INTERRUPTED = 128 + signal.SIGTERM

# The processes fork from a server that has only imported PyTorch: they start at once, without this process's threads
# and CUDA context.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["stochastic_depth_lab.training.loop"])


@dataclass
class Job:
    """One run of a sweep, and its state."""

    experiment: Experiment
    folder: Path
    state: State = "waiting"
    reason: str = ""
    """Why it failed, in one line."""


class SweepObserver(Protocol):
    """Receives the progress of a sweep."""

    def on_change(self, jobs: Sequence[Job]) -> None:
        """Called when a job starts or ends, and about every second in between."""


def jobs_for(experiments: Sequence[Experiment], out: Path) -> list[Job]:
    """The jobs of a sweep, with finished runs marked as done.

    Args:
        experiments: the runs, all different.
        out: the folder of the run folders.
    """
    jobs = list(map(Job, experiments, records.folders_for(out, experiments)))
    for job in jobs:
        if (job.folder / "result.json").exists():
            job.state = "done"
    return jobs


def update_states(jobs: Sequence[Job]) -> None:
    """Update the states of jobs that other processes ran, from their folders: done or failed."""
    for job in jobs:
        if (job.folder / "result.json").exists():
            job.state = "done"
        elif (job.folder / "failed.json").exists():
            job.state, job.reason = "failed", records.read_json(job.folder / "failed.json")["reason"]


def shard(experiments: Sequence[Experiment], text: str) -> Sequence[Experiment]:
    """The share of one machine, `"i/n"` with i from 0: every n-th experiment, starting with the i-th.

    Raises:
        ValueError: if the text has another form.

    Example:
        >>> [list(shard("abcde", f"{i}/2")) for i in range(2)]
        [['a', 'c', 'e'], ['b', 'd']]
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard must be i/n with i in 0..n-1, such as 0/4, but is {text!r}.")
    return experiments[int(index) :: int(count)]


def run(
    jobs: Sequence[Job],
    observer: SweepObserver,
    *,
    num_processes: int,
    device: str | None,
    data_root: Path | None,
    stop_requested: Callable[[], bool],
) -> None:
    """Run the waiting jobs until all have ended, and set their states.

    Args:
        jobs: from `jobs_for`.
        observer: receives progress callbacks.
        num_processes: number of concurrent runs.
        device: device of all runs.
        data_root: folder of the data sets.
        stop_requested: called about every second; running jobs then save and stop, and waiting jobs do not start.
    """
    running: dict[BaseProcess, Job] = {}
    waiting = [job for job in jobs if job.state == "waiting"]
    stopping = False
    while running or (waiting and not stopping):
        while waiting and len(running) < num_processes and not stopping:
            job = waiting.pop(0)
            running[_begin(job, device, data_root)] = job
        observer.on_change(jobs)
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
        for process in [process for process in running if not process.is_alive()]:
            _end(running.pop(process), process)
        if stop_requested() and not stopping:
            stopping = True
            for process in running:
                process.terminate()
    observer.on_change(jobs)


def _begin(job: Job, device: str | None, data_root: Path | None) -> BaseProcess:
    job.state = "running"
    process = _PROCESSES.Process(target=_train, args=(job.experiment, job.folder, device, data_root))
    # Ctrl-C reaches every process of a terminal. The new process inherits that it is ignored: during imports it would
    # leave a traceback.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    return process


def _end(job: Job, process: BaseProcess) -> None:
    process.join()
    code = process.exitcode or 0
    if code == 0:
        job.state = "done"
    elif code in (_INTERRUPTED, -signal.SIGTERM):
        job.state = "stopped"
    else:
        log = job.folder / "log.txt"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        job.state = "failed"
        job.reason = f"killed by {signal.Signals(-code).name}" if code < 0 else " ".join(last) or f"exit code {code}"
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / "failed.json", {"exit_code": code, "reason": job.reason})


def _train(experiment: Experiment, folder: Path, device: str | None, data_root: Path | None) -> None:
    """Train one run in its own process."""
    stop = False

    def note(*_: object) -> None:
        nonlocal stop
        stop = True

    # Ctrl-C reaches every process of a terminal; the parent decides, and sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, note)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.json").unlink(missing_ok=True)
    with (folder / "log.txt").open("a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            loop.train(
                experiment,
                folder,
                [Lines(sys.stderr)],
                device=find_device(device, experiment.precision, local_rank()),
                data_root=data_root,
                resume=True,
                stop_requested=lambda: stop,
            )
        except loop.Interrupted:
            sys.exit(_INTERRUPTED)
        except (ValueError, ArithmeticError, OSError) as error:
            print(" ".join(str(error).split()), file=sys.stderr, flush=True)  # noqa: T201 -- into the log
            sys.exit(2)


def epochs_done(job: Job) -> int:
    """Number of finished epochs of a job."""
    try:
        return (job.folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
