"""Smaller versions of an experiment: `--quick` checks that everything works, `--scale small` is for a CPU."""

from dataclasses import replace

from stochastic_depth_lab.experiments.config import Data, Experiment, Recipe


def quick(experiment: Experiment) -> Experiment:
    """The same network and recipe on a few images for five epochs.

    Deeper networks get fewer images, so an epoch takes a second or two on two cores at any depth. Smaller batches get
    a proportionally lower rate (Goyal et al. 2017): 1202 layers overflow at a rate of 0.1 on a few images.
    """
    recipe = experiment.recipe
    num_images = max(8, (32_000 if experiment.data.dataset == "digits" else 1000) // experiment.model.num_layers)
    data = replace(_small_pictures(experiment.data, num_workers=0), limit=num_images)
    if data.images_per_class is not None:
        data = replace(data, images_per_class=min(data.images_per_class, 2), num_validation=None)
        num_images = min(num_images, 20)  # of ten classes
    # At least two batches, the last of which may be shorter.
    batch_size = min(recipe.batch_size, num_images // 2 + 1)
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
    return replace(experiment, data=data, recipe=recipe, published=None)


def _small_pictures(data: Data, *, num_workers: int) -> Data:
    """ImageNet's pictures at 64 pixels, a twelfth of the work. Other data sets are unchanged."""
    return replace(data, image_size=64, num_workers=num_workers) if data.dataset == "imagenet" else data


def small(experiment: Experiment) -> Experiment:
    """1,000 images without augmentation, 32 layers (110 for 1202), 3,000 steps of 50, one-cycle learning rate.

    Experiments on few images are unchanged. ImageNet: 18 layers, 64 pixels, 5,000 pictures of each part, 12 epochs,
    which shows that its recipe works.
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
