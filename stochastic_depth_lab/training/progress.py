"""Shows the progress of a run on a terminal, in a plain log, or in TensorBoard."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from stochastic_depth_lab.experiments.config import Experiment


class Observer(Protocol):
    """Receives the progress of a run."""

    def on_start(self, experiment: Experiment, num_steps: int, epoch: int, step: int) -> None:
        """The run starts with this epoch, after this step of it. An epoch has `num_steps` steps."""

    def on_steps(self, epoch: int, step: int, train_loss: float) -> None:
        """Called every few steps: `step` steps of the epoch are done, with this mean loss."""

    def on_epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done. `row` is its line of `metrics.jsonl`."""

    def on_remark(self, remark: str) -> None:
        """A message, in one line."""


class Lines(Observer):
    """Prints one plain line per epoch, for logs and pipes."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._epochs = 0

    def on_start(self, experiment: Experiment, num_steps: int, epoch: int, step: int) -> None:
        """Print what starts, and where."""
        self._epochs = experiment.recipe.epochs
        from_where = f", resuming in epoch {epoch} after step {step}" if (epoch, step) != (1, 0) else ""
        self.on_remark(f"{experiment.name}: {self._epochs} epochs of {num_steps} steps{from_where}")

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Print losses, errors and time."""
        epoch, loss = f"epoch {row['epoch']}/{self._epochs}", f"loss {row['train_loss']:.4f}"
        errors = f"validation error {row['validation_error']:.2f} %  test error {row['test_error']:.2f} %"
        self.on_remark(f"{epoch}  {loss}  {errors}  {row['train_s']:.1f} s")

    def on_remark(self, remark: str) -> None:
        """Print it."""
        print(remark, file=self._stream, flush=True)


class Terminal(Observer):
    """A progress bar with loss, errors and the time left, for terminals of 80 columns."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._num_steps = self._epochs = 0
        self._errors = ""
        self._bar: TaskID | None = None

    def on_start(self, experiment: Experiment, num_steps: int, epoch: int, step: int) -> None:
        """Start a bar over all steps."""
        self._num_steps, self._epochs, self._errors = num_steps, experiment.recipe.epochs, ""
        self.on_remark(f"{experiment.name}: error in % on the validation part (test part)")
        self._bar = self._progress.add_task("", total=self._epochs * num_steps, state="")
        self._show(epoch, step, "")

    def on_steps(self, epoch: int, step: int, train_loss: float) -> None:
        """Move the bar."""
        self._show(epoch, step, f"loss {train_loss:.4f}")

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Show losses and errors."""
        self._errors = f"error {row['validation_error']:.2f} ({row['test_error']:.2f})"
        self._show(row["epoch"], self._num_steps, f"loss {row['train_loss']:.4f}")

    def on_remark(self, remark: str) -> None:
        """Print it above the bar."""
        self._progress.console.print(remark, highlight=False, markup=False)

    def _show(self, epoch: int, step: int, loss: str) -> None:
        if self._bar is not None:
            state = "  ".join([f"epoch {epoch}/{self._epochs}", loss, self._errors])
            self._progress.update(self._bar, completed=(epoch - 1) * self._num_steps + step, state=state)


def terminal_progress() -> Progress:
    """The bars of a terminal, on stderr: results go to stdout."""
    return Progress(
        BarColumn(bar_width=10),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
    )


@contextmanager
def showing_progress() -> Generator[Observer]:
    """Show progress on stderr: a bar on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        with terminal_progress() as progress:
            yield Terminal(progress)
    else:
        yield Lines(sys.stderr)


class TensorBoard(Observer):
    """Writes the scalars of every epoch as TensorBoard events.

    Raises:
        ModuleNotFoundError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # an optional package

        self._folder = folder
        self._writer_type = SummaryWriter
        self._writer: SummaryWriter | None = None

    def on_start(self, experiment: Experiment, num_steps: int, epoch: int, step: int) -> None:  # noqa: ARG002
        """Open the events and drop those of epochs that are repeated."""
        self._writer = self._writer_type(str(self._folder), purge_step=epoch)

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Write its numbers."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()
