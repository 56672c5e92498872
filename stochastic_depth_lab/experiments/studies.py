"""The paper's tables and figures, and its readers' questions: the runs behind each, and how they are shown.

`stochastic-depth reproduce NAME --out FOLDER` trains what is missing and draws it. Runs with the same configuration are
the same run: in one folder, `table2` finds all of its runs done after `table1`. `--scale small` takes the small forms:
minutes are for one run on one core of an AMD EPYC, bf16.
"""

from collections.abc import Sequence
from dataclasses import replace

from stochastic_depth_lab.config import Depth, Experiment, OverTime, Regularisers, Study, small
from stochastic_depth_lab.experiments import cifar, imagenet, svhn

_SURVIVAL_PROBS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FEW_SURVIVAL_PROBS = (0.2, 0.5, 0.7, 0.9)


def _with_survival(pair: tuple[Experiment, Experiment], schedule: str, final_survival_prob: float) -> Experiment:
    """A pair's stochastic experiment with another schedule; the pair's own where that is what is asked for."""
    constant, stochastic = pair
    if final_survival_prob == 1:
        return constant
    depth = Depth("linear_decay" if schedule == "linear" else "uniform", final_survival_prob)
    if depth == stochastic.depth:
        return stochastic
    return replace(
        stochastic,
        name=f"{stochastic.name.removesuffix('-stochastic')}-{schedule}-{final_survival_prob}",
        title=f"{stochastic.title}, {schedule}, p_L = {final_survival_prob}",
        depth=depth,
        published=None,
    )


def _small(experiments: Sequence[Experiment]) -> tuple[Experiment, ...]:
    return tuple(map(small, experiments))


_CIFAR10_110 = (cifar.CIFAR10_110_CONSTANT, cifar.CIFAR10_110_STOCHASTIC)
_CIFAR10_1202 = (cifar.CIFAR10_1202_CONSTANT, cifar.CIFAR10_1202_STOCHASTIC)
_CIFAR100_110 = (cifar.CIFAR100_110_CONSTANT, cifar.CIFAR100_110_STOCHASTIC)
_SVHN_152 = (svhn.SVHN_152_CONSTANT, svhn.SVHN_152_STOCHASTIC)
_IMAGENET_152 = (imagenet.IMAGENET_152_CONSTANT, imagenet.IMAGENET_152_STOCHASTIC)
_CURVES = (*_CIFAR10_110, *_CIFAR10_1202, *_CIFAR100_110, *_SVHN_152)
_TABLE2 = (*_CIFAR10_110, *_CIFAR100_110, *_SVHN_152)

# Huang et al. 2016, table of results: 6.41 / 5.23, 6.72 / 4.91, 27.22 / 24.58, 2.01 / 1.75, 21.78 / 21.98 %.
# (constant / stochastic).
# stochastic-depth reproduce table1 --out runs/paper --seeds 3
# About 1,900 h on one core for one seed, ImageNet 43,000 h; not run. Small: 10 runs of 2 to 4 minutes.
TABLE1 = Study(
    "table1",
    "Test error of constant and of stochastic depth",
    "The paper: stochastic depth lowers the test error on every data set but ImageNet (as good with a third more "
    "epochs), and lets 1202 layers learn better than 110.",
    experiments=(*_CURVES, *_IMAGENET_152),
    small_experiments=_small((*_CURVES, *_IMAGENET_152)),
    figures=("curves",),
)

# Huang et al. 2016, training time on one Titan X: 20 h 42 / 15 h 7, 20 h 51 / 15 h 20, 33 h 43 / 25 h 33.
# stochastic-depth reproduce table2 --out runs/paper
# About 470 h on one core; not run. Small: 6 runs of about 2 minutes.
TABLE2 = Study(
    "table2",
    "Training time of constant and of stochastic depth",
    "The paper: stochastic depth saves about a quarter of the training time, as expected from p_L = 0.5.",
    experiments=_TABLE2,
    small_experiments=_small(_TABLE2),
)

# Huang et al. 2016, training loss and test error over the epochs for the runs of the first table.
# stochastic-depth reproduce curves --out runs/paper
# About 1,900 h on one core; not run. Small: 8 runs of about 2 minutes.
CURVES = replace(
    TABLE1,
    name="curves",
    title="Training loss and test error over epochs",
    claim="The paper: with stochastic depth the test error ends lower on each of the data sets.",
    experiments=_CURVES,
    small_experiments=_small(_CURVES),
)

# Huang et al. 2016, mean gradient magnitude of the first convolution, CIFAR-10, 110 layers.
# stochastic-depth reproduce gradients --out runs/paper
# About 120 h on one core; not run. Small: 2 runs of about 2 minutes.
GRADIENTS = Study(
    "gradients",
    "Gradient of the first convolution over epochs",
    "The paper: the gradient is larger with stochastic depth, most of all after the learning rate drops.",
    experiments=_CIFAR10_110,
    small_experiments=_small(_CIFAR10_110),
    figures=("gradient", "curves"),
)

