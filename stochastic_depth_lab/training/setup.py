"""From an experiment's settings to its objects: images on the device, network, gates, optimizer, PyTorch's settings."""

import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab import data
from stochastic_depth_lab.data import Augmentation, ImageData, Normalization, import_torchvision
from stochastic_depth_lab.experiments.config import Experiment, Precision, Recipe
from stochastic_depth_lab.runs import checkpoint
from stochastic_depth_lab.training.regularizers import add_dropout_
from stochastic_depth_lab.training.schedules import mean_survival_probs, survival_probs


@dataclass(frozen=True)
class Images:
    """The images of an experiment on its device, their normalization and their augmentation."""

    data: ImageData
    normalization: Normalization
    augmentation: Augmentation | None


@dataclass(frozen=True)
class BranchTable:
    """The residual branches of a network and their schedule: `branches.json` of a run."""

    names: list[str]
    survival_probs: list[float]
    """Means over the epochs, if they change over time. So are the expectations below."""
    expected_depth: float
    expected_cost: float
    """Expected share of the training FLOPs of constant depth."""
    expected_time: float
    """Expected share of the time of constant depth if closed branches took none, measured where the run began."""


_MOST_TIMED = 64
"""Number of images for measuring the expected time: no more memory than training needs, and a few seconds."""


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Compute the network in this precision. Weights, sums and losses stay float32."""
    return torch.autocast(device.type, dtype=_AUTOCAST.get(precision), enabled=precision in _AUTOCAST)


@dataclass(frozen=True)
class Setup:
    """Everything that an experiment trains with."""

    experiment: Experiment
    images: Images
    model: nn.Module
    depth: sd.Controller | None
    """None: constant depth."""
    cost: sd.Cost | None
    """Cost of the branches. None: constant depth."""
    branches: BranchTable


def prepare(
    experiment: Experiment,
    device: torch.device,
    *,
    data_root: Path | None = None,
    data: ImageData | None = None,
    weights: Path | None = None,
    cuda_graphs: bool = False,
) -> Setup:
    """Load an experiment's images and build its network. See `training.loop.train` for the arguments.

    Raises:
        ValueError: in one line, if something is missing or does not fit together.
    """
    images = load_images(experiment, device, data_root, data)
    model, depth = build_network(experiment, images.data)
    if weights is not None:
        load_weights(model, checkpoint.read(weights), str(weights))
    few = images.data.train.first(min(_MOST_TIMED, experiment.recipe.batch_size)).images
    with autocast(device, experiment.precision):
        branches, cost = describe_branches(experiment, model, depth, images.normalization(few))
    if depth is not None:
        depth.set_costs(cost)  # draw="equal_cost" needs them
    if cuda_graphs:
        capture_branches(experiment, model, depth)
    return Setup(experiment, images, model, depth, cost, branches)


def load_images(
    experiment: Experiment, device: torch.device, data_root: Path | None = None, given: ImageData | None = None
) -> Images:
    """The experiment's images on a device, with the normalization of their training part.

    Args:
        experiment: the experiment.
        device: where to put them.
        data_root: folder of the data sets.
        given: images to use instead of the experiment's.

    Raises:
        DataError: if they are missing or damaged.
    """
    settings = experiment.data
    images = given or data.load(
        settings.dataset,
        data_root=data_root,
        validation=settings.num_validation,
        split_seed=settings.split_seed,
        image_size=settings.image_size,
        num_workers=settings.num_workers,
    )
    if settings.images_per_class is not None:
        images = images.few(settings.images_per_class, experiment.seed)
    if settings.num_test is not None:
        images = replace(images, test=images.test.first(settings.num_test))
    if settings.limit is not None:
        images = images.limited(settings.limit)
    images = images.to(device)
    _, height, width = images.train.image_shape
    if settings.translation >= min(height, width):
        raise ValueError(
            f"data.translation must be smaller than the images, {height}x{width} pixels, but is {settings.translation}."
        )
    augmentation = None
    if settings.translation or settings.flip:
        augmentation = Augmentation(translation=settings.translation, flip=settings.flip)
    normalization = images.normalization or Normalization.fit(images.train.images, settings.normalization)
    return Images(images, normalization, augmentation)


def build_network(experiment: Experiment, images: ImageData) -> tuple[nn.Module, sd.Controller | None]:
    """The network on the images' device, and its controller; None at constant depth.

    The same seed gives the same weights with and without gates.

    Raises:
        ValueError: if its depth, a block to keep or a survival probability is not allowed.
    """
    torch.manual_seed(experiment.seed)
    settings, depth = experiment.model, experiment.depth
    if settings.family == "imagenet":
        create = getattr(import_torchvision("torchvision.models"), f"resnet{settings.num_layers}")
        model = cast(nn.Module, create(num_classes=images.num_classes))
    else:
        model = sd.models.cifar_resnet(
            settings.num_layers,
            images.num_classes,
            shortcut=settings.shortcut,
            init=settings.init,
            in_channels=images.train.image_shape[0],
        )
    if settings.keep is not None:
        with warnings.catch_warnings():  # it has not been trained at all yet
            warnings.filterwarnings("ignore", message=".*was not trained with stochastic depth")
            model = sd.subnetwork(model, settings.keep)
    # Convolutions pass on the layout of their weights; channels last halves the time of a step on CPUs.
    # PyTorch's annotations lack the argument.
    model = model.to(images.train.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    add_dropout_(model, experiment.regularizers)
    if depth is None:
        return model, None
    return model, sd.make_stochastic_(
        model,
        sd.SCHEDULES[depth.schedule](depth.final_survival_prob),
        granularity=depth.granularity,
        rescale=depth.rescale,
        skipped_grad=depth.skipped_grad,
        draw=depth.draw,
        seed=experiment.seed,
    )


def load_weights(model: nn.Module, weights: Mapping[str, object], where: str) -> None:
    """Load a `state_dict` of a plain or a stochastic network.

    Args:
        model: the network.
        weights: names and tensors.
        where: start of the error message.

    Raises:
        ValueError: if names or shapes differ. The network is unchanged then.
    """
    own = model.state_dict()
    if wrong := [name for name in {**own, **weights} if _shape(own.get(name)) != _shape(weights.get(name))]:
        first = f"{wrong[0]} is {_shape(weights.get(wrong[0]))} there, {_shape(own.get(wrong[0]))} here"
        raise ValueError(
            f"{where}: {len(wrong)} of its names or shapes are not those of the network, such as {first}. "
            "The file must hold a state_dict of the experiment's network."
        )
    model.load_state_dict(cast("Mapping[str, Tensor]", weights))


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "absent"


def branch_names(model: nn.Module, depth: sd.Controller | None) -> list[str]:
    """Names of the residual branches of a network, with stochastic or constant depth."""
    if depth is not None:
        return depth.names
    names = sd.make_stochastic_(model, sd.uniform(1.0)).names
    sd.restore_(model)
    return names


def describe_branches(
    experiment: Experiment, model: nn.Module, depth: sd.Controller | None, inputs: Tensor
) -> tuple[BranchTable, sd.Cost | None]:
    """The branches, and what they cost, counted; None at constant depth.

    Where survival changes over time, probabilities and expectations are means over the epochs.

    Args:
        experiment: what runs.
        model: its network.
        depth: the network's controller.
        inputs: images that the time of a step is measured with.
    """
    if depth is None or experiment.depth is None:
        names = branch_names(model, depth)
        return BranchTable(names, [1.0] * len(names), float(len(names)), 1.0, 1.0), None
    # Times are not part of the cost for `draw="equal_cost"`: with them, a repeated run would draw other gates.
    cost = depth.cost(inputs[:2])
    probs = mean_survival_probs(depth.survival_probs, experiment.depth, experiment.recipe.epochs)
    time_share = depth.cost(inputs, measure=True).share_of_time(probs)
    assert time_share is not None
    return BranchTable(depth.names, probs, sd.expected_depth(probs), cost.share(probs), time_share), cost


def set_epoch(experiment: Experiment, depth: sd.Controller | None, epoch: int) -> None:
    """Set the survival probabilities of an epoch, from 1, if they change over time."""
    if depth is None or experiment.depth is None or experiment.depth.over_time == "constant":
        return
    over_depth = sd.SCHEDULES[experiment.depth.schedule](experiment.depth.final_survival_prob)(len(depth.names))
    depth.set_survival_probs(survival_probs(over_depth, experiment.depth, epoch, experiment.recipe.epochs))


def capture_branches(experiment: Experiment, model: nn.Module, depth: sd.Controller | None) -> None:
    """Replay the branches as CUDA graphs; at constant depth, all branches in every step.

    Raises:
        ValueError: if there is no GPU, or a branch does something that a graph cannot repeat exactly.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU, but the device is {device.type}.")
    if experiment.recipe.batch_norm == "synchronized":
        raise ValueError("--cuda-graphs cannot be used with recipe.batch_norm synchronized, which waits for others.")
    (depth or sd.make_stochastic_(model, sd.uniform(1.0))).capture()


