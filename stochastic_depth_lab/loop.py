"""The training loop, from the first step to the result, and on from any step where it was interrupted.

A run is a function of its configuration: the order of the images and their augmentation follow from (seed, epoch),
gates from (seed, step), dropout from (seed, epoch, step), the learning rate from (epoch, step). What is left to
remember is the state of a `_Run`.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.cost import Cost
from stochastic_depth_lab import checkpoint, records
from stochastic_depth_lab.build import (
    Images,
    build_network,
    build_optimiser,
    capture_branches,
    describe_branches,
    load_images,
    load_weights,
    reproducible,
    set_epoch,
)
from stochastic_depth_lab.config import Experiment, check
from stochastic_depth_lab.data import DataError, ImageData, PictureSplit, Split, batches, num_batches, part_of_batch
from stochastic_depth_lab.data.seeding import seed
from stochastic_depth_lab.evaluation import BATCH_SIZE, Evaluation, autocast, evaluate
from stochastic_depth_lab.lr_schedules import learning_rate
from stochastic_depth_lab.processes import Processes
from stochastic_depth_lab.regularisers import filter_penalty

_ALONE = Processes()
_MOST_TIMED = 64
"""Images that the expected time is measured with: no more memory than training needs, and a few seconds."""
_LOOK_EVERY = 20
"""Steps after which losses are read: reading one waits for the device."""


class NotFiniteError(ArithmeticError):
    """The loss is infinite or no number: one line with epoch and step."""


class Interrupted(Exception):  # noqa: N818 -- nothing went wrong
    """The run was asked to stop, and has saved where it was."""


class Observer(Protocol):
    """What is told how a run goes on, to show it."""

    def on_start(self, experiment: Experiment, num_steps: int, epoch: int, step: int) -> None:
        """The first step to come; `num_steps` is an epoch's."""
        ...

    def on_steps(self, epoch: int, step: int, train_loss: float) -> None:
        """`step` steps of an epoch are done; mean loss of the epoch so far. Now and then."""
        ...

    def on_epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done; its line of `metrics.jsonl`."""
        ...

    def on_remark(self, remark: str) -> None:
        """Something to know, in one line."""
        ...


def train(
    experiment: Experiment,
    path: Path,
    observers: Sequence[Observer],
    *,
    device: torch.device,
    data_root: Path | None = None,
    data: ImageData | None = None,
    weights: Path | None = None,
    resume: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    processes: Processes = _ALONE,
    cuda_graphs: bool = False,
) -> dict[str, Any]:
    """Train, from the beginning or from the last checkpoint, and return the result.

    Own images, from any PyTorch data set or `DataLoader`, take the place of the experiment's: each part is a
    `Split.from_dataset(...)`, the three are an `ImageData`, and `experiment.data.dataset` is what they are called.

    Args:
        experiment: what to train.
        path: the run folder.
        observers: are told how it goes on.
        device: where.
        data_root: where the data lie.
        data: images in place of those that the experiment names.
        weights: a file with a `state_dict` to begin with, in place of random weights.
        resume: go on with the run in the folder.
        stop_requested: asked between any two steps or evaluation batches; of several processes one is enough.
        processes: those that train together, each on its part of every batch.
        cuda_graphs: replay branches as CUDA graphs: the same numbers, in less time on a GPU.

    Raises:
        ValueError: in one line, for what cannot be done as asked; nothing is overwritten.
        NotFiniteError: if the loss is not finite; the last checkpoint is kept.
        Interrupted: if a stop was requested; the checkpoint is that of the last step.
    """
    check(experiment)
    if weights is not None:
        experiment = replace(experiment, initial_weights=checkpoint.digest(weights))
    finished = processes.from_first(lambda: records.look(path, experiment, resume=resume))
    if finished is not None:
        return finished
    with reproducible(experiment.recipe):
        images = load_images(experiment, device, data_root, data)
        model, depth = build_network(experiment, images.data)
        if weights is not None:
            load_weights(model, checkpoint.read(weights), str(weights))
        few = images.data.train.first(min(_MOST_TIMED, experiment.recipe.batch_size)).images
        with autocast(device, experiment.precision):
            branches, cost = describe_branches(experiment, model, depth, images.normalisation(few))
        if depth is not None:
            depth.set_costs(cost)  # what draw="equal_cost" evens out
        if cuda_graphs:
            capture_branches(experiment, model, depth)
        num_branches = len(branches.names)
        run = _Run(experiment, images, model, depth, cost, num_branches, stop_requested, processes)
        folder = records.RunFolder(path, experiment)
        with ExitStack() as stack:

            def begin() -> tuple[dict[str, Any] | None, list[str]]:
                nonlocal folder
                folder = stack.enter_context(records.opened(path, experiment, resume=resume))
                return checkpoint.load(folder.checkpoints, folder.experiment, set_aside=True)

            state, remarks = processes.from_first(begin)
            for observer in observers:
                for remark in remarks:
                    observer.on_remark(remark)
            if state is not None:
                _restore(run, state, folder.checkpoints)
            environment = records.environment(device, data_root) | {"num_processes": processes.size}

            def write_beginning() -> None:
                folder.keep_epochs(run.epoch - 1)
                folder.write_beginning(environment, asdict(branches))

            processes.from_first(write_beginning)
            for observer in observers:
                observer.on_start(experiment, run.num_steps, run.epoch, run.tally.step)
            try:
                _train_epochs(run, folder, observers)
            except _StopRequested:
                run.save(folder)
                raise Interrupted(f"stopped in epoch {run.epoch}, after step {run.tally.step}") from None
            result = run.result() | {"expected_depth": branches.expected_depth, "expected_cost": branches.expected_cost}

            def write_result() -> dict[str, Any]:
                folder.write_result(result | _totals(folder.metrics()))
                return records.read_json(path / "result.json")

            return processes.from_first(write_result)


def _restore(run: "_Run", state: dict[str, Any], checkpoints: Path) -> None:
    try:
        run.load_state_dict(state)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise checkpoint.CheckpointError(
            f"the checkpoint in {checkpoints} holds the state of something else ({reason}). "
            "Begin anew in another folder."
        ) from error


def _train_epochs(run: "_Run", folder: records.RunFolder, observers: Sequence[Observer]) -> None:
    recipe, data = run.experiment.recipe, run.images.data
    while run.epoch <= recipe.epochs:
        training_batches = batches(
            data.train,
            recipe.batch_size,
            normalisation=run.images.normalisation,
            augmentation=run.images.augmentation,
            seed=run.experiment.seed,
            epoch=run.epoch,
            passes=recipe.epoch_passes,
            start=run.tally.step,
            rank=run.processes.rank,
            num_ranks=run.processes.size,
        )
        set_epoch(run.experiment, run.depth, run.epoch)
        run.model.train()
        run.watch.start()
        for inputs, labels in run.until_stopped(training_batches):
            if run.validation_is_due():
                with run.watch.paused():
                    run.validate(folder)
            run.train_step(inputs, labels)
            if run.tally.step % _LOOK_EVERY == 0:
                run.require_finite()
                for observer in observers:
                    observer.on_steps(run.epoch, run.tally.step, run.tally.mean(run.tally.losses))
            if run.tally.step % recipe.checkpoint_every == 0 and run.tally.step < run.num_steps:
                with run.watch.paused():
                    run.save(folder)
        run.watch.stop()
        row = run.finish_epoch(folder)
        run.processes.from_first(lambda row=row: folder.append_metrics(row))
        run.save(folder)
        for observer in observers:
            observer.on_epoch(row)


def _totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    num_steps = sum(row["num_steps"] for row in rows)
    means = {
        name: math.fsum(row[name] * row["num_steps"] for row in rows) / num_steps
        for name in ("realised_depth", "realised_cost")
    }
    # The rows of an older version, which a resumed run may begin with, lack the time of the processor.
    times = {name: math.fsum(row[name] for row in rows) for name in ("train_s", "process_s") if name in rows[0]}
    return {**times, "final_test_error": rows[-1]["test_error"], **means}


class _StopRequested(Exception):  # noqa: N818 -- nothing went wrong
    pass


class _Stopwatch:
    """Seconds of training, without evaluation and saving, by the clock and of the processor; waits for the device.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: tuple[float, float] | None = None
        self.seconds = 0.0
        self.process_s = 0.0
        """Of this process, over all its threads: what a machine with other work still tells."""

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        if self._started is not None:
            (seconds, process_s), (then, process_then) = self._now(), self._started
            self.seconds += seconds - then
            self.process_s += process_s - process_then
            self._started = None

    @contextmanager
    def paused(self) -> Generator[None]:
        self.stop()
        yield
        self.start()

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter(), time.process_time()


