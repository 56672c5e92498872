"""What each command takes, and the experiments that come of it. Only this file knows tyro; no torch is needed.

The docstring of a class is its command's help, that under a field the field's.
"""

import contextlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from stochastic_depth_lab.config import Data, Depth, Experiment, Model, Precision, Recipe, Regularisers, quick
from stochastic_depth_lab.experiments import EXPERIMENTS, find

PROGRAM = "stochastic-depth"

Options = TypeVar("Options")
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run."""

    out: Path
    """The folder for everything that comes of it."""
    resume: Flag = False
    """Go on with what is in the folder, from its last checkpoint."""
    quick: Flag = False
    """Few images and five epochs: shows that everything works."""
    weights: Path | None = None
    """A file with a state_dict of this network to begin with. None: random weights."""
    seed: int | None = None
    """Of weights, order of the images, augmentation and gates. None: the experiment's, which is 0."""
    data_root: Path | None = None
    """Where the data lie, and are downloaded to. None: $STOCHASTIC_DEPTH_DATA, else a folder in the user's cache."""
    device: str | None = None
    """cpu, cuda or cuda:NUMBER. None: the GPU if there is one."""
    precision: Precision | None = None
    """fp32, or mixed precision with bf16 or fp16. None: the experiment's, fp32; bf16 for small forms."""
    tensorboard: Flag = False
    """Write TensorBoard events too."""
    cuda_graphs: Flag = False
    """Replay each branch as a CUDA graph: the same numbers, in less time on a GPU."""


