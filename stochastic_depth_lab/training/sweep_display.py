"""Progress of a sweep: a table on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from stochastic_depth_lab.experiments.config import as_json
from stochastic_depth_lab.report.runs import differing
from stochastic_depth_lab.training.sweep import Job, SweepObserver, epochs_done

_LONGEST = 40
"""Characters of a run's folder, beside its state and epoch in 80 columns."""


class SweepLines:
    """Prints one plain line for each run that starts or ends."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._printed: dict[Path, str] = {}

    def on_change(self, jobs: Sequence[Job]) -> None:
        """Print what has changed."""
        for job in jobs:
            if job.state not in ("waiting", self._printed.get(job.folder)):
                self._printed[job.folder] = job.state
                count = sum(each.state == "done" for each in jobs)
                reason = f": {job.reason}" if job.reason else ""
                print(f"[{count}/{len(jobs)}] {job.folder.name}: {job.state}{reason}", file=self._stream, flush=True)


class SweepTable:
    """Shows a table of the runs with their epochs, on a terminal."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._names: dict[Path, str] = {}

    def on_change(self, jobs: Sequence[Job]) -> None:
        """Draw the table again. Runs beyond a screen are only counted."""
        done = sum(job.state == "done" for job in jobs)
        table = Table(title=f"{done} of {len(jobs)} runs done", title_justify="left")
        # One line per run: long cells are cut.
        for column, widest in (("run", None), ("state", 28), ("epoch", None)):
            table.add_column(column, no_wrap=True, overflow="ellipsis", max_width=widest)
        if not self._names:
            self._names = dict(zip((job.folder for job in jobs), _names(jobs), strict=True))
        shown = [job for job in jobs if job.state in ("running", "failed", "stopped")]
        shown += [job for job in jobs if job.state == "waiting"]
        for job in shown[:20]:
            epochs = f"{epochs_done(job)}/{job.experiment.recipe.epochs}"
            table.add_row(self._names[job.folder], job.reason or job.state, epochs)
        self._live.update(table if shown else f"{done} of {len(jobs)} runs done")


def _names(jobs: Sequence[Job]) -> list[str]:
    """A name for each run: its folder, or if folders are long, the settings in which the runs differ."""
    folders = [job.folder.name for job in jobs]
    if len(jobs) < 2 or max(map(len, folders)) <= _LONGEST:
        return folders
    return differing([as_json(job.experiment) for job in jobs])


@contextmanager
def watching_sweep(*, alone: bool) -> Generator[SweepObserver]:
    """Show a sweep: a table on a terminal, plain lines elsewhere, and if several processes share a terminal."""
    console = Console(stderr=True)
    if alone and console.is_terminal:
        with Live(console=console) as live:
            yield SweepTable(live)
    else:
        yield SweepLines(sys.stderr)
