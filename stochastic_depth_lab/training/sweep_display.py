"""Progress of a sweep: a table on a terminal, plain lines elsewhere."""

import itertools
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from stochastic_depth_lab.training.sweep import Job, SweepObserver, epochs_done


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

    def on_change(self, jobs: Sequence[Job]) -> None:
        """Draw the table again. Runs beyond a screen are only counted."""
        done = sum(job.state == "done" for job in jobs)
        table = Table(title=f"{done} of {len(jobs)} runs done", title_justify="left")
        # One line per run: long cells are cut.
        for column, widest in (("run", 36), ("state", 28), ("epoch", 9)):
            table.add_column(column, no_wrap=True, overflow="ellipsis", max_width=widest)
        names = _told_apart([job.folder.name for job in jobs])
        shown = [job for job in jobs if job.state in ("running", "failed", "stopped")]
        shown += [job for job in jobs if job.state == "waiting"]
        for job in shown[:20]:
            epochs = f"{epochs_done(job)}/{job.experiment.recipe.epochs}"
            table.add_row(names[job.folder.name], job.reason or job.state, epochs)
        self._live.update(table if shown else f"{done} of {len(jobs)} runs done")


def _told_apart(names: Sequence[str]) -> dict[str, str]:
    """Short names: if they are long, without the words at the front that all share.

    Example:
        >>> both = ["digits-stochastic-weight-decay-1e-4-seed-0", "digits-stochastic-weight-decay-0-seed-0"]
        >>> list(_told_apart(both).values())
        ['…-1e-4-seed-0', '…-0-seed-0']
        >>> _told_apart(["digits-constant-seed-0", "digits-constant-seed-1"])["digits-constant-seed-1"]
        'digits-constant-seed-1'
    """
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letter for letter, *_ in same).rpartition("-")[0]
    if len(names) < 2 or max(map(len, names)) <= 40 or len(shared) < 2:
        return {name: name for name in names}
    return {name: f"…{name[len(shared) :]}" for name in names}


@contextmanager
def watching_sweep(*, alone: bool) -> Generator[SweepObserver]:
    """Show a sweep: a table on a terminal, plain lines elsewhere, and if several processes share a terminal."""
    console = Console(stderr=True)
    if alone and console.is_terminal:
        with Live(console=console) as live:
            yield SweepTable(live)
    else:
        yield SweepLines(sys.stderr)
