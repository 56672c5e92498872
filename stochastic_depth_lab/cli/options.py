"""The options of each command, and the experiments they describe. Needs no torch.

The docstring of a class is the help of its command; the docstring below a field is the help of its option.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from stochastic_depth_lab.cli.arguments import Inline, Positional, UsageError, build, help_text, read
from stochastic_depth_lab.experiments import EXPERIMENTS, find
from stochastic_depth_lab.experiments.config import (
    Data,
    Depth,
    Experiment,
    Model,
    Order,
    Precision,
    Recipe,
    Regularizers,
)
from stochastic_depth_lab.experiments.scales import quick

PROGRAM = "stochastic-depth"

Options = TypeVar("Options")
Folder = Annotated[Path, "FOLDER"]
Run = Annotated[Path, Positional("RUN")]
Device = Annotated[str, "DEVICE"]
ScheduleName = Literal["linear_decay", "uniform", "timm", "efficientnet", "convnext"]


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run."""

    out: Folder
    """Output folder."""
    resume: bool = False
    """Resume the run in the output folder from its last checkpoint."""
    quick: bool = False
    """Train for five epochs on a few images, to see that everything works. The numbers mean nothing."""
    weights: Annotated[Path, "FILE"] | None = None
    """Start from the state_dict in FILE instead of random weights."""
    seed: Annotated[int, "N"] | None = None
    """Seed of weights, order of images, augmentation and gates (default: the experiment's, 0)."""
    data_root: Folder | None = None
    """Folder of the data sets, and where to download them (default: $STOCHASTIC_DEPTH_DATA, else your cache)."""
    device: Device | None = None
    """cpu, cuda, cuda:N or mps (default: the GPU if there is one)."""
    precision: Precision | None = None
    """fp32, or mixed precision with bf16 or fp16 (default: the experiment's)."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    cuda_graphs: bool = False
    """Replay each branch as a CUDA graph: the same numbers in less time on a GPU."""


@dataclass(frozen=True)
class ManyOptions:
    """Which runs to train, and how many concurrently."""

    scale: Literal["full", "small"] = "full"
    """Train the full networks, or smaller ones on few images, which takes seconds to minutes per run."""
    seeds: Annotated[int, "N"] | None = None
    """Run each experiment with N seeds, starting at --seed (default: 5 for digits, 1 for most tables and figures)."""
    jobs: Annotated[int, "N"] | None = None
    """Number of concurrent runs, each in its own process (default: 2 for digits, else 1)."""

    def check(self) -> None:
        """Refuse numbers below 1.

        Raises:
            ValueError: in one line.
        """
        for name, value in (("--seeds", self.seeds), ("--jobs", self.jobs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}.")


@dataclass(frozen=True)
class Train:
    """Train one experiment; options override its settings.

    Examples:
      stochastic-depth train digits-stochastic --out runs/one
      stochastic-depth train digits-stochastic --out runs/one --resume
      stochastic-depth train digits-stochastic --out runs/two --depth.schedule uniform
      stochastic-depth train digits-stochastic --help    # settings of the experiment
    """

    experiment: Annotated[str, Positional("EXPERIMENT")]
    run: Annotated[RunOptions, Inline()]
    data: Data
    model: Model
    depth: Depth | None
    recipe: Recipe
    regularizers: Regularizers


@dataclass(frozen=True)
class Reproduce:
    """Train a pair with constant and stochastic depth, or a whole table or figure of the paper, and write the report.

    Examples:
      stochastic-depth reproduce digits --out runs/digits
      stochastic-depth reproduce table1 --out runs/table1 --scale small --jobs 2
    """

    name: Annotated[str, Positional("NAME")]
    """A pair of experiments, such as digits, cifar10-110 or svhn-152; or a table or figure: table1, table2, curves,
    gradients, survival, depth-survival, over-time, regularizers. Finished runs are skipped, and unfinished runs of a
    table are resumed."""
    run: Annotated[RunOptions, Inline()]
    many: Annotated[ManyOptions, Inline()]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's weights, its blocks, its subnetworks, or its calibration.

    Examples:
      stochastic-depth evaluate runs/one
      stochastic-depth evaluate runs/one --subnetworks --order lesion
      stochastic-depth evaluate runs/one --monte-carlo 16
    """

    folder: Run
    """Run folder."""
    analyze: bool = False
    """Measure what each block adds to its shortcut, the error without it, and calibration; the next report shows it."""
    subnetworks: bool = False
    """Plot error against parameters, FLOPs and latency of subnetworks, with and without new BatchNorm statistics,
    next to those of --against, or of the constant-depth run in the same folder."""
    against: Annotated[Path, "RUN"] | None = None
    """Compare the subnetworks with those of another run folder."""
    order: Order = "last"
    """Remove first the last blocks, those that survive least, or those whose removal changes the outputs least."""
    points: int = 9
    """Number of subnetworks per run, the whole network included."""
    finetune_epochs: Annotated[int, "N"] | None = None
    """Fine-tune each subnetwork for N epochs at a tenth of the learning rate, as a run in the folder finetuned
    of the output folder. Finished runs are skipped."""
    monte_carlo: Annotated[int, "N"] | None = None
    """Compare the calibration of the mean of N random subnetworks with that of a single forward."""
    out: Folder | None = None
    """Output folder for tables and figures (default: evaluation, in the run folder)."""
    data_root: Folder | None = None
    """Folder of the data sets (default: where the run found them)."""
    device: Device | None = None
    """cpu, cuda, cuda:N or mps (default: the GPU if there is one)."""


