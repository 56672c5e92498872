"""The training loop, from an experiment to its result, starting or resuming at any step."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stochastic_depth_lab.data import ImageData
from stochastic_depth_lab.errors import CheckpointError, DataError
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.experiments.config import Experiment
from stochastic_depth_lab.runs import checkpoint, records
from stochastic_depth_lab.runs.environment import environment
from stochastic_depth_lab.training.processes import Processes
from stochastic_depth_lab.training.progress import Observer
from stochastic_depth_lab.training.run import Run, StopRequested
from stochastic_depth_lab.training.setup import prepare, reproducible, set_epoch

_SHOW_EVERY = 20
"""Number of steps between two checks of the losses, since reading a loss waits for the device."""


class Interrupted(Exception):  # noqa: N818 -- nothing went wrong
    """The run stopped on request, and saved a checkpoint."""


def train(
    experiment: Experiment,
    path: Path,
    observers: Sequence[Observer] = (),
    *,
    device: torch.device,
    data_root: Path | None = None,
    data: ImageData | None = None,
    weights: Path | None = None,
    resume: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    processes: Processes = Processes(),  # noqa: B008 -- it is frozen
    cuda_graphs: bool = False,
) -> dict[str, Any]:
    """Train from the beginning or from the last checkpoint, and return the result.

    Your own images, from any PyTorch dataset or `DataLoader`, can replace those of the experiment: make each part with
    `Split.from_dataset(...)`, combine the three into an `ImageData`, and set `experiment.data.dataset` to their name.

    Args:
        experiment: what to train.
        path: the run folder.
        observers: receive progress callbacks.
        device: where to train.
        data_root: folder of the data sets.
        data: images to use instead of those that the experiment names.
        weights: a file with a `state_dict` to start from, instead of random weights.
        resume: resume the run in the folder.
        stop_requested: called between any two steps or evaluation batches; one process is enough to stop all.
        processes: the processes that train together, each on its part of every batch.
        cuda_graphs: replay branches as CUDA graphs: the same numbers, in less time on a GPU.

    Raises:
        ValueError: in one line, if the run cannot start. Nothing is overwritten.
        NotFiniteError: if the loss is not finite. The last checkpoint is kept.
        Interrupted: if a stop was requested. The checkpoint is that of the last step.
    """
    check(experiment)
    if weights is not None:
        experiment = replace(experiment, initial_weights=checkpoint.digest(weights))
    folder = records.RunFolder(path, experiment)
    finished = processes.on_rank_zero(lambda: folder.check(resume=resume))
    if finished is not None:
        return finished
    with reproducible(experiment.recipe), ExitStack() as stack:
        setup = prepare(experiment, device, data_root=data_root, data=data, weights=weights, cuda_graphs=cuda_graphs)
        run = Run(setup, stop_requested, processes)

        def open_folder() -> tuple[dict[str, Any] | None, list[str]]:
            stack.enter_context(folder.opened(resume=resume))
            return checkpoint.load(folder.checkpoints, folder.experiment, set_aside=True)

        state, remarks = processes.on_rank_zero(open_folder)
        for observer in observers:
            for remark in remarks:
                observer.on_remark(remark)
        if state is not None:
            _restore(run, state, folder)
        where = environment(device, data_root) | {"num_processes": processes.size}
        processes.on_rank_zero(lambda: folder.begin(run.epoch - 1, where, asdict(setup.branches)))
        for observer in observers:
            observer.on_start(experiment, run.num_steps, run.epoch, run.tally.step)
        try:
            _train_epochs(run, folder, observers)
        except StopRequested:
            run.save(folder)
            raise Interrupted(f"stopped in epoch {run.epoch}, after step {run.tally.step}") from None
        return processes.on_rank_zero(lambda: folder.finish(run.result() | _totals(folder.metrics())))


def _train_epochs(run: Run, folder: records.RunFolder, observers: Sequence[Observer]) -> None:
    recipe = run.experiment.recipe
    while run.epoch <= recipe.epochs:
        training_batches = run.training_batches()
        set_epoch(run.experiment, run.depth, run.epoch)
        run.model.train()
        run.watch.start()
        for inputs, labels in training_batches:
            if run.validation_is_due():
                with run.watch.paused():
                    run.validate(folder)
            run.train_step(inputs, labels)
            if run.tally.step % _SHOW_EVERY == 0:
                run.require_finite()
                for observer in observers:
                    observer.on_steps(run.epoch, run.tally.step, run.tally.mean(run.tally.losses))
            if run.tally.step % recipe.checkpoint_every == 0 and run.tally.step < run.num_steps:
                with run.watch.paused():
                    run.save(folder)
        run.watch.stop()
        row = run.finish_epoch(folder)
        run.processes.on_rank_zero(lambda row=row: folder.append_metrics(row))
        run.save(folder)
        for observer in observers:
            observer.on_epoch(row)


def _restore(run: Run, state: dict[str, Any], folder: records.RunFolder) -> None:
    try:
        run.load_state_dict(state)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"the checkpoint in {folder.checkpoints} does not fit this run ({reason}). Start again in another folder."
        ) from error


def _totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    num_steps = sum(row["num_steps"] for row in rows)
    means = {
        name: math.fsum(row[name] * row["num_steps"] for row in rows) / num_steps
        for name in ("realized_depth", "realized_cost")
    }
    # Older versions, whose rows a resumed run may begin with, did not measure process time.
    times = {name: math.fsum(row[name] for row in rows) for name in ("train_s", "process_s") if name in rows[0]}
    return {**times, "final_test_error": rows[-1]["test_error"], **means}
