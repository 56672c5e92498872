"""Rejects invalid settings before any work."""

from stochastic_depth_lab.experiments.config import Experiment


def check(experiment: Experiment) -> None:
    """Reject invalid settings.

    The library and the data sets check the rest, such as a depth of 6n + 2.

    Raises:
        ValueError: in one line that names the field.
    """
    data, recipe = experiment.data, experiment.recipe
    if experiment.name in ("", ".", "..") or any(letter in "/\\" or ord(letter) < 32 for letter in experiment.name):
        raise ValueError(
            f"the name of a run must be a plain file name, but is {experiment.name!r}: it names the run's folder."
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
        ("regularizers.activation_survival_prob", experiment.regularizers.activation_survival_prob),
        ("regularizers.filter_survival_prob", experiment.regularizers.filter_survival_prob),
    ):
        if not 0 < survival_prob <= 1:
            raise ValueError(
                f"{name} must be in (0, 1], but is {survival_prob}. It is the chance to survive: a drop rate of 0.2 is "
                "a survival probability of 0.8."
            )
    if not 0 <= experiment.regularizers.filter_penalty < float("inf"):
        raise ValueError(
            f"regularizers.filter_penalty must be 0 or positive, but is {experiment.regularizers.filter_penalty}."
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
    """Reject combinations that ImageNet's pictures or networks do not support."""
    data, model = experiment.data, experiment.model
    if data.dataset == "imagenet" and data.normalization != "channel":
        raise ValueError("data.normalization must be channel for imagenet: its pictures are not in memory.")
    if data.dataset == "imagenet" and (data.images_per_class, data.num_test) != (None, None):
        raise ValueError("data.images_per_class and data.num_test are for images in memory, not for imagenet.")
    if data.dataset in ("digits", "cifar10", "cifar100", "svhn") and data.image_size is not None:
        raise ValueError(f"data.image_size is for imagenet: images of {data.dataset} have a fixed size.")
    if model.family == "cifar":
        return
    if model.num_layers not in (18, 34, 50, 101, 152):
        raise ValueError(f"model.num_layers must be 18, 34, 50, 101 or 152 for imagenet, but is {model.num_layers}.")
    if (model.shortcut, model.init) != ("projection", "he"):
        raise ValueError(
            f"model.shortcut and model.init must be projection and he for imagenet, as torchvision has them, but are "
            f"{model.shortcut} and {model.init}."
        )
    if experiment.regularizers.activation_survival_prob != 1 or experiment.regularizers.filter_survival_prob != 1:
        raise ValueError("dropout and dropped filters work only in the paper's networks for small images.")