@dataclass(frozen=True)
class Export:
    """Export a run's network to a file that works without this project, checked on real images.

    Examples:
      stochastic-depth export runs/one
      stochastic-depth export runs/one --cost 0.6 --normalize --out small.onnx
    """

    folder: Run
    """Run folder."""
    format: Literal["onnx", "torch-export", "safetensors"] = "onnx"
    """ONNX, a torch.export program, or safetensors (weights only)."""
    keep: tuple[int, ...] | None = None
    """Keep only these blocks, by their index from 0."""
    cost: float | None = None
    """Remove blocks until this share of the FLOPs is left."""
    order: Order = "last"
    """Remove first the last blocks, those that survive least, or those whose removal changes the outputs least."""
    normalize: bool = False
    """Include the normalization, so that the file takes uint8 images."""
    out: Annotated[Path, "FILE"] | None = None
    """Output file (default: named after the experiment, in the run folder)."""
    data_root: Folder | None = None
    """Folder of the data sets (default: where the run found them)."""


@dataclass(frozen=True)
class Report:
    """Compare runs: print a table, and write a page with figures.

    Examples:
      stochastic-depth report runs/one
      stochastic-depth report runs/digits    # all runs in the folder
      stochastic-depth report runs/one runs/two --out runs/comparison
    """

    folders: Annotated[tuple[Path, ...], Positional("RUN")]
    """Run folders, or folders of runs, such as those of a sweep or of a table."""
    out: Folder | None = None
    """Output folder (default: the run's own, or the folder that holds all the runs)."""


@dataclass(frozen=True)
class Sweep:
    """Train many runs, several at a time or over several machines. A crash does not affect the other runs.

    Examples:
      stochastic-depth sweep digits-stochastic --out runs/sweep --grid recipe.epochs=5,20
      stochastic-depth sweep table1 --out runs/table1 --shard 0/4
    """

    name: Annotated[str, Positional("NAME")]
    """An experiment; or a pair, a table or a figure, as for `reproduce`."""
    run: Annotated[RunOptions, Inline()]
    many: Annotated[ManyOptions, Inline()]
    grid: Annotated[tuple[str, ...], "FIELD=VALUE,VALUE"] = ()
    """Options of `train` with their values, such as recipe.learning-rate=0.1,0.05 depth.schedule=uniform,linear_decay.
    Every combination is a run."""
    shard: Annotated[str, "I/N"] | None = None
    """Train share I of N, from 0, for the job array of a cluster."""


@dataclass(frozen=True)
class Schedule:
    """Show survival probabilities over depth, expected depth and expected cost for the paper's network.

    Examples:
      stochastic-depth schedule
      stochastic-depth schedule uniform --final-survival-prob 0.8 --out survival.svg
    """

    schedule: Annotated[ScheduleName, Positional("SCHEDULE")] = "linear_decay"
    """linear_decay (the paper's) or uniform; or the schedule of timm, efficientnet or convnext."""
    num_layers: int = 110
    """Number of layers, 6n + 2."""
    final_survival_prob: float = 0.5
    """Survival probability of the last block, in (0, 1]."""
    out: Annotated[Path, "FILE"] | None = None
    """Write the figure to a .png or .svg file."""


@dataclass(frozen=True)
class Inspect:
    """Show the branches of a published model, how each is treated, and what skipping them saves.

    Examples:
      stochastic-depth inspect timm:vit_small_patch16_224 --drop-path-rate 0.4
      stochastic-depth inspect torchvision:resnet50 --schedule linear_decay
    """

    model: Annotated[str, Positional("MODEL")]
    """timm:NAME, torchvision:NAME or transformers:TYPE; the weights are random."""
    drop_path_rate: float = 0.1
    """Drop rate of a model that has drop paths."""
    schedule: ScheduleName | None = None
    """Replace the model's own rates by a schedule, or give one to a model without drop paths."""
    final_survival_prob: float = 0.5
    """With --schedule: survival probability of the last branch, in (0, 1]."""
    measure: bool = False
    """Also measure time and memory of a step on this machine, relative to the original model."""
    batch_size: int = 8
    """Number of images in a measured step."""
    image_size: Annotated[int, "N"] | None = None
    """Width and height of the images (default: the model's own)."""
    device: Device | None = None
    """Where to measure: cpu, cuda, cuda:N or mps (default: the GPU if there is one)."""


