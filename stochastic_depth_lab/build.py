"""From an experiment's words to its objects: images on the device, network, gates, optimiser, settings of PyTorch."""

import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.cost import Cost
from stochastic_depth_lab import data
from stochastic_depth_lab.config import Experiment, Model, Precision, Recipe
from stochastic_depth_lab.data import Augmentation, ImageData, Normalisation, import_torchvision
from stochastic_depth_lab.regularisers import add_dropout_
from stochastic_depth_lab.survival_schedules import mean_survival_probs, survival_probs


@dataclass(frozen=True)
class Images:
    """The images of an experiment on its device, and what happens to them on the way to the network."""

    data: ImageData
    normalisation: Normalisation
    augmentation: Augmentation | None


@dataclass(frozen=True)
class Branches:
    """The residual branches of a network and what a schedule makes of them; `branches.json` of a run."""

    names: list[str]
    survival_probs: list[float]
    expected_depth: float
    expected_cost: float
    """Expected share of the training FLOPs of constant depth."""
    expected_time: float
    """Expected share of the time of constant depth if closed branches took none, measured where the run began."""


def load_images(
    experiment: Experiment, device: torch.device, data_root: Path | None = None, given: ImageData | None = None
) -> Images:
    """The experiment's images, normalised by what its training part shows.

    Args:
        experiment: says which, how many, and what happens to them.
        device: where they are to be.
        data_root: where the data lie.
        given: images in place of those that the experiment names.

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
    images = (images if settings.limit is None else images.limited(settings.limit)).to(device)
    augmentation = None
    if settings.translation >= min(images.train.image_shape[1:]):
        height, width = images.train.image_shape[1:]
        raise ValueError(
            f"data.translation must be smaller than the images, {height}x{width} pixels, but is {settings.translation}."
        )
    if settings.translation or settings.flip:
        augmentation = Augmentation(translation=settings.translation, flip=settings.flip)
    normalisation = images.normalisation or Normalisation.fit(images.train.images, settings.normalisation)
    return Images(images, normalisation, augmentation)


def build_network(experiment: Experiment, images: ImageData) -> tuple[nn.Module, sd.Controller | None]:
    """The network on the images' device, with gates unless it has constant depth.

    The same seed gives the same weights with and without gates.

    Raises:
        ValueError: if its depth, a block to keep or a survival probability is not allowed.
    """
    torch.manual_seed(experiment.seed)
    model = _plain_network(experiment.model, images)
    if experiment.model.keep is not None:
        model = _without_the_other_blocks(model, experiment.model.keep)
    # Convolutions pass the layout of their weights on; channels last halves the time of a step on CPUs.
    # PyTorch's annotations lack the argument.
    model = model.to(images.train.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    add_dropout_(model, experiment.regularisers)
    settings = experiment.depth
    if settings is None:
        return model, None
    depth = sd.make_stochastic_(
        model,
        sd.SCHEDULES[settings.schedule](settings.final_survival_prob),
        granularity=settings.granularity,
        rescale=settings.rescale,
        skipped_grad=settings.skipped_grad,
        draw=settings.draw,
        seed=experiment.seed,
    )
    return model, depth


def _plain_network(settings: Model, images: ImageData) -> nn.Module:
    if settings.family == "imagenet":
        models = import_torchvision("torchvision.models")
        return cast(nn.Module, getattr(models, f"resnet{settings.num_layers}")(num_classes=images.num_classes))
    return sd.models.cifar_resnet(
        settings.num_layers,
        images.num_classes,
        shortcut=settings.shortcut,
        init=settings.init,
        in_channels=images.train.image_shape[0],
    )


def _without_the_other_blocks(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    with warnings.catch_warnings():
        # It was not trained at all so far.
        warnings.filterwarnings("ignore", message=".*was not trained with stochastic depth")
        return sd.subnetwork(model, keep)


def load_weights(model: nn.Module, weights: Mapping[str, object], where: str) -> None:
    """Begin with somebody's weights: a `state_dict`, whether of a plain or of a stochastic network.

    Args:
        model: the network.
        weights: names and tensors.
        where: opens the message of an error.

    Raises:
        ValueError: if they are not those of this network; nothing is changed.
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
    """The residual branches of a network, with stochastic or constant depth."""
    if depth is not None:
        return depth.names
    names = sd.make_stochastic_(model, sd.uniform(1.0)).names
    sd.restore_(model)
    return names


