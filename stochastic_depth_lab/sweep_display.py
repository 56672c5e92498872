"""How a sweep is shown while it runs: a table on a terminal, plain lines elsewhere. See `sweep.SweepObserver`."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from stochastic_depth_lab.sweep import Job, SweepObserver, epochs_done


class SweepLines:
    """One plain line for each run of a sweep that begins or ends.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._told: dict[Path, str] = {}

    def on_change(self, jobs: Sequence[Job]) -> None:
        """Tell what has changed."""
        for job in jobs:
            if job.state not in ("waiting", self._told.get(job.folder)):
                self._told[job.folder] = job.state
                count = sum(each.state == "done" for each in jobs)
                reason = f": {job.reason}" if job.reason else ""
                print(f"[{count}/{len(jobs)}] {job.folder.name}: {job.state}{reason}", file=self._stream, flush=True)


class SweepTable:
    """A table of all the runs of a sweep with their epochs, for a terminal.

    Args:
        live: a display, entered as a context.
    """

    def __init__(self, live: Live) -> None:
        self._live = live

    def on_change(self, jobs: Sequence[Job]) -> None:
        """Draw it again; what waits and what is done beyond a screen is only counted."""
        done = sum(job.state == "done" for job in jobs)
        table = Table("run", "state", "epoch", title=f"{done} of {len(jobs)} runs done", title_justify="left")
        shown = [job for job in jobs if job.state in ("running", "failed", "stopped")]
        shown += [job for job in jobs if job.state == "waiting"]
        for job in shown[:20]:
            epochs = f"{epochs_done(job)}/{job.experiment.recipe.epochs}"
            table.add_row(job.folder.name, job.reason or job.state, epochs)
        self._live.update(table if shown else f"{done} of {len(jobs)} runs done")


@contextmanager
def watching_sweep(*, alone: bool) -> Generator[SweepObserver]:
    """Who shows a sweep: a table on a terminal, plain lines elsewhere, and where several processes share a terminal."""
    console = Console(stderr=True)
    if alone and console.is_terminal:
        with Live(console=console) as live:
            yield SweepTable(live)
    else:
        yield SweepLines(sys.stderr)