def build_optimizer(model: nn.Module, experiment: Experiment) -> torch.optim.SGD:
    """SGD with Nesterov momentum and decay on every parameter, BatchNorm and biases included (Huang et al. 2016)."""
    recipe = experiment.recipe
    some_without_gradients = experiment.depth is not None and experiment.depth.skipped_grad == "none"
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        dampening=0,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        # One kernel for all parameters. It raises if some have not had a gradient yet.
        fused=not some_without_gradients,
    )


@contextmanager
def reproducible(recipe: Recipe) -> Generator[None]:
    """Use deterministic algorithms, and raise where an operation has none."""
    # cuBLAS reads this when it starts; without it PyTorch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    enabled, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    num_threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # for debugging only, and it costs a pass over every buffer
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        settings.fill_uninitialized_memory = fill
        torch.set_num_threads(num_threads)


def find_device(name: str | None, precision: Precision = "fp32", local_rank: int | None = None) -> torch.device:
    """The device of that name; by default the GPU, or the CPU if there is none.

    Args:
        name: cpu, cuda, cuda:NUMBER, mps or None.
        precision: of the computation.
        local_rank: rank of this process on its machine: it uses the GPU of that number, unless one is named.

    Raises:
        ValueError: if there is no such device, or it does not support the precision.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (index.isdecimal() or name == kind):
        raise ValueError(f"--device must be cpu, cuda, cuda:N or mps, but is {name!r}.")
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"There is no device {name!r}: this PyTorch has no Metal (MPS).")
        return torch.device("mps")
    if local_rank is not None and not index:
        name, index = f"cuda:{local_rank}", str(local_rank)
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"There is no device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    device = torch.device("cuda", int(index or 0))
    if precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"{torch.cuda.get_device_name(device)} does not support bf16: use --precision fp16.")
    return device
