"""What a training run is made of: frozen dataclasses of plain values.

The docstring below a field is its help text on the command line. Nothing here imports torch, so that `--help` is
instant: schedules, shortcuts and the like are named by strings.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

Precision = Literal["fp32", "bf16", "fp16"]
LrSchedule = Literal["step_text", "step_code", "one_cycle"]
OverTime = Literal["constant", "warm_up", "early", "late", "exponential", "plateau"]


@dataclass(frozen=True)
class Data:
    """The images and what happens to them before the network sees them."""

    dataset: str
    """digits, cifar10, cifar100, svhn or imagenet. Images that a program passes to `loop.train` can have any name."""
    normalisation: Literal["channel", "pixel"] = "channel"
    """Mean and standard deviation per channel (the paper's text), or the mean image and one standard deviation (the
    authors' code)."""
    translation: int = 0
    """Shift training images by up to N pixels, filled with zeros at the border."""
    flip: bool = False
    """Flip training images horizontally with probability 1/2."""
    num_validation: int | None = None
    """Number of training images held out for validation; none: as many as in the paper."""
    split_seed: int = 0
    """Seed that picks the images held out for validation."""
    images_per_class: int | None = None
    """Number of training images of each class, drawn by the run's seed; none: all. digits tests on all others, as it
    has no published test images."""
    num_test: int | None = None
    """Use only the first N test images; none: all."""
    limit: int | None = None
    """Use only the first N images of each part; none: all."""
    image_size: int | None = None
    """Width and height that imagenet's pictures are cropped and scaled to; none: 224."""
    num_workers: int = 8
    """Number of processes that read imagenet's pictures; 0: the training process reads them itself. Results do not
    depend on it."""


@dataclass(frozen=True)
class Model:
    """The residual network."""

    num_layers: int
    """Number of layers: 6n + 2 for small images (the paper: 20 to 1202), or 18, 34, 50, 101, 152 for imagenet."""
    family: Literal["cifar", "imagenet"] = "cifar"
    """The paper's networks for small images, or He et al.'s for ImageNet, as torchvision has them."""
    shortcut: Literal["pad", "subsample", "projection", "projection_all"] = "pad"
    """Shortcut of blocks that halve the image: average pooling and zero channels (the paper's text), every second pixel
    and zero channels, or a 1x1 convolution, there (imagenet: always) or in every block."""
    init: Literal["he", "authors"] = "he"
    """Initial weights: He et al.'s, or those of the authors' code (BatchNorm gains from U(0, 1))."""
    keep: tuple[int, ...] | None = None
    """Keep only these blocks, by their index from 0, and replace the others by their shortcuts; none: all. With
    --weights, continue training a sub-network that `export` wrote as safetensors."""


@dataclass(frozen=True)
class Depth:
    """Stochastic depth. Without it a network has constant depth."""

    schedule: Literal["linear_decay", "uniform"] = "linear_decay"
    """How survival falls with depth."""
    final_survival_prob: float = 0.5
    """Survival probability of the last block, p_L, in (0, 1]."""
    granularity: Literal["batch", "sample"] = "batch"
    """One gate per mini-batch (the paper), or one per sample."""
    rescale: Literal["eval", "train", "none"] = "eval"
    """Multiply branches by p in evaluation (the paper), by 1/p in training, or neither."""
    skipped_grad: Literal["zero", "none"] = "zero"
    """Give parameters of a dropped branch zero gradients, so that momentum and weight decay still move them (the
    authors' code), or no gradients."""
    draw: Literal["bernoulli", "equal_cost"] = "bernoulli"
    """Draw gates independently (the paper), or so that every step does nearly the same work."""
    over_time: OverTime = "constant"
    """How drop rates change over the epochs: constant (the paper); warm_up: rise from 0; early: fall to 0; late: 0 at
    first; exponential: approach their values ever more slowly ("progressive"); plateau: stay, then fall to 0 and
    recover."""
    turn: float = 0.5
    """Share of the epochs, in (0, 1), after which that change ends, or with plateau begins."""


@dataclass(frozen=True)
class Regularisers:
    """What stochastic depth is compared with; none of it is the paper's method, and all of it is off by default."""

    activation_survival_prob: float = 1.0
    """Dropout between the convolutions of each branch: probability that an activation survives, in (0, 1]."""
    filter_survival_prob: float = 1.0
    """The same for whole filters: probability that a channel of a sample survives, in (0, 1]."""
    filter_penalty: float = 0.0
    """lambda of the penalty lambda * sum(W^2) / (sum_i sigma_i(W_i)^2 + lambda) on every convolution; 0: none."""


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: SGD with Nesterov momentum, weight decay on every parameter."""

    epochs: int
    """Number of epochs; each ends with an evaluation."""
    epoch_passes: int = 1
    """Number of passes over the training images per epoch. With few images, evaluation after every pass would take
    longer than training."""
    batch_size: int = 128
    """Images per step, over all processes together. The last batch of an epoch may be smaller."""
    learning_rate: float = 0.1
    """Highest learning rate."""
    lr_schedule: LrSchedule = "step_text"
    """step_text: divide by 10 after each of --recipe.lr-drops, as the paper says; step_code: one epoch earlier, as the
    authors' code does; one_cycle: rise along a cosine for the first 30 % of the steps, then fall to zero."""
    lr_drops: tuple[float, ...] = (0.5, 0.75)
    """When a step schedule drops the rate, in shares of the epochs: 0.5 and 0.75 are the paper's 250 and 375 of 500."""
    warmup_epochs: int = 0
    """Train the first N epochs at --recipe.warmup-learning-rate. The paper's 1202 layers need 10."""
    warmup_learning_rate: float = 0.01
    """Learning rate of the warm-up epochs."""
    momentum: float = 0.9
    """Nesterov momentum, without dampening."""
    weight_decay: float = 1e-4
    """Weight decay on every parameter, BatchNorm and biases included."""
    validate_every: int | None = None
    """Validate every N steps too, counted over all epochs (SVHN: 200); none: at the end of each epoch only."""
    num_threads: int | None = None
    """Number of CPU threads, which decides the order of sums and with it the last bits; none: PyTorch's choice."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """With several processes: normalise each part of a batch by itself and keep the first process's running statistics,
    or normalise by the whole batch (GPUs only)."""
    checkpoint_every: int = 200
    """Write a checkpoint every N steps, and at the end of each epoch."""


@dataclass(frozen=True)
class Published:
    """A published result to compare with."""

    test_error: float
    """In percent."""
    source: str
    """Where it stands."""
    train_h: float | None = None
    """Hours of training that were published with it, on one Titan X."""


@dataclass(frozen=True)
class Experiment:
    """One named run: everything that decides its numbers, apart from the machine."""

    name: str
    """What the command line calls it."""
    title: str
    """What a report calls it."""
    data: Data
    model: Model
    depth: Depth | None
    """None: constant depth."""
    recipe: Recipe
    precision: Precision = "fp32"
    """fp32, or mixed precision with bf16 or fp16."""
    seed: int = 0
    """Of the initial weights, the order of the images, their augmentation and the gates."""
    initial_weights: str | None = None
    """SHA-256 of the file of weights that the network begins with. None: drawn at random."""
    regularisers: Regularisers = Regularisers()
    published: Published | None = None


@dataclass(frozen=True)
class Comparison:
    """Two experiments, the first of which is claimed to have less of something, seed by seed."""

    less: str
    """Name of the one."""
    more: str
    """Name of the other."""
    measure: Literal["test_error", "train_loss", "process_s", "late_gradient"] = "test_error"
    """Of what: test error; training loss of the last epoch; process time of training; gradient of the first
    convolution after the rate's first drop."""


@dataclass(frozen=True)
class Claim:
    """A sentence that experiments can confirm or contradict: all of its comparisons together."""

    text: str
    """The sentence; who says so first."""
    comparisons: tuple[Comparison, ...]
    """What it says of the runs. Those of the other scale are passed over."""


FigureName = Literal["gap", "curves", "gradient", "survival_curve", "heat_map", "depth_curve", "rates", "crossing"]


@dataclass(frozen=True)
class Study:
    """A table or a figure: the runs behind it, and how they are shown. `reproduce NAME` makes it."""

    name: str
    """What the command line calls it."""
    title: str
    """What its page calls it."""
    claim: str
    """What the paper says, or what is asked, in a sentence or two."""
    experiments: tuple[Experiment, ...]
    """The runs, in the order of the table's rows."""
    small_experiments: tuple[Experiment, ...]
    """What `--scale small` trains in their place: the same question, asked of few images."""
    figures: tuple[FigureName, ...] = ()
    """What is drawn beside the table."""
    claims: tuple[Claim, ...] = ()
    """What the paper says, for a verdict from the data."""
    seeds: int = 1
    """Runs of each experiment, unless --seeds says otherwise."""
    first_seed: int = 0
    """Tuning takes other seeds than those that are reported."""
    jobs: int = 1
    """Concurrent runs, unless --jobs says otherwise."""
    yardsticks: bool = False
    """Whether nearest neighbor and SVM learn from the same images, for comparison."""


def quick(experiment: Experiment) -> Experiment:
    """The same network and recipe on few images for five epochs: shows that everything works, not what it gives.

    Deeper networks get fewer images, so that an epoch takes a second or two on two cores at any depth. Smaller batches
    get a lower rate in proportion (Goyal et al. 2017): 1202 layers overflow at a rate of 0.1 on a few images.
    """
    recipe = experiment.recipe
    limit = max(8, (32_000 if experiment.data.dataset == "digits" else 1000) // experiment.model.num_layers)
    # At least two batches, the last of which may be shorter.
    batch_size = min(recipe.batch_size, limit // 2 + 1)
    recipe = replace(
        recipe,
        epochs=5,
        epoch_passes=1,
        batch_size=batch_size,
        learning_rate=recipe.learning_rate * batch_size / recipe.batch_size,
        warmup_learning_rate=recipe.warmup_learning_rate * batch_size / recipe.batch_size,
        warmup_epochs=min(recipe.warmup_epochs, 1),
        validate_every=recipe.validate_every and 3,
    )
    data = replace(_small_pictures(experiment.data, num_workers=0), limit=limit)
    if data.images_per_class is not None:
        data = replace(data, images_per_class=min(data.images_per_class, 2), num_validation=None)
    return replace(experiment, data=data, recipe=recipe, published=None)


def _small_pictures(data: Data, *, num_workers: int) -> Data:
    """ImageNet's pictures at 64 pixels, a twelfth of the work; other data as they are."""
    return replace(data, image_size=64, num_workers=num_workers) if data.dataset == "imagenet" else data


def small(experiment: Experiment) -> Experiment:
    """Its form on few images without augmentation, for a CPU: 1,000 images, 3,000 steps of 50, one-cycle rate.

    32 layers, 110 for 1202; digits as they are. ImageNet's pictures at 64 pixels, 5,000 of each part, 12 epochs of 18
    layers: shows that its recipe works.
    """
    recipe, model, data = experiment.recipe, experiment.model, experiment.data
    if data.images_per_class is not None:
        return experiment
    if model.family == "imagenet":
        num_layers = 18
        data = replace(_small_pictures(data, num_workers=1), limit=5000, num_validation=990)
        recipe = replace(recipe, epochs=12, num_threads=1)
    else:
        num_layers = 110 if model.num_layers == 1202 else 32
        data = replace(
            data,
            translation=0,
            flip=False,
            images_per_class=10 if data.dataset == "cifar100" else 100,
            num_validation=990 if data.dataset == "svhn" else 1000,  # SVHN wants a multiple of 30
            num_test=5000,
        )
        recipe = Recipe(
            epochs=10,
            epoch_passes=15,
            batch_size=50,
            learning_rate=recipe.learning_rate,
            lr_schedule="one_cycle",
            num_threads=1,
        )
    return replace(
        experiment,
        name=f"small-{experiment.name}",
        title=experiment.title.replace(f"{model.num_layers} layers", f"{num_layers} layers"),
        data=data,
        model=replace(model, num_layers=num_layers),
        recipe=recipe,
        published=None,
    )


def check(experiment: Experiment) -> None:
    """Refuse numbers that cannot be trained with.

    What the library and the data sets check themselves (6n + 2) is left to them.

    Raises:
        ValueError: in one line; it names the field.
    """
    data, recipe = experiment.data, experiment.recipe
    if experiment.name in ("", ".", "..") or any(letter in "/\\" or ord(letter) < 32 for letter in experiment.name):
        raise ValueError(
            f"the name of a run must be a plain file name, but is {experiment.name!r}: its folder is called so."
        )
    for name, value, least in (
        ("recipe.epochs", recipe.epochs, 1),
        ("recipe.epoch_passes", recipe.epoch_passes, 1),
        ("recipe.batch_size", recipe.batch_size, 1),
        ("recipe.warmup_epochs", recipe.warmup_epochs, 0),
        ("recipe.validate_every", recipe.validate_every, 1),
        ("recipe.num_threads", recipe.num_threads, 1),
        ("recipe.checkpoint_every", recipe.checkpoint_every, 1),
        ("data.images_per_class", data.images_per_class, 1),
        ("data.num_test", data.num_test, 1),
        ("data.limit", data.limit, 1),
        ("data.num_validation", data.num_validation, 1),
        ("data.image_size", data.image_size, 32),
        ("data.num_workers", data.num_workers, 0),
        ("data.translation", data.translation, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but is {value}.")
    if not 0 <= experiment.seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, but is {experiment.seed}.")
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(
            f"recipe.warmup_epochs must be less than recipe.epochs, {recipe.epochs}, but is {recipe.warmup_epochs}."
        )
    _check_family(experiment)
    for name, rate in (
        ("recipe.learning_rate", recipe.learning_rate),
        ("recipe.warmup_learning_rate", recipe.warmup_learning_rate),
    ):
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name} must be a positive number, but is {rate}.")
    if not 0 < recipe.momentum < 1:
        raise ValueError(f"recipe.momentum must be in (0, 1), but is {recipe.momentum}: Nesterov's needs one.")
    if not 0 <= recipe.weight_decay < float("inf"):
        raise ValueError(f"recipe.weight_decay must be 0 or a positive number, but is {recipe.weight_decay}.")
    final = 1.0 if experiment.depth is None else experiment.depth.final_survival_prob
    for name, survival_prob in (
        ("depth.final_survival_prob", final),
        ("regularisers.activation_survival_prob", experiment.regularisers.activation_survival_prob),
        ("regularisers.filter_survival_prob", experiment.regularisers.filter_survival_prob),
    ):
        if not 0 < survival_prob <= 1:
            raise ValueError(
                f"{name} must be in (0, 1], but is {survival_prob}. It is the chance to survive: a drop rate of 0.2 is "
                "a survival probability of 0.8."
            )
    if not 0 <= experiment.regularisers.filter_penalty < float("inf"):
        raise ValueError(
            f"regularisers.filter_penalty must be 0 or positive, but is {experiment.regularisers.filter_penalty}."
        )
    if experiment.depth is not None and not 0 < experiment.depth.turn < 1:
        raise ValueError(f"depth.turn must be a share of the epochs in (0, 1), but is {experiment.depth.turn}.")
    if not all(0 < share < 1 for share in recipe.lr_drops):
        raise ValueError(
            f"recipe.lr_drops must be shares of the epochs in (0, 1), but are {recipe.lr_drops}: "
            "250 of 500 epochs is 0.5."
        )
    if any(later <= earlier for earlier, later in zip(recipe.lr_drops, recipe.lr_drops[1:], strict=False)):
        raise ValueError(f"recipe.lr_drops must increase, but are {' '.join(map(str, recipe.lr_drops))}.")


def _check_family(experiment: Experiment) -> None:
    """Refuse what ImageNet's pictures and networks do not have, or have alone."""
    data, model = experiment.data, experiment.model
    if data.dataset == "imagenet" and data.normalisation != "channel":
        raise ValueError("data.normalisation must be channel for imagenet: its pictures are not read for a mean image.")
    if data.dataset == "imagenet" and (data.images_per_class, data.num_test) != (None, None):
        raise ValueError("data.images_per_class and data.num_test are for images in memory, not for imagenet.")
    if data.dataset in ("digits", "cifar10", "cifar100", "svhn") and data.image_size is not None:
        raise ValueError(f"data.image_size is for imagenet: images of {data.dataset} have a size of their own.")
    if model.family == "cifar":
        return
    if model.num_layers not in (18, 34, 50, 101, 152):
        raise ValueError(f"model.num_layers must be 18, 34, 50, 101 or 152 for imagenet, but is {model.num_layers}.")
    if (model.shortcut, model.init) != ("projection", "he"):
        raise ValueError(
            f"model.shortcut and model.init must be projection and he for imagenet, as torchvision has them, but are "
            f"{model.shortcut} and {model.init}."
        )
    if experiment.regularisers.activation_survival_prob != 1 or experiment.regularisers.filter_survival_prob != 1:
        raise ValueError("dropout and dropped filters know the paper's networks for small images only.")


def from_json(fields: Mapping[str, Any]) -> Experiment:
    """The experiment that a `config.json` holds.

    Raises:
        ValueError: if a field is missing or unknown, or its value is not of the field's type.
    """
    return _of_type(Experiment, fields, "it")


def _of_type(kind: Any, value: Any, where: str) -> Any:
    """A value from JSON as an annotation of this file says; lists become tuples, objects dataclasses."""
    arguments = get_args(kind)
    if is_dataclass(kind) and isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        kinds = get_type_hints(kind)
        if unknown := [name for name in fields if name not in kinds]:
            raise _not_ours(f"{where} has an unknown field {unknown[0][:40]!r}")
        optional = {field.name for field in dataclass_fields(kind) if field.default is not MISSING}
        if missing := [name for name in kinds if name not in fields and name not in optional]:
            raise _not_ours(f"{where} has no field {missing[0]!r}")
        return cast(Any, kind)(**{name: _of_type(kinds[name], inner, name) for name, inner in fields.items()})
    if get_origin(kind) is Literal:
        right = isinstance(value, str) and value in arguments
    elif get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(_of_type(arguments[0], item, where) for item in cast("list[Any]", value))
        right = False
    elif NoneType in arguments:
        return None if value is None else _of_type(arguments[0], value, where)
    elif kind is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        right = type(value) is kind
    if not right:
        raise _not_ours(f"{where} cannot be {str(value)[:40]!r}")
    return value


def _not_ours(reason: str) -> ValueError:
    return ValueError(f"this is not the configuration of an experiment of this version: {reason}.")


def as_json(experiment: Experiment) -> dict[str, Any]:
    """The experiment as `config.json` holds it."""
    return cast("dict[str, Any]", json.loads(json.dumps(asdict(experiment))))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which two experiments differ: `"recipe.epochs: 5, not 500"`.

    Names and titles are left out: they decide nothing.

    Args:
        ours: the experiment asked for, as `as_json` gives it.
        theirs: the one found. Where an older version wrote it, fields that it did not know have their defaults.

    Raises:
        ValueError: if what was found is no experiment.
    """
    left, right = (
        {name: value for name, value in fields.items() if name not in ("name", "title", "published")}
        for fields in (ours, as_json(from_json(theirs)))
    )
    return list(_differences(left, right))


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, left in ours.items():
        right = theirs[name]
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            inner = cast("Mapping[str, Any]", left), cast("Mapping[str, Any]", right)
            yield from _differences(*inner, prefix=f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}: {_brief(right)}, not {_brief(left)}"


def _brief(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(map(str, cast("Mapping[str, Any]", value).values()))
    return "none" if value is None else str(value)