def describe_branches(
    experiment: Experiment, model: nn.Module, depth: sd.Controller | None, inputs: Tensor
) -> tuple[Branches, Cost | None]:
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
        return Branches(names, [1.0] * len(names), float(len(names)), 1.0, 1.0), None
    # Times are no part of the cost, which `draw="equal_cost"` evens out: the same run would draw other gates.
    cost = depth.cost(inputs[:2])
    probs = mean_survival_probs(depth.survival_probs, experiment.depth, experiment.recipe.epochs)
    time_share = depth.cost(inputs, measure=True).share_of_time(probs)
    assert time_share is not None
    return Branches(depth.names, probs, sd.expected_depth(probs), cost.share(probs), time_share), cost


def set_epoch(experiment: Experiment, depth: sd.Controller | None, epoch: int) -> None:
    """Give the gates the survival probabilities of an epoch, from 1, where they change over time."""
    if depth is None or experiment.depth is None or experiment.depth.over_time == "constant":
        return
    over_depth = sd.SCHEDULES[experiment.depth.schedule](experiment.depth.final_survival_prob)(len(depth.names))
    depth.set_survival_probs(survival_probs(over_depth, experiment.depth, epoch, experiment.recipe.epochs))


def capture_branches(experiment: Experiment, model: nn.Module, depth: sd.Controller | None) -> None:
    """Replay the branches as CUDA graphs from now on; at constant depth all of them in every step.

    Raises:
        ValueError: if there is no GPU, or a branch does what a graph cannot repeat exactly.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU, but the device is {device.type}.")
    if experiment.recipe.batch_norm == "synchronised":
        raise ValueError("--cuda-graphs does not go with recipe.batch_norm synchronised, which waits for other ranks.")
    (depth or sd.make_stochastic_(model, sd.uniform(1.0))).capture()


def build_optimiser(model: nn.Module, experiment: Experiment) -> torch.optim.SGD:
    """SGD with Nesterov momentum; decay on every parameter, BatchNorm and biases too (Huang et al. 2016)."""
    recipe = experiment.recipe
    some_without_gradients = experiment.depth is not None and experiment.depth.skipped_grad == "none"
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        dampening=0,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        # One kernel for all parameters; PyTorch's raises where some have had no gradient yet.
        fused=not some_without_gradients,
    )


@contextmanager
def reproducible(recipe: Recipe) -> Generator[None]:
    """Within, the same numbers every time: an operation that has no such algorithm raises."""
    # cuBLAS reads this when it starts; without it PyTorch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    enabled, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    num_threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # it helps to find bugs, and costs a pass over every buffer
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        settings.fill_uninitialized_memory = fill
        torch.set_num_threads(num_threads)


def find_device(name: str | None, precision: Precision, local_rank: int | None = None) -> torch.device:
    """The device of that name; without one the GPU, or the CPU where there is none.

    Args:
        name: cpu, cuda, cuda:NUMBER or None.
        precision: what it must compute in.
        local_rank: number of this process on its machine: it takes the GPU of that number, unless one is named.

    Raises:
        ValueError: if there is no such device, or it does not know the precision.
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
        raise ValueError(
            f"There is no device {name!r}: {torch.cuda.device_count()} CUDA devices are visible to PyTorch."
        )
    device = torch.device("cuda", int(index or 0))
    if precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"{torch.cuda.get_device_name(device)} does not compute in bf16: use --precision fp16.")
    return device
