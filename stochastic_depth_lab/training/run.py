"""The state and the steps of a run. A checkpoint contains everything that resuming bit for bit needs.

A run is a function of its configuration: the order of the images and their augmentation follow from (seed, epoch), the
gates from (seed, step), dropout from (seed, epoch, step), the learning rate from (epoch, step). `Run.state_dict` holds
the rest.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth_lab.data import PictureSplit, Split, batches, num_batches, part_of_batch
from stochastic_depth_lab.data.draws import seed
from stochastic_depth_lab.errors import DataError
from stochastic_depth_lab.runs import checkpoint
from stochastic_depth_lab.runs.records import RunFolder
from stochastic_depth_lab.training.evaluation import BATCH_SIZE, Evaluation, autocast, evaluate
from stochastic_depth_lab.training.processes import Processes
from stochastic_depth_lab.training.regularizers import filter_penalty
from stochastic_depth_lab.training.schedules import learning_rate
from stochastic_depth_lab.training.setup import Setup, build_optimizer


class NotFiniteError(ArithmeticError):
    """The loss is infinite or not a number: one line with epoch and step."""


class StopRequested(Exception):  # noqa: N818 -- nothing went wrong
    """A stop was requested. The state is that after a whole step."""


class Stopwatch:
    """Training time without evaluation and saving: wall clock and process time. Waits for the device.

    Args:
        device: the device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: tuple[float, float] | None = None
        self.seconds = 0.0
        self.process_s = 0.0
        """Of all threads of this process: meaningful on a busy machine too."""

    def start(self) -> None:
        """Start or continue."""
        self._started = self._now()

    def stop(self) -> None:
        """Add the time since the start."""
        if self._started is not None:
            (seconds, process_s), (then, process_then) = self._now(), self._started
            self.seconds += seconds - then
            self.process_s += process_s - process_then
            self._started = None

    @contextmanager
    def paused(self) -> Generator[None]:
        """Do not count what happens inside."""
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
class Tally:
    """Sums and measurements over the steps of an epoch so far."""

    losses: Tensor
    """(num_steps,) float32 on the device."""
    first_conv_grads: Tensor
    """(num_steps,) float32 on the device: mean |gradient| of the first convolution's weights."""
    open_counts: list[float]
    """Per branch: sum over the steps of the share of samples whose gate was open."""
    depth_counts: list[int]
    """Number of steps that ran 0, 1, ..., all branches; with gates per sample, rounded means over the samples."""
    step: int = 0
    """Number of steps done."""
    cost: float = 0.0
    """Sum over the steps of the executed share of training FLOPs."""

    def mean(self, values: Tensor) -> float:
        """Mean over the steps done that are finite: with fp16, steps that overflow are skipped."""
        done = values[: self.step].cpu().double()
        return done[done.isfinite()].mean().item()


@dataclass
class Best:
    """The lowest validation error so far; among equal ones, the lowest validation loss."""

    epoch: int = 0
    step: int = 0
    validation_error: float = math.inf
    validation_loss: float = math.inf
    test_error: float = math.inf


