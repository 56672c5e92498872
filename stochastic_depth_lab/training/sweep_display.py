"""How a sweep is shown while it runs: a table on a terminal, plain lines elsewhere. See `sweep.SweepObserver`."""

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
        table = Table(title=f"{done} of {len(jobs)} runs done", title_justify="left")
        # A line each, whatever they hold: of what is too long the end is left out.
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
    """What is shown of each name: long ones without the words at the front that all of them share.

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
    """Who shows a sweep: a table on a terminal, plain lines elsewhere, and where several processes share a terminal."""
    console = Console(stderr=True)
    if alone and console.is_terminal:
        with Live(console=console) as live:
            yield SweepTable(live)
    else:
        yield SweepLines(sys.stderr)
