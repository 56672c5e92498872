"""The learning rate against plain lists, and against PyTorch's own one-cycle."""

import itertools

import pytest
import torch

from stochastic_depth_lab.experiments import find
from stochastic_depth_lab.experiments.config import Recipe
from stochastic_depth_lab.training.schedules import learning_rate


def runs_of(recipe: Recipe) -> list[tuple[float, int]]:
    """Each rate with the number of epochs it holds for."""
    rates = [learning_rate(recipe, epoch, 0, 352) for epoch in range(1, recipe.epochs + 1)]
    return [(pytest.approx(rate, rel=1e-12), len(list(epochs))) for rate, epochs in itertools.groupby(rates)]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(500), [(0.1, 250), (0.01, 125), (0.001, 125)]),
        (Recipe(500, lr_schedule="step_code"), [(0.1, 249), (0.01, 125), (0.001, 126)]),
        (Recipe(50, lr_drops=(0.6, 0.7)), [(0.1, 30), (0.01, 5), (0.001, 15)]),
        (Recipe(50, lr_drops=(0.6, 0.7), lr_schedule="step_code"), [(0.1, 29), (0.01, 5), (0.001, 16)]),
        (Recipe(500, warmup_epochs=10), [(0.01, 10), (0.1, 240), (0.01, 125), (0.001, 125)]),
        (Recipe(10, lr_drops=(0.7, 0.9)), [(0.1, 7), (0.01, 2), (0.001, 1)]),
    ],
    ids=["cifar-text", "cifar-code", "svhn-text", "svhn-code", "1202-layers", "inexact-shares"],
)
def test_step_schedules_hold_each_rate_as_long_as_the_paper_or_its_code(recipe, expected):
    assert runs_of(recipe) == expected


@pytest.mark.parametrize("name", ["cifar10-110-stochastic", "cifar100-110-constant"])
def test_cifar_experiments_follow_the_text(name):
    assert runs_of(find(name).recipe) == [(0.1, 250), (0.01, 125), (0.001, 125)]


@pytest.mark.parametrize(("epochs", "num_steps"), [(20, 20), (5, 3), (4, 2)])
def test_one_cycle_is_that_of_pytorch(epochs, num_steps):
    recipe = Recipe(epochs, learning_rate=0.05, lr_schedule="one_cycle")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.05, total_steps=epochs * num_steps, cycle_momentum=False
    )
    for epoch, step in itertools.product(range(1, epochs + 1), range(num_steps)):
        assert learning_rate(recipe, epoch, step, num_steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if (epoch, step) != (epochs, num_steps - 1):
            theirs.step()