@dataclass(frozen=True)
class Bench:
    """Measure what skipping saves in a training step of the paper's network on this machine.

    Examples:
      stochastic-depth bench
      stochastic-depth bench --num-layers 110 --device cuda
    """

    num_layers: int = 56
    """Number of layers, 6n + 2."""
    batch_size: int = 64
    """Number of images in a step, 32x32, random."""
    final_survival_prob: float = 0.5
    """Survival probability of the last block, in (0, 1], with linear decay."""
    rounds: int = 8
    """Number of rounds; each times one step of every method."""
    device: Device | None = None
    """cpu, cuda, cuda:N or mps (default: the GPU if there is one)."""


@dataclass(frozen=True)
class Completion:
    """Print a completion script for a shell.

    Examples:
      eval "$(stochastic-depth completion bash)"
      stochastic-depth completion fish > ~/.config/fish/completions/stochastic-depth.fish
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], Positional("SHELL")]
    """bash, zsh or fish."""


def parse(kind: type[Options], command: str, words: Sequence[str]) -> Options:
    """Parse the options of a command.

    Args:
        kind: the command's class.
        command: its name.
        words: the words after it.

    Raises:
        ValueError: for a mistake, in one line.
        SystemExit: after printing the help.
    """
    _help_if_asked(kind, command, words)
    try:
        return build(kind, read(kind, f"{PROGRAM} {command}", words))
    except UsageError as error:
        raise _see_help(error, command) from None


def parse_train(words: Sequence[str]) -> tuple[Experiment, RunOptions]:
    """Parse the words of `train`: the experiment, with its settings overridden, and where to run it.

    Raises:
        ValueError: for a mistake, in one line.
        SystemExit: after printing the help.
    """
    _help_if_asked(Train, "train", words)
    try:
        given = read(Train, f"{PROGRAM} train", words)
        if "experiment" not in given:
            raise UsageError("Missing EXPERIMENT, such as digits-stochastic.")
        base = find(given["experiment"])
        return changed(quick(base) if given.get("quick") else base, given)
    except UsageError as error:
        raise _see_help(error, "train") from None


def changed(base: Experiment, given: Mapping[str, Any]) -> tuple[Experiment, RunOptions]:
    """An experiment with some settings overridden, and where to run it.

    Args:
        base: the experiment to change.
        given: fields of `Train` by their paths.

    Raises:
        UsageError: for a setting of stochastic depth at constant depth, or if a field is missing.
    """
    if base.depth is None and (setting := next((name for name in given if name.startswith("depth.")), None)):
        twin = base.name.removesuffix("-constant") + "-stochastic"
        hint = f" Use {twin}." if twin in EXPERIMENTS else ""
        raise UsageError(
            f"--{setting.replace('_', '-')} needs stochastic depth, but {base.name} has constant depth.{hint}"
        )
    run = build(RunOptions, given)
    experiment = replace(
        base,
        data=build(Data, given, base.data, "data."),
        model=build(Model, given, base.model, "model."),
        depth=base.depth and build(Depth, given, base.depth, "depth."),
        recipe=build(Recipe, given, base.recipe, "recipe."),
        regularizers=build(Regularizers, given, base.regularizers, "regularizers."),
    )
    if experiment != base:
        experiment = replace(experiment, published=None)  # it is no longer the published experiment
    return with_options(experiment, run), run


def _help_if_asked(kind: type, command: str, words: Sequence[str]) -> None:
    if {"-h", "--help"} & {*words}:
        named = next((EXPERIMENTS[word] for word in words if kind is Train and word in EXPERIMENTS), MISSING)
        names = {"experiment": f"Name of an experiment: {', '.join(EXPERIMENTS)}."}
        # Without an experiment, its settings have no defaults to show.
        known = kind is not Train or named is not MISSING
        print(help_text(kind, f"{PROGRAM} {command}", named, names, prefixed_defaults=known), end="", flush=True)  # noqa: T201
        raise SystemExit(0)


def _see_help(error: UsageError, command: str) -> UsageError:
    return UsageError(f"{error} See {PROGRAM} {command} --help.")


def with_options(experiment: Experiment, options: RunOptions) -> Experiment:
    """The experiment with the requested seed and precision."""
    return replace(
        experiment,
        seed=experiment.seed if options.seed is None else options.seed,
        precision=options.precision or experiment.precision,
    )


def grid(base: Experiment, fields: Sequence[str]) -> list[Experiment]:
    """Every combination of the values of some fields, parsed like those of `train`.

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
        try:
            experiment, _ = changed(base, read(Train, f"{PROGRAM} train", ["--out", ".", *words]))
        except UsageError as error:
            raise _see_help(error, "train") from None
        suffix = "".join(f"-{field.rpartition('.')[2]}-{value}" for field, value in combination)
        experiments.append(replace(experiment, name=f"{base.name}{suffix}", title=f"{base.title}{suffix}"))
    return experiments


def with_seeds(experiments: Sequence[Experiment], run: RunOptions, many: ManyOptions) -> list[Experiment]:
    """All seeds of an experiment, then those of the next."""
    first = run.seed or 0
    seeds = range(first, first + (many.seeds or 1))
    return [with_options(each, replace(run, seed=seed)) for each in experiments for seed in seeds]