@dataclass
class _Tally:
    """What an epoch has given so far."""

    losses: Tensor
    """(num_steps,) float32 on the device."""
    first_conv_grads: Tensor
    """(num_steps,) float32 on the device: mean |gradient| of the first convolution's weights."""
    open_counts: list[float]
    """Per branch: sum over the steps of the share of samples whose gate was open."""
    depth_counts: list[int]
    """How many steps ran 0, 1, ..., all branches; with gates per sample, averaged over the samples, rounded."""
    step: int = 0
    """Steps done."""
    cost: float = 0.0
    """Sum over the steps of the executed share of training FLOPs."""

    def mean(self, values: Tensor) -> float:
        """Mean over the steps done, of those that are finite: steps in which fp16 overflows are not made."""
        done = values[: self.step].cpu().double()
        return done[done.isfinite()].mean().item()


@dataclass
class _Best:
    """The lowest validation error so far; of equal ones that with the lower validation loss."""

    epoch: int = 0
    step: int = 0
    validation_error: float = math.inf
    validation_loss: float = math.inf
    test_error: float = math.inf


class _Run:
    """All that changes while a run goes on.

    Args:
        experiment: what runs.
        images: its images, on the device.
        model: its network.
        depth: the network's controller, None at constant depth.
        cost: what the branches cost, None at constant depth.
        num_branches: of the network, gated or not.
        stop_requested: whether to stop between two steps.
        processes: those that train together.
    """

    def __init__(
        self,
        experiment: Experiment,
        images: Images,
        model: nn.Module,
        depth: sd.Controller | None,
        cost: Cost | None,
        num_branches: int,
        stop_requested: Callable[[], bool],
        processes: Processes,
    ) -> None:
        self.experiment = experiment
        self.images = images
        self.model = model
        self.depth = depth
        self.cost = cost
        self.device = images.data.train.device
        self.processes = processes
        synchronised = experiment.recipe.batch_norm == "synchronised"
        self.wrapped = processes.wrapped(model, self.device, synchronise_batch_norm=synchronised)
        self.optimiser = build_optimiser(model, experiment)
        # A scaler that is not enabled passes everything through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=experiment.precision == "fp16")
        self.first_conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.num_branches = num_branches
        self.epoch_images = len(images.data.train) * experiment.recipe.epoch_passes
        """Images of an epoch, each pass over the training part counted."""
        self.num_steps = num_batches(self.epoch_images, experiment.recipe.batch_size)
        self.watch = _Stopwatch(self.device)
        self.epoch = 1
        self.best = _Best()
        self.validated_step = 0
        """Steps, over all epochs, after which validation was last looked at."""
        self.tally = self._new_tally()
        self._stop_requested = stop_requested

    def _new_tally(self) -> _Tally:
        empty = torch.zeros(self.num_steps, device=self.device)
        return _Tally(empty, empty.clone(), [0.0] * self.num_branches, [0] * (self.num_branches + 1))

    def until_stopped(self, items: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The items, until a stop is requested: between any two of them the state is that of a whole step."""
        for item in items:
            if self.processes.any(self._stop_requested()):
                self.watch.stop()
                raise _StopRequested
            yield item

    def train_step(self, inputs: Tensor, labels: Tensor) -> None:
        """One step of the optimiser."""
        tally, recipe = self.tally, self.experiment.recipe
        rate = learning_rate(recipe, self.epoch, tally.step, self.num_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        # Dropout draws from PyTorch's global state, which begins anew in each step, elsewhere in each process.
        torch.manual_seed(seed("dropout", self.experiment.seed, self.epoch, tally.step, self.processes.rank))
        with autocast(self.device, self.experiment.precision):
            loss = F.cross_entropy(self.wrapped(inputs), labels) * self._weight_of_part()
        objective = loss
        if strength := self.experiment.regularisers.filter_penalty:
            objective = loss + filter_penalty(self.model, strength)
        self.scaler.scale(objective).backward()
        self.scaler.unscale_(self.optimiser)
        self.scaler.step(self.optimiser)
        self.scaler.update()

        tally.losses[tally.step] = self.processes.sum(loss.detach()) / self.processes.size
        tally.first_conv_grads[tally.step] = _gradient(self.first_conv).abs().mean()
        gates = [1.0] * self.num_branches if self.depth is None else self.depth.last_gates or []
        tally.open_counts = [count + gate for count, gate in zip(tally.open_counts, gates, strict=True)]
        tally.depth_counts[round(sum(gates))] += 1
        tally.cost += 1.0 if self.cost is None else self.cost.share(gates)
        tally.step += 1
        self.optimiser.zero_grad()

    def _weight_of_part(self) -> float:
        """What this process's mean loss counts, so that the mean over the processes is that over the batch."""
        if self.processes.size == 1:
            return 1.0
        batch_size = self.experiment.recipe.batch_size
        num_images = min(batch_size, self.epoch_images - self.tally.step * batch_size)
        part = part_of_batch(num_images, self.processes.rank, self.processes.size)
        return len(part) * self.processes.size / num_images

    def require_finite(self) -> None:
        """Raise `NotFiniteError` if a loss of this epoch is not finite."""
        losses = self.tally.losses[: self.tally.step]
        broken = (~losses.isfinite()).nonzero().flatten().tolist()
        if broken:
            raise NotFiniteError(
                f"the loss is {losses[broken[0]].item()} in epoch {self.epoch}, step {broken[0] + 1} of "
                f"{self.num_steps}: nothing was saved since the last checkpoint. A lower learning rate may help."
            )

    def validation_is_due(self) -> bool:
        """Whether the lowest validation error is to be looked for before the next step, within an epoch."""
        every, total = self.experiment.recipe.validate_every, self._total_steps()
        return every is not None and total % every == 0 and total != self.validated_step

    def validate(self, folder: records.RunFolder) -> tuple[Evaluation, Evaluation | None]:
        """Evaluate on the validation part and, if that is the best so far, on the test part; keep the best weights."""
        self.require_finite()
        validation = self._evaluate(self.images.data.validation)
        test = None
        if (validation.error, validation.loss) < (self.best.validation_error, self.best.validation_loss):
            test = self._evaluate(self.images.data.test)
            self.processes.from_first(
                lambda: checkpoint.save_weights(folder.checkpoints, self.model.state_dict(), folder.experiment)
            )
            self.best = _Best(self.epoch, self.tally.step, validation.error, validation.loss, test.error)
        self.validated_step = self._total_steps()
        return validation, test

    def finish_epoch(self, folder: records.RunFolder) -> dict[str, Any]:
        """Evaluate, begin the next epoch, and return this one's line of `metrics.jsonl`."""
        validation, test = self.validate(folder)
        test = test or self._evaluate(self.images.data.test)
        tally, num_steps = self.tally, self.num_steps
        row = {
            "epoch": self.epoch,
            "train_loss": tally.mean(tally.losses),
            "validation_error": validation.error,
            "validation_loss": validation.loss,
            "test_error": test.error,
            "test_loss": test.loss,
            "train_s": self.watch.seconds,
            "process_s": self.watch.process_s,
            "realised_depth": math.fsum(tally.open_counts) / num_steps,
            "realised_cost": tally.cost / num_steps,
            "first_conv_grad": tally.mean(tally.first_conv_grads),
            "learning_rate": self.optimiser.param_groups[0]["lr"],
            "num_steps": num_steps,
            "steps_per_s": num_steps / self.watch.seconds,
            "open_counts": tally.open_counts,
            "depth_counts": tally.depth_counts,
        }
        self.epoch += 1
        self.tally = self._new_tally()
        self.watch.seconds = self.watch.process_s = 0.0
        return row

    def _evaluate(self, split: Split | PictureSplit) -> Evaluation:
        images = batches(
            split,
            BATCH_SIZE,
            normalisation=self.images.normalisation,
            rank=self.processes.rank,
            num_ranks=self.processes.size,
        )
        self.processes.share_buffers(self.model)
        evaluation = evaluate(self.model, self.until_stopped(images), self.experiment.precision, self.processes.sum)
        if not math.isfinite(evaluation.loss):
            raise NotFiniteError(
                f"the loss in evaluation is {evaluation.loss} in epoch {self.epoch}, after step {self.tally.step} of "
                f"{self.num_steps}: nothing was saved since the last checkpoint."
            )
        return evaluation

    def _total_steps(self) -> int:
        return (self.epoch - 1) * self.num_steps + self.tally.step

    def result(self) -> dict[str, Any]:
        """What the run gave, as far as its state tells."""
        return {
            "best_epoch": self.best.epoch,
            "best_step": self.best.step,
            "validation_error": self.best.validation_error,
            "test_error": self.best.test_error,
            "epochs": self.experiment.recipe.epochs,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }

    def save(self, folder: records.RunFolder) -> None:
        """Write a checkpoint, unless the loss is not finite."""
        self.require_finite()
        self.processes.from_first(lambda: checkpoint.save(folder.checkpoints, self.state_dict(), folder.experiment))

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, bit for bit."""
        return {
            "epoch": self.epoch,
            "tally": {**vars(self.tally)},
            "best": asdict(self.best),
            "validated_step": self.validated_step,
            "train_s": self.watch.seconds,
            "process_s": self.watch.process_s,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "gates": None if self.depth is None else self.depth.state_dict(),
            "scaler": self.scaler.state_dict(),
            "normalisation": self.images.normalisation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            DataError: if the images are not those that the run began with, as far as their normalisation tells.
        """
        normalisation = self.images.normalisation.to("cpu").state_dict()
        if not all(torch.equal(value, normalisation[name]) for name, value in state["normalisation"].items()):
            raise DataError("the training images have another mean or deviation than those that this run began with.")
        self.epoch = state["epoch"]
        tally = state["tally"]
        on_device = {name: tally[name].to(self.device) for name in ("losses", "first_conv_grads")}
        # An older version counted less: what it did not count begins at 0.
        self.tally = _Tally(**{**vars(self.tally), **tally, **on_device})
        self.best = _Best(**state["best"])
        self.validated_step = state["validated_step"]
        self.watch.seconds = state["train_s"]
        self.watch.process_s = state.get("process_s", 0.0)  # an older version did not measure it
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.depth is not None:
            self.depth.load_state_dict(state["gates"])
        self.scaler.load_state_dict(state["scaler"])


def _gradient(module: nn.Conv2d) -> Tensor:
    gradient = module.weight.grad
    assert gradient is not None, "the first convolution has no gradient after a backward pass"
    return gradient