@dataclass(frozen=True)
class ManyOptions:
    """How many runs, and where each of them runs."""

    scale: str = "full"
    """full, or small: the same question, asked of few images: seconds to minutes for each run."""
    seeds: int | None = None
    """Number of runs of each experiment, with the seeds from --seed on; the table has mean and standard deviation.
    None: 5 for digits, else 1 for most tables and figures."""
    jobs: int | None = None
    """Number of concurrent runs, each a process. None: 2 for digits, else 1."""

    def check(self) -> None:
        """Refuse what does not exist.

        Raises:
            ValueError: in one line.
        """
        if self.scale not in ("full", "small"):
            raise ValueError(f"there is no scale {self.scale!r}, but full and small.")
        for name, value in (("--seeds", self.seeds), ("--jobs", self.jobs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}.")


@dataclass(frozen=True)
class Train:
    """Train one experiment; what is given beside its name and the folder changes it."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=f"One of {', '.join(EXPERIMENTS)}.")]
    run: tyro.conf.OmitArgPrefixes[RunOptions]
    data: Data
    model: Model
    depth: tyro.conf.AvoidSubcommands[Depth | None]
    recipe: Recipe
    regularisers: Regularisers


@dataclass(frozen=True)
class Reproduce:
    """Train a pair with constant and with stochastic depth, or all of a table or figure of the paper, and report."""

    name: tyro.conf.Positional[str]
    """What two experiments have in common, such as digits, cifar10-110, svhn-152; or a table or figure, which trains
    what is missing and goes on with what is unfinished: table1, table2, curves, gradients, survival, depth-survival,
    over-time, regularisers."""
    run: tyro.conf.OmitArgPrefixes[RunOptions]
    many: tyro.conf.OmitArgPrefixes[ManyOptions]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's weights again; how far it can be cut, and whether it knows when it is wrong."""

    folder: tyro.conf.Positional[Path]
    """The run folder."""
    analyse: Flag = False
    """What each block adds to its shortcut, the error without it, and calibration; in the run's next report too."""
    subnetworks: Flag = False
    """Error against parameters, FLOPs and latency of its sub-networks, with and without new BatchNorm statistics, as
    table and figure; beside it those of --against, or of the run of constant depth that it was reproduced with."""
    against: Path | None = None
    """Another run folder, for --subnetworks."""
    order: Literal["last", "survival", "lesion"] = "last"
    """Which blocks go first: the last, those that survive least, or those whose lesion changes the outputs least."""
    points: int = 9
    """How many sub-networks of each run, the whole network included."""
    finetune_epochs: int | None = None
    """Train each sub-network on for so many epochs, as a run of its own in finetuned, in the folder for the tables: by
    the run's recipe, at a tenth of its learning rate. A run that is there already is not repeated."""
    monte_carlo: int | None = None
    """Calibration of so many random sub-networks together, against the single forward, as table and figure."""
    out: Path | None = None
    """The folder for tables and figures. None: evaluation, in the run folder."""
    data_root: Path | None = None
    """Where the data lie."""
    device: str | None = None
    """cpu, cuda or cuda:NUMBER. None: the GPU if there is one."""


@dataclass(frozen=True)
class Export:
    """Write a run's network as a file that needs nothing of this project, checked on real images."""

    folder: tyro.conf.Positional[Path]
    """The run folder."""
    format: Literal["onnx", "torch-export", "safetensors"] = "onnx"
    """onnx, torch-export (a program for PyTorch), or safetensors (weights only)."""
    keep: tuple[int, ...] | None = None
    """Blocks to keep, by their index from 0. None: all."""
    cost: float | None = None
    """Keep so many blocks that this share of the FLOPs is left. None: all."""
    order: Literal["last", "survival", "lesion"] = "last"
    """Which blocks go first: the last, those that survive least, or those whose lesion changes the outputs least."""
    normalise: Flag = False
    """Put the normalisation into the file: it takes images as they are stored, uint8."""
    out: Path | None = None
    """The file. None: the experiment's name, with -smaller unless it is whole, in the run folder."""
    data_root: Path | None = None
    """Where the data lie."""


@dataclass(frozen=True)
class Report:
    """Compare runs: a table here, and a page with figures."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """The run folders."""
    out: Path | None = None
    """The folder for the page. None: the run's own, or the one that holds all the runs."""


@dataclass(frozen=True)
class Sweep:
    """Train many runs, several at a time, over several machines; one that crashes loses itself alone."""

    name: tyro.conf.Positional[str]
    """An experiment, or a table or figure: what `reproduce` would train."""
    run: tyro.conf.OmitArgPrefixes[RunOptions]
    many: tyro.conf.OmitArgPrefixes[ManyOptions]
    grid: tuple[str, ...] = ()
    """Options of `train` with their values: recipe.learning-rate=0.1,0.05 depth.schedule=uniform,linear_decay. Every
    combination is a run."""
    shard: str | None = None
    """i/n: this machine's share of n, i from 0, for the job array of a cluster."""


@dataclass(frozen=True)
class Schedule:
    """Show survival probabilities over depth, expected depth and what is saved, for the paper's network."""

    num_layers: int = 110
    """6n + 2."""
    schedule: tyro.conf.Positional[str] = "linear_decay"
    """linear_decay or uniform, or as others count: timm, efficientnet, convnext."""
    final_survival_prob: float = 0.5
    """Survival probability of the last block, in (0, 1]."""
    out: Path | None = None
    """A PNG or SVG file for the figure."""


@dataclass(frozen=True)
class Inspect:
    """Show the branches of a published model, how each is treated, and what skipping them saves."""

    model: tyro.conf.Positional[str]
    """timm:NAME, torchvision:NAME or transformers:NAME; the weights are random."""
    drop_path_rate: float = 0.1
    """The rate that the model is made with, if it has drop paths."""
    schedule: str | None = None
    """Survival over depth in place of the model's own rates, and for models without drop paths: linear_decay, uniform,
    timm, efficientnet, convnext."""
    final_survival_prob: float = 0.5
    """With a schedule: survival probability of the last branch, in (0, 1]."""
    measure: Flag = False
    """Measure time and memory of a step too, against the original model, on this machine."""
    batch_size: int = 8
    """Images in a measured step."""
    image_size: int | None = None
    """Their width and height. None: the model's own."""
    device: str | None = None
    """Where to measure: cpu, cuda or cuda:NUMBER. None: the GPU if there is one."""


@dataclass(frozen=True)
class Bench:
    """Measure what skipping is worth on this machine: a training step of the paper's network, in ratios."""

    num_layers: int = 56
    """6n + 2."""
    batch_size: int = 64
    """Images in a step, 32x32, made up."""
    final_survival_prob: float = 0.5
    """Survival probability of the last block, in (0, 1]; linear decay."""
    rounds: int = 8
    """Each takes every way of training once."""
    device: str | None = None
    """cpu, cuda or cuda:NUMBER. None: the GPU if there is one."""


def parse(kind: type[Options], command: str, arguments: Sequence[str], default: Any = tyro.MISSING) -> Options:
    """The options of a command, from its words.

    Args:
        kind: the command's class.
        command: what it is called.
        arguments: its words.
        default: options to begin with.

    Raises:
        ValueError: for a mistake, in one line in place of tyro's box.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            defaults = {} if default is tyro.MISSING else {"default": default}
            return tyro.cli(kind, prog=f"{PROGRAM} {command}", args=arguments, **defaults)
    except SystemExit as stop:
        if not stop.code:
            raise
        _, *lines = box.getvalue().splitlines()
        inside = [line.strip("│╭╮╰╯─ ") for line in lines]
        message = " ".join(inside[: inside.index("")] if "" in inside else inside)
        raise ValueError(f"{message.rstrip('.')}. See {PROGRAM} {command} --help.") from None


def parse_train(arguments: Sequence[str]) -> tuple[Experiment, RunOptions]:
    """The experiment that the words of `train` name, changed as they say, and where to run it.

    Raises:
        ValueError: for a mistake, in one line.
    """
    name = next((argument for argument in arguments if argument in EXPERIMENTS), None)
    if name is None and not {"-h", "--help"} & {*arguments}:
        meant = next((argument for argument in arguments if not argument.startswith("-")), None)
        if meant is None:
            raise ValueError("name the experiment to train, such as digits-stochastic; --help lists them all.")
        find(meant)
    changed, run, named = _parse_changes(_begun(name or "cifar10-110-stochastic", arguments), arguments)
    if named != name:  # the first such word was the value of an option
        changed, run, _ = _parse_changes(_begun(find(named).name, arguments), arguments)
    return changed, run


def _begun(name: str, arguments: Sequence[str]) -> Experiment:
    base = EXPERIMENTS[name]
    return quick(base) if "--quick" in arguments else base


def _parse_changes(base: Experiment, arguments: Sequence[str]) -> tuple[Experiment, RunOptions, str]:
    """An experiment, changed as options of `train` say, where to run it, and the name that was given."""
    default = Train(
        base.name, RunOptions(tyro.MISSING), base.data, base.model, base.depth, base.recipe, base.regularisers
    )
    options = parse(Train, "train", arguments, default)
    parts = {name: getattr(options, name) for name in ("data", "model", "depth", "recipe", "regularisers")}
    changed = replace(base, **parts)
    if changed != base:
        changed = replace(changed, published=None)  # it is no longer the published experiment
    return with_options(changed, options.run), options.run, options.experiment


def with_options(experiment: Experiment, options: RunOptions) -> Experiment:
    """The experiment with the seed and the precision that were asked for."""
    return replace(
        experiment,
        seed=experiment.seed if options.seed is None else options.seed,
        precision=options.precision or experiment.precision,
    )


def grid(base: Experiment, fields: Sequence[str]) -> list[Experiment]:
    """Every combination of the values of some fields, parsed and checked as those of `train`.

    Args:
        base: the experiment to change.
        fields: `FIELD=VALUE,VALUE`.

    Raises:
        ValueError: for a mistake, in one line.

    Example:
        >>> base = find("digits-stochastic")
        >>> [each.depth.final_survival_prob for each in grid(base, ["depth.final-survival-prob=0.3,0.7"])]
        [0.3, 0.7]
    """
    choices: list[list[tuple[str, str]]] = []
    for text in fields:
        field, equals, values = text.partition("=")
        if not (field and equals and values):
            raise ValueError(f"--grid takes FIELD=VALUE,VALUE, such as recipe.learning-rate=0.1,0.05, but is {text!r}.")
        if "." not in field and field != "precision":
            raise ValueError(f"--grid takes fields of an experiment, such as recipe.learning-rate, but not {field!r}.")
        each = values.split(",")
        if twice := next((value for value in each if each.count(value) > 1), None):
            raise ValueError(f"--grid has {field}={twice} twice.")
        choices.append([(field, value) for value in each])
    experiments: list[Experiment] = []
    for combination in itertools.product(*choices):
        words = [word for field, value in combination for word in (f"--{field}", value)]
        changed, *_ = _parse_changes(base, [base.name, "--out", ".", *words])
        suffix = "".join(f"-{field.rpartition('.')[2]}-{value}" for field, value in combination)
        experiments.append(replace(changed, name=f"{base.name}{suffix}", title=f"{base.title}{suffix}"))
    return experiments


def with_seeds(experiments: Sequence[Experiment], run: RunOptions, many: ManyOptions) -> list[Experiment]:
    """All seeds of an experiment, then those of the next."""
    first = run.seed or 0
    seeds = range(first, first + (many.seeds or 1))
    return [with_options(each, replace(run, seed=seed)) for each in experiments for seed in seeds]