class Run:
    """A run in training.

    Args:
        setup: everything that it trains with.
        stop_requested: called between any two steps.
        processes: the processes that train together.
    """

    def __init__(self, setup: Setup, stop_requested: Callable[[], bool], processes: Processes) -> None:
        self.setup = setup
        self.experiment = setup.experiment
        self.images = setup.images
        self.model = setup.model
        self.depth = setup.depth
        self.device = self.images.data.train.device
        self.processes = processes
        recipe = self.experiment.recipe
        synchronized = recipe.batch_norm == "synchronized"
        self.wrapped = processes.wrapped(self.model, self.device, synchronize_batch_norm=synchronized)
        self.optimizer = build_optimizer(self.model, self.experiment)
        # A scaler that is not enabled changes nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.experiment.precision == "fp16")
        self.first_conv = next(module for module in self.model.modules() if isinstance(module, nn.Conv2d))
        self.epoch_images = len(self.images.data.train) * recipe.epoch_passes
        """Number of images in an epoch, counting every pass."""
        self.num_steps = num_batches(self.epoch_images, recipe.batch_size)
        self.watch = Stopwatch(self.device)
        self.epoch = 1
        self.best = Best()
        self.validated_step = 0
        """Total steps at the last validation."""
        self.tally = self._new_tally()
        self._stop_requested = stop_requested

    def _new_tally(self) -> Tally:
        num_branches = len(self.setup.branches.names)
        empty = torch.zeros(self.num_steps, device=self.device)
        return Tally(empty, empty.clone(), [0.0] * num_branches, [0] * (num_branches + 1))

    @property
    def total_steps(self) -> int:
        """Number of steps done over all epochs."""
        return (self.epoch - 1) * self.num_steps + self.tally.step

    def training_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch's batches."""
        recipe = self.experiment.recipe
        return self._until_stopped(
            batches(
                self.images.data.train,
                recipe.batch_size,
                normalization=self.images.normalization,
                augmentation=self.images.augmentation,
                seed=self.experiment.seed,
                epoch=self.epoch,
                passes=recipe.epoch_passes,
                start=self.tally.step,
                rank=self.processes.rank,
                num_ranks=self.processes.size,
            )
        )

    def _until_stopped(self, items: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for item in items:
            if self.processes.any(self._stop_requested()):
                self.watch.stop()
                raise StopRequested
            yield item

    def train_step(self, inputs: Tensor, labels: Tensor) -> None:
        """Take one step of the optimizer."""
        tally, recipe = self.tally, self.experiment.recipe
        rate = learning_rate(recipe, self.epoch, tally.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout draws from PyTorch's global state, which every step and process seeds again.
        torch.manual_seed(seed("dropout", self.experiment.seed, self.epoch, tally.step, self.processes.rank))
        with autocast(self.device, self.experiment.precision):
            loss = F.cross_entropy(self.wrapped(inputs), labels) * self._weight_of_part()
        objective = loss
        if strength := self.experiment.regularizers.filter_penalty:
            objective = loss + filter_penalty(self.model, strength)
        self.scaler.scale(objective).backward()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        tally.losses[tally.step] = self.processes.sum(loss.detach()) / self.processes.size
        gradient = self.first_conv.weight.grad
        assert gradient is not None, "the first convolution has no gradient after a backward pass"
        tally.first_conv_grads[tally.step] = gradient.abs().mean()
        gates = [1.0] * len(tally.open_counts) if self.depth is None else self.depth.last_gates or []
        tally.open_counts = [count + gate for count, gate in zip(tally.open_counts, gates, strict=True)]
        tally.depth_counts[round(sum(gates))] += 1
        tally.cost += 1.0 if self.setup.cost is None else self.setup.cost.share(gates)
        tally.step += 1
        self.optimizer.zero_grad()

    def _weight_of_part(self) -> float:
        """The weight of this process's mean loss, so that the mean over the processes is that over the batch."""
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
                f"{self.num_steps}: nothing was saved since the last checkpoint. Try a lower learning rate."
            )

    def validation_is_due(self) -> bool:
        """Whether to validate before the next step, within an epoch."""
        every, total = self.experiment.recipe.validate_every, self.total_steps
        return every is not None and total % every == 0 and total != self.validated_step

    def validate(self, folder: RunFolder) -> tuple[Evaluation, Evaluation | None]:
        """Evaluate on the validation part; if it is the best so far, on the test part too, and keep the weights."""
        self.require_finite()
        validation = self._evaluate(self.images.data.validation)
        test = None
        if (validation.error, validation.loss) < (self.best.validation_error, self.best.validation_loss):
            test = self._evaluate(self.images.data.test)
            self.processes.on_rank_zero(
                lambda: checkpoint.save_weights(folder.checkpoints, self.model.state_dict(), folder.experiment)
            )
            self.best = Best(self.epoch, self.tally.step, validation.error, validation.loss, test.error)
        self.validated_step = self.total_steps
        return validation, test

    def finish_epoch(self, folder: RunFolder) -> dict[str, Any]:
        """Evaluate, begin the next epoch, and return this epoch's line of `metrics.jsonl`."""
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
            "realized_depth": math.fsum(tally.open_counts) / num_steps,
            "realized_cost": tally.cost / num_steps,
            "first_conv_grad": tally.mean(tally.first_conv_grads),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "num_steps": num_steps,
            "steps_per_s": num_steps / self.watch.seconds,
            "open_counts": tally.open_counts,
            "depth_counts": tally.depth_counts,
        }
        self.epoch += 1
        self.tally = self._new_tally()
        self.watch.seconds = self.watch.process_s = 0.0
        return row

    def _evaluate(self, part: Split | PictureSplit) -> Evaluation:
        images = batches(
            part,
            BATCH_SIZE,
            normalization=self.images.normalization,
            rank=self.processes.rank,
            num_ranks=self.processes.size,
        )
        self.processes.share_buffers(self.model)
        evaluation = evaluate(self.model, self._until_stopped(images), self.experiment.precision, self.processes.sum)
        if not math.isfinite(evaluation.loss):
            raise NotFiniteError(
                f"the loss in evaluation is {evaluation.loss} in epoch {self.epoch}, after step {self.tally.step} of "
                f"{self.num_steps}: nothing was saved since the last checkpoint."
            )
        return evaluation

    def result(self) -> dict[str, Any]:
        """The part of the run's result that its state contains."""
        return {
            "best_epoch": self.best.epoch,
            "best_step": self.best.step,
            "validation_error": self.best.validation_error,
            "test_error": self.best.test_error,
            "epochs": self.experiment.recipe.epochs,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "expected_depth": self.setup.branches.expected_depth,
            "expected_cost": self.setup.branches.expected_cost,
        }

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint, unless the loss is not finite."""
        self.require_finite()
        self.processes.on_rank_zero(lambda: checkpoint.save(folder.checkpoints, self.state_dict(), folder.experiment))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, bit for bit."""
        return {
            "epoch": self.epoch,
            "tally": {**vars(self.tally)},
            "best": asdict(self.best),
            "validated_step": self.validated_step,
            "train_s": self.watch.seconds,
            "process_s": self.watch.process_s,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gates": None if self.depth is None else self.depth.state_dict(),
            "scaler": self.scaler.state_dict(),
            "normalization": self.images.normalization.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` returned.

        Raises:
            DataError: if the normalization shows that the images are not those that the run began with.
        """
        normalization = self.images.normalization.to("cpu").state_dict()
        then = state["normalization" if "normalization" in state else "normalisation"]  # as version 0.1 spelled it
        if not all(torch.equal(value, normalization[name]) for name, value in then.items()):
            raise DataError("the training images have another mean or deviation than those that this run began with.")
        self.epoch = state["epoch"]
        tally = state["tally"]
        on_device = {name: tally[name].to(self.device) for name in ("losses", "first_conv_grads")}
        # An older version counted less: what it did not count begins at 0.
        self.tally = Tally(**{**vars(self.tally), **tally, **on_device})
        self.best = Best(**state["best"])
        self.validated_step = state["validated_step"]
        self.watch.seconds = state["train_s"]
        self.watch.process_s = state.get("process_s", 0.0)  # an older version did not measure it
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.depth is not None:
            self.depth.load_state_dict(state["gates"])
        self.scaler.load_state_dict(state["scaler"])
