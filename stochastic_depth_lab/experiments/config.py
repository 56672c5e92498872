"""The configuration of a training run: frozen dataclasses of plain values.

The docstring below a field is its help text on the command line. Nothing here imports torch, so `--help` is instant:
strings name schedules, shortcuts and the like.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from stochastic_depth_lab import files

Precision = Literal["fp32", "bf16", "fp16"]
LrSchedule = Literal["step_text", "step_code", "one_cycle"]
OverTime = Literal["constant", "warm_up", "early", "late", "exponential", "plateau"]
Order = Literal["last", "survival", "lesion"]
"""Which blocks to remove first from a trained network, see `stochastic_depth.subnetwork`."""


@dataclass(frozen=True)
class Data:
    """The images and their preprocessing."""

    dataset: str
    """Train on digits, cifar10, cifar100, svhn or imagenet."""
    normalization: Literal["channel", "pixel"] = "channel"
    """Normalize by the mean and standard deviation of each channel (the paper's text), or by the mean image and one
    standard deviation (the authors' code)."""
    translation: int = 0
    """Shift training images by up to N pixels, filled with zeros at the border."""
    flip: bool = False
    """Flip training images horizontally with probability 1/2."""
    num_validation: int | None = None
    """Hold out N training images for validation (default: as in the paper)."""
    split_seed: int = 0
    """Draw the validation images with this seed."""
    images_per_class: int | None = None
    """Train on N images of each class, drawn with the run's seed; digits tests on the others (default: all)."""
    num_test: int | None = None
    """Use only the first N test images (default: all)."""
    limit: int | None = None
    """Use only the first N images of each part (default: all)."""
    image_size: int | None = None
    """Crop and scale imagenet's pictures to N x N pixels (default: 224)."""
    num_workers: int = 8
    """Read imagenet's pictures in N processes, or in the training process if 0; results do not depend on it."""


@dataclass(frozen=True)
class Model:
    """The residual network."""

    num_layers: int
    """Number of layers: 6n + 2 for small images (the paper: 20 to 1202); 18, 34, 50, 101 or 152 for imagenet."""
    family: Literal["cifar", "imagenet"] = "cifar"
    """Use the paper's networks for small images, or torchvision's ResNets for ImageNet."""
    shortcut: Literal["pad", "subsample", "projection", "projection_all"] = "pad"
    """Use as shortcut of blocks that halve the image: average pooling and zero channels (pad, the paper's text), every
    second pixel and zero channels (subsample), or a 1x1 convolution (projection; always for imagenet), or one in every
    block (projection_all)."""
    init: Literal["he", "authors"] = "he"
    """Initialize as He et al., or as the authors' code (BatchNorm gains from U(0, 1))."""
    keep: tuple[int, ...] | None = None
    """Keep only these blocks, by index from 0. With --weights, continue training a subnetwork that `export` wrote as
    safetensors (default: all)."""


@dataclass(frozen=True)
class Depth:
    """Stochastic depth. Without it a network has constant depth."""

    schedule: Literal["linear_decay", "uniform"] = "linear_decay"
    """Let survival fall linearly with depth (the paper), or keep it constant."""
    final_survival_prob: float = 0.5
    """Survival probability of the last block, p_L, in (0, 1]."""
    granularity: Literal["batch", "sample"] = "batch"
    """Draw one gate per mini-batch (the paper), or one per sample."""
    rescale: Literal["eval", "train", "none"] = "eval"
    """Multiply branches by p in evaluation (the paper), by 1/p in training, or neither."""
    skipped_grad: Literal["zero", "none"] = "zero"
    """Give parameters of a dropped branch zero gradients, so that momentum and weight decay still move them (the
    authors' code), or no gradients."""
    draw: Literal["bernoulli", "equal_cost"] = "bernoulli"
    """Draw gates independently (the paper), or so that every step does nearly the same work."""
    over_time: OverTime = "constant"
    """Change the drop rates over the epochs: constant (the paper); warm_up: rise from 0; early: fall to 0; late: 0 at
    first; exponential: rise ever more slowly ("progressive"); plateau: stay, then fall to 0 and recover."""
    turn: float = 0.5
    """End this change (plateau: begin it) after this share of the epochs, in (0, 1)."""


@dataclass(frozen=True)
class Regularizers:
    """Other regularizers, to compare stochastic depth with. None is the paper's method; all are off by default."""

    activation_survival_prob: float = 1.0
    """Use dropout between the convolutions of each branch: an activation survives with this probability, in (0, 1]."""
    filter_survival_prob: float = 1.0
    """Drop whole filters: a channel of a sample survives with this probability, in (0, 1]."""
    filter_penalty: float = 0.0
    """Add the penalty X * sum(W^2) / (sum_i sigma_i(W_i)^2 + X) for every convolution."""


@dataclass(frozen=True)
class Recipe:
    """The training recipe: SGD with Nesterov momentum, weight decay on every parameter."""

    epochs: int
    """Train for N epochs; each ends with an evaluation."""
    epoch_passes: int = 1
    """Pass over the training images N times per epoch. With few images, evaluating after every pass would take longer
    than training."""
    batch_size: int = 128
    """Images per step, over all processes together. The last batch of an epoch may be smaller."""
    learning_rate: float = 0.1
    """Highest learning rate."""
    lr_schedule: LrSchedule = "step_text"
    """step_text: divide by 10 after each of --recipe.lr-drops, as the paper says; step_code: one epoch earlier, as the
    authors' code does; one_cycle: rise along a cosine for the first 30 % of the steps, then fall to zero."""
    lr_drops: tuple[float, ...] = (0.5, 0.75)
    """Drop the rate after these shares of the epochs: 0.5 and 0.75 are the paper's 250 and 375 of 500."""
    warmup_epochs: int = 0
    """Train the first N epochs at --recipe.warmup-learning-rate. The paper's 1202 layers need 10."""
    warmup_learning_rate: float = 0.01
    """Learning rate of the warm-up epochs."""
    momentum: float = 0.9
    """Nesterov momentum, without dampening."""
    weight_decay: float = 1e-4
    """Weight decay on every parameter, BatchNorm and biases included."""
    validate_every: int | None = None
    """Also validate every N steps, counted over all epochs (default: at the end of each epoch only)."""
    num_threads: int | None = None
    """Use N CPU threads; the number affects the last bits of sums (default: PyTorch's choice)."""
    batch_norm: Literal["local", "synchronized"] = "local"
    """With several processes: normalize each part of a batch by itself and keep the running statistics of rank 0, or
    normalize by the whole batch (GPUs only)."""
    checkpoint_every: int = 200
    """Write a checkpoint every N steps, and at the end of each epoch."""


@dataclass(frozen=True)
class Published:
    """A published result to compare with."""

    test_error: float
    """In percent."""
    source: str
    """The publication."""
    train_h: float | None = None
    """Published hours of training, on one Titan X."""


@dataclass(frozen=True)
class Experiment:
    """One named run: everything that determines its numbers, except the machine."""

    name: str
    """Its name on the command line."""
    title: str
    """Its title in reports."""
    data: Data
    model: Model
    depth: Depth | None
    """None: constant depth."""
    recipe: Recipe
    precision: Precision = "fp32"
    """fp32, or mixed precision with bf16 or fp16."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, their augmentation and the gates."""
    initial_weights: str | None = None
    """SHA-256 of the file with the initial weights. None: random weights."""
    regularizers: Regularizers = Regularizers()
    published: Published | None = None


@dataclass(frozen=True)
class Comparison:
    """Two experiments, of which the first is claimed to have less of something, seed by seed."""

    less: str
    """Name of the experiment that has less."""
    more: str
    """Name of the experiment that has more."""
    measure: Literal["test_error", "train_loss", "process_s", "late_gradient"] = "test_error"
    """Test error; training loss of the last epoch; process time of training; gradient of the first convolution after
    the first drop of the learning rate."""


@dataclass(frozen=True)
class Claim:
    """A sentence that experiments confirm or contradict with all of its comparisons together."""

    text: str
    """The sentence, which starts with its source."""
    comparisons: tuple[Comparison, ...]
    """What it says about the runs. Comparisons of the other scale are ignored."""


FigureName = Literal["gap", "curves", "gradient", "survival_curve", "heat_map", "depth_curve", "rates", "crossing"]


@dataclass(frozen=True)
class Study:
    """A table or a figure: the runs behind it, and how to show them. `reproduce NAME` makes it."""

    name: str
    """Its name on the command line."""
    title: str
    """The title of its page."""
    claim: str
    """What the paper says, or the question, in a sentence or two."""
    experiments: tuple[Experiment, ...]
    """The runs, in the order of the table's rows."""
    small_experiments: tuple[Experiment, ...]
    """What `--scale small` trains instead: the same question with few images."""
    figures: tuple[FigureName, ...] = ()
    """Figures beside the table."""
    claims: tuple[Claim, ...] = ()
    """Claims that the runs are tested against."""
    seeds: int = 1
    """Number of seeds per experiment, unless --seeds overrides it."""
    first_seed: int = 0
    """First seed. Tuning uses seeds that are not reported."""
    jobs: int = 1
    """Number of concurrent runs, unless --jobs overrides it."""
    baselines: bool = False
    """Whether to train nearest neighbor and SVM on the same images, for comparison."""


def as_json(experiment: Experiment) -> dict[str, Any]:
    """The experiment as `config.json` holds it."""
    return cast("dict[str, Any]", json.loads(json.dumps(asdict(experiment))))


def from_json(fields: Mapping[str, Any]) -> Experiment:
    """The experiment that a `config.json` holds.

    Raises:
        ValueError: if a field is missing, unknown or of the wrong type.
    """
    try:
        return files.from_json(Experiment, json.dumps(fields), extra="forbid")
    except ValueError as error:
        raise ValueError(f"this is not the configuration of an experiment of this version: {error}.") from None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which two experiments differ: `"recipe.epochs: 5, not 500"`.

    Names, titles and published results are ignored: they do not affect a run.

    Args:
        ours: the requested experiment, from `as_json`.
        theirs: the one found. Fields that an older version did not write have their defaults.

    Raises:
        ValueError: if the one found is not an experiment.
    """
    left, right = (
        {name: value for name, value in fields.items() if name not in ("name", "title", "published")}
        for fields in (ours, as_json(from_json(theirs)))
    )
    return list(_differences(left, right))


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, left in ours.items():
        right = theirs[name]
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(cast("dict[str, Any]", left), cast("dict[str, Any]", right), f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}: {_brief(right)}, not {_brief(left)}"


def _brief(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(map(str, cast("dict[str, object]", value).values()))
    return "none" if value is None else str(value)