# Huang et al. 2016, test error over p_L, CIFAR-10, 110 layers, linear decay and uniform, with constant depth as a line.
# stochastic-depth reproduce survival --out runs/paper
# About 900 h on one core; not run. Small: 9 runs of about 2 minutes.
SURVIVAL = Study(
    "survival",
    "Test error over the survival probability of the last block",
    "The paper: linear decay is better than uniform survival throughout, and good from 0.4 to 0.8; uniform survival is "
    "good only near 0.8; linear decay to 0.2 still beats constant depth.",
    experiments=(
        _CIFAR10_110[0],
        *(_with_survival(_CIFAR10_110, kind, p) for kind in ("linear", "uniform") for p in _SURVIVAL_PROBS),
    ),
    small_experiments=_small(
        (
            _CIFAR10_110[0],
            *(_with_survival(_CIFAR10_110, kind, p) for kind in ("linear", "uniform") for p in _FEW_SURVIVAL_PROBS),
        )
    ),
    figures=("survival_curve",),
)

# Huang et al. 2016, heat map of the test error over depth and p_L, CIFAR-10, linear decay.
# stochastic-depth reproduce depth-survival --out runs/paper
# About 800 h on one core; not run. Small: 15 runs of 1 to 2 minutes.
DEPTH_SURVIVAL = Study(
    "depth-survival",
    "Test error over depth and survival probability",
    "The paper has a heat map of this; its numbers are not known here.",
    experiments=tuple(
        _with_survival(pair, "linear", p)
        for pair in (
            (cifar.CIFAR10_20_CONSTANT, cifar.CIFAR10_20_STOCHASTIC),
            (cifar.CIFAR10_32_CONSTANT, cifar.CIFAR10_32_STOCHASTIC),
            (cifar.CIFAR10_44_CONSTANT, cifar.CIFAR10_44_STOCHASTIC),
            (cifar.CIFAR10_56_CONSTANT, cifar.CIFAR10_56_STOCHASTIC),
            _CIFAR10_110,
        )
        for p in (0.2, 0.4, 0.6, 0.8, 1.0)
    ),
    small_experiments=tuple(
        small(_with_survival(pair, "linear", p), num_layers)
        for pair, num_layers in (
            ((cifar.CIFAR10_20_CONSTANT, cifar.CIFAR10_20_STOCHASTIC), 8),
            ((cifar.CIFAR10_56_CONSTANT, cifar.CIFAR10_56_STOCHASTIC), 14),
            (_CIFAR10_110, 20),
        )
        for p in (*_FEW_SURVIVAL_PROBS, 1.0)
    ),
    figures=("heat_map",),
)


def _over_time(pair: tuple[Experiment, Experiment], over_time: OverTime, turn: float) -> Experiment:
    _, stochastic = pair
    return replace(
        stochastic,
        name=f"{stochastic.name.removesuffix('-stochastic')}-{over_time}-{turn}",
        title=f"{stochastic.title}, {over_time}, turn at {turn}",
        depth=Depth(over_time=over_time, turn=turn),
        published=None,
    )


def _regularised(pair: tuple[Experiment, Experiment], name: str, regularisers: Regularisers) -> Experiment:
    constant, _ = pair
    return replace(
        constant,
        name=f"{constant.name.removesuffix('-constant')}-{name}",
        title=constant.title.replace("constant depth", name.replace("-", " ")),
        regularisers=regularisers,
        published=None,
    )


# Not of the paper. Liu et al. 2023, "Dropout Reduces Underfitting": dropping only early (the first 50 of 300 epochs,
# falling to 0) helps models that under-fit, dropping only late those that over-fit.
# stochastic-depth reproduce over-time --out runs/paper
# About 240 h on one core; not run. Small: 4 runs of about 2 minutes.
_OVER_TIME = (*_CIFAR10_110, _over_time(_CIFAR10_110, "early", 0.25), _over_time(_CIFAR10_110, "late", 0.25))
OVER_TIME = Study(
    "over-time",
    "Stochastic depth early, late, and throughout",
    "Dropping early only helps what under-fits, dropping late only what over-fits (Liu et al. 2023, other networks).",
    experiments=_OVER_TIME,
    small_experiments=_small(_OVER_TIME),
    figures=("curves", "gradient"),
)

# Huang et al. 2016 say that dropout gains little next to BatchNorm; no numbers are known.
# stochastic-depth reproduce regularisers --out runs/paper
# About 400 h on one core; not run. Small: 6 runs of about 2 minutes.
_REGULARISERS = (
    *_CIFAR10_110,
    _regularised(_CIFAR10_110, "dropout", Regularisers(activation_survival_prob=0.8)),
    _regularised(_CIFAR10_110, "dropped-filters", Regularisers(filter_survival_prob=0.8)),
    _regularised(_CIFAR10_110, "filter-penalty", Regularisers(filter_penalty=0.3)),
    _regularised(
        _CIFAR10_110, "dropped-filters-and-penalty", Regularisers(filter_survival_prob=0.8, filter_penalty=0.3)
    ),
)
REGULARISERS = Study(
    "regularisers",
    "Stochastic depth beside other regularisers",
    "The paper: dropout gains little next to BatchNorm. Dropped filters and the penalty on filters are what a public "
    "explainer takes for stochastic depth.",
    experiments=_REGULARISERS,
    small_experiments=_small(_REGULARISERS),
    figures=("curves",),
)
