"""The paper's tables and figures, and further questions: the runs behind each, and how they are shown.

`stochastic-depth reproduce NAME --out FOLDER` trains the missing runs and draws the result. Experiments with the same
configuration share a run: in one folder, all runs of `table2` are done after `table1`. `--scale small` asks the same
question with few images (`few.py`), in seconds to minutes per run on one core.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from stochastic_depth_lab.experiments import few, paper
from stochastic_depth_lab.experiments.config import (
    Claim,
    Comparison,
    Data,
    Depth,
    Experiment,
    OverTime,
    Regularizers,
    Study,
)
from stochastic_depth_lab.experiments.paper import Pair

_SURVIVAL_PROBS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FEW_SURVIVAL_PROBS = (0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9)


def _variant(base: Experiment, suffix: str, title: str, **changes: Any) -> Experiment:
    """An experiment of a pair with changes, under another name."""
    name = f"{base.name.rpartition('-')[0]}-{suffix}"
    return replace(base, name=name, title=title, published=None, **changes)


def _with_survival(pair: Pair, schedule: str, final_survival_prob: float) -> Experiment:
    """A pair's stochastic experiment with another schedule, or the pair's own experiment if that is the same."""
    constant, stochastic = pair
    if final_survival_prob == 1:
        return constant
    depth = Depth("linear_decay" if schedule == "linear" else "uniform", final_survival_prob)
    if depth == stochastic.depth:
        return stochastic
    title = f"{stochastic.title.removesuffix(', stochastic depth')}, {schedule}, p_L = {final_survival_prob}"
    return _variant(stochastic, f"{schedule}-{final_survival_prob}", title, depth=depth)


def _less(pairs: Iterable[tuple[Experiment, Experiment]], measure: Any = "test_error") -> tuple[Comparison, ...]:
    """Of each pair (more, less), such as (constant, stochastic), the second is claimed to have less."""
    return tuple(Comparison(less.name, more.name, measure) for more, less in pairs)


_CIFAR10_110 = paper.CIFAR10_110
_CIFAR10_1202 = paper.CIFAR10_1202
_CIFAR100_110 = paper.CIFAR100_110
_SVHN_152 = paper.SVHN_152
_IMAGENET_152 = paper.IMAGENET_152
_CURVES = (_CIFAR10_110, _CIFAR10_1202, _CIFAR100_110, _SVHN_152)
_TABLE2 = (_CIFAR10_110, _CIFAR100_110, _SVHN_152)
_DIGITS = few.DIGITS
_CIFAR10_FEW = few.CIFAR10_FEW_32


def _digits_deeper(num_layers: int, rates: tuple[float, float], steps: int, epochs: int, name: str = "") -> Pair:
    """The paper's schedule with its warm-up, on 200 digits: a tenth of the rate for the first tenth of the steps."""
    settings: dict[str, Any] = {"lr_schedule": "step_text", "warmup_epochs": 1}
    name = f"digits-{num_layers}-deeper{name}"
    return few.few(name, few.digits(), num_layers, steps=steps, epochs=epochs, rates=rates, **settings)


_DIGITS_DEEPER = {layers: _digits_deeper(layers, rates, 2000, 10) for layers, rates in few.DEEPER_RATES.items()}
_DIGITS_110 = _DIGITS_DEEPER[110]
_SMALL = (_DIGITS, _DIGITS_110, _CIFAR10_FEW)


def _runs(pairs: Iterable[Sequence[Experiment]]) -> tuple[Experiment, ...]:
    return tuple(experiment for pair in pairs for experiment in pair)


# The demo: `make demo`, stochastic-depth reproduce digits --out runs/digits
DIGITS = Study(
    "digits",
    "Training on 200 digits, 56 layers",
    "A deep network memorizes its few training images. With stochastic depth it still recognizes others.",
    experiments=_DIGITS,
    small_experiments=_DIGITS,
    figures=("gap", "curves"),
    claims=(Claim("Stochastic depth lowers the test error (Huang et al. 2016).", _less([_DIGITS])),),
    seeds=5,
    jobs=2,
    baselines=True,
)

# Huang et al. 2016, table of results: 6.41 / 5.23, 6.72 / 4.91, 27.22 / 24.58, 2.01 / 1.75, 21.78 / 21.98 %.
# (constant / stochastic).
# stochastic-depth reproduce table1 --out runs/paper --seeds 3
# About 1,900 h on one core for one seed, ImageNet 43,000 h; not run.
TABLE1 = Study(
    "table1",
    "Test error with constant and stochastic depth",
    "The paper: stochastic depth lowers the test error on every dataset except ImageNet (equal after a third more "
    "epochs), and 1202 layers reach a lower error than 110.",
    experiments=_runs((*_CURVES, _IMAGENET_152)),
    small_experiments=_runs(_SMALL),
    figures=("curves",),
    claims=(
        Claim("The paper: stochastic depth lowers the test error on every data set.", _less((*_CURVES, *_SMALL))),
        Claim(
            "The paper: with stochastic depth 1202 layers learn better than 110.",
            _less([(_CIFAR10_110[1], _CIFAR10_1202[1])]),
        ),
    ),
    seeds=1,
)

# Huang et al. 2016, training time on one Titan X: 20 h 42 / 15 h 7, 20 h 51 / 15 h 20, 33 h 43 / 25 h 33.
# stochastic-depth reproduce table2 --out runs/paper
# About 470 h on one core; not run.
TABLE2 = Study(
    "table2",
    "Training time with constant and stochastic depth",
    "The paper: stochastic depth saves about a quarter of the training time, as expected from p_L = 0.5.",
    experiments=_runs(_TABLE2),
    small_experiments=_runs(_SMALL),
    claims=(Claim("The paper: training takes less time.", _less((*_TABLE2, *_SMALL), "process_s")),),
)

# Huang et al. 2016, training loss and test error over the epochs for the runs of the first table.
# stochastic-depth reproduce curves --out runs/paper
# About 1,900 h on one core; not run.
CURVES = Study(
    "curves",
    "Training loss and test error over epochs",
    "The paper: the training loss is higher with stochastic depth, and the test error ends lower.",
    experiments=_runs(_CURVES),
    small_experiments=_runs((_DIGITS_110, _CIFAR10_FEW)),
    figures=("curves", "gradient"),
    claims=(
        Claim(
            "The paper: the test error ends lower with stochastic depth.",
            _less((*_CURVES, _DIGITS_110, _CIFAR10_FEW)),
        ),
        Claim(
            "The paper: the training loss ends higher with stochastic depth.",
            _less([(s, c) for c, s in (*_CURVES, _DIGITS_110, _CIFAR10_FEW)], "train_loss"),
        ),
    ),
)

# The paper's rate for both methods, so that no other rate explains another gradient: 1,000 steps on 200 digits, a tenth
# of the rate after a half and three quarters.
_DIGITS_STEP = few.titled(
    few.few("digits-56-step", few.digits(), 56, steps=1000, epochs=25, rates=(0.1, 0.1), lr_schedule="step_text"),
    "rate 0.1",
)

# Huang et al. 2016, mean gradient magnitude of the first convolution, CIFAR-10, 110 layers.
# stochastic-depth reproduce gradients --out runs/paper
# About 120 h on one core; not run.
GRADIENTS = Study(
    "gradients",
    "Gradient of the first convolution over epochs",
    "The paper: the gradient is larger with stochastic depth, especially after the learning rate drops.",
    experiments=_CIFAR10_110,
    small_experiments=_runs((_DIGITS_110, _DIGITS_STEP)),
    figures=("gradient", "curves"),
    claims=(
        Claim(
            "The paper: after the learning rate drops the gradient is larger with stochastic depth.",
            _less([(s, c) for c, s in (_CIFAR10_110, _DIGITS_110, _DIGITS_STEP)], "late_gradient"),
        ),
    ),
)

# Huang et al. 2016, test error over p_L, CIFAR-10, 110 layers, linear decay and uniform, with constant depth as a line.
# stochastic-depth reproduce survival --out runs/paper
# About 900 h on one core; not run.
_DIGITS_56 = few.few("digits-56", few.digits(), 56, steps=300, epochs=5, rates=few.DIGITS_RATES[300])


def _survival_runs(pair: Pair, probs: Sequence[float]) -> tuple[Experiment, ...]:
    return (pair[0], *(_with_survival(pair, kind, p) for p in probs for kind in ("linear", "uniform")))


def _survival_claims(pairs: Sequence[Pair]) -> tuple[Claim, ...]:
    def runs(kind: str, probs: Sequence[float]) -> list[tuple[Pair, Experiment]]:
        return [(pair, _with_survival(pair, kind, p)) for pair in pairs for p in probs]

    return (
        Claim(
            "The paper: linear decay is better than uniform survival throughout.",
            _less(
                (uniform, linear)
                for (_, uniform), (_, linear) in zip(
                    runs("uniform", (0.2, 0.4, 0.6, 0.8)), runs("linear", (0.2, 0.4, 0.6, 0.8)), strict=True
                )
            ),
        ),
        Claim(
            "The paper: linear decay from 0.4 to 0.8 is better than constant depth.",
            _less((pair[0], linear) for pair, linear in runs("linear", (0.4, 0.6, 0.8))),
        ),
        Claim(
            "The paper: linear decay to 0.2 is better than constant depth.",
            _less((pair[0], linear) for pair, linear in runs("linear", (0.2,))),
        ),
        Claim(
            "The paper: uniform survival is good only near 0.8.",
            _less((low, _with_survival(pair, "uniform", 0.8)) for pair, low in runs("uniform", (0.2, 0.4))),
        ),
    )


SURVIVAL = Study(
    "survival",
    "Test error over the survival probability of the last block",
    "The paper: linear decay is better than uniform survival throughout, and good from 0.4 to 0.8; uniform survival is "
    "good only near 0.8; linear decay to 0.2 still beats constant depth.",
    experiments=_survival_runs(_CIFAR10_110, _SURVIVAL_PROBS),
    small_experiments=_survival_runs(_DIGITS_56, _FEW_SURVIVAL_PROBS),
    figures=("survival_curve",),
    claims=_survival_claims((_CIFAR10_110, _DIGITS_56)),
)

# Huang et al. 2016, heat map of the test error over depth and p_L, CIFAR-10, linear decay.
# stochastic-depth reproduce depth-survival --out runs/paper
# About 800 h on one core; not run.
_DEPTHS = (
    paper.CIFAR10_20,
    paper.CIFAR10_32,
    paper.CIFAR10_44,
    paper.CIFAR10_56,
    _CIFAR10_110,
)
_DIGITS_DEPTHS = tuple(_DIGITS_DEEPER[num_layers] for num_layers in (20, 56, 110))
DEPTH_SURVIVAL = Study(
    "depth-survival",
    "Test error over depth and survival probability",
    "The paper shows this as a heat map; we do not have its numbers.",
    experiments=tuple(_with_survival(pair, "linear", p) for pair in _DEPTHS for p in (0.2, 0.4, 0.6, 0.8, 1.0)),
    small_experiments=tuple(_with_survival(pair, "linear", p) for pair in _DIGITS_DEPTHS for p in (0.2, 0.5, 0.8, 1.0)),
    figures=("heat_map",),
    claims=(
        Claim(
            "The paper: stochastic depth is better at every depth.",
            (
                *_less((pair[0], _with_survival(pair, "linear", 0.4)) for pair in _DEPTHS),
                *_less(_DIGITS_DEPTHS),
            ),
        ),
    ),
)

# Huang et al. 2016: 1202 layers have 4.91 % with stochastic depth, 110 have 5.23 %; at constant depth 6.72 and 6.41 %.
# stochastic-depth reproduce deeper --scale small --out runs/deeper
_DEEPER = (_DEPTHS[0], _DEPTHS[3], _CIFAR10_110, _CIFAR10_1202)
DEEPER = Study(
    "deeper",
    "Test error over depth, up to 1202 layers",
    "The paper: with stochastic depth more layers still help, up to 1202; at constant depth they do not.",
    experiments=_runs(_DEEPER),
    small_experiments=_runs(_DIGITS_DEEPER.values()),
    figures=("depth_curve",),
    claims=(
        Claim("The paper: stochastic depth is better at every depth.", _less((*_DEEPER, *_DIGITS_DEEPER.values()))),
        Claim(
            "The paper: with stochastic depth 1202 layers learn better than 110.",
            _less([(_CIFAR10_110[1], _CIFAR10_1202[1]), (_DIGITS_110[1], _DIGITS_DEEPER[1202][1])]),
        ),
        Claim(
            "The paper: at constant depth 1202 layers learn worse than 110.",
            _less([(_CIFAR10_1202[0], _CIFAR10_110[0]), (_DIGITS_DEEPER[1202][0], _DIGITS_110[0])]),
        ),
    ),
)


def _over_time(pair: Pair, over_time: OverTime, turn: float) -> Experiment:
    title = f"{pair[1].title}, {over_time}, turn at {turn}"
    return _variant(pair[1], f"{over_time}-{turn}", title, depth=Depth(over_time=over_time, turn=turn))


def _regularized(pair: Pair, name: str, regularizers: Regularizers) -> Experiment:
    title = pair[0].title.replace("constant depth", name.replace("-", " "))
    return _variant(pair[0], name, title, regularizers=regularizers)


def _decayed(pair: Pair, weight_decay: float) -> Experiment:
    title = pair[0].title.replace("constant depth", f"weight decay {weight_decay}")
    return _variant(pair[0], f"decay-{weight_decay}", title, recipe=replace(pair[0].recipe, weight_decay=weight_decay))


# Not in the paper. Liu et al. 2023, "Dropout Reduces Underfitting": dropping only early (the first 50 of 300 epochs,
# falling to 0) helps models that under-fit, dropping only late those that over-fit.
# stochastic-depth reproduce over-time --out runs/paper
# About 240 h on one core; not run.
_OVER_TIME = (*_CIFAR10_110, _over_time(_CIFAR10_110, "early", 0.25), _over_time(_CIFAR10_110, "late", 0.25))
_DIGITS_OVER_TIME = (*_DIGITS, _over_time(_DIGITS, "early", 0.4), _over_time(_DIGITS, "late", 0.4))
OVER_TIME = Study(
    "over-time",
    "Stochastic depth early, late, and throughout",
    "Liu et al. (2023), with other networks: dropping early only helps models that underfit, dropping late only models "
    "that overfit. Early: the drop rates fall to 0 by the turning point; late: they are 0 until the turning point.",
    experiments=_OVER_TIME,
    small_experiments=_DIGITS_OVER_TIME,
    figures=("curves", "gradient"),
    claims=(
        Claim(
            "Liu et al. 2023: a network that over-fits gains from dropping late.",
            _less([(_DIGITS_OVER_TIME[0], _DIGITS_OVER_TIME[3])]),
        ),
        Claim(
            "Dropping throughout is better than early or late only.",
            _less((only, _DIGITS_OVER_TIME[1]) for only in _DIGITS_OVER_TIME[2:]),
        ),
    ),
)

# Huang et al. 2016 say that dropout gains little next to BatchNorm; no numbers are known. On few images every strength
# is shown; none is chosen.
# stochastic-depth reproduce regularizers --out runs/paper
# About 400 h on one core; not run.
_REGULARIZERS = (
    *_CIFAR10_110,
    _regularized(_CIFAR10_110, "dropout", Regularizers(activation_survival_prob=0.8)),
    _regularized(_CIFAR10_110, "dropped-filters", Regularizers(filter_survival_prob=0.8)),
    _regularized(_CIFAR10_110, "filter-penalty", Regularizers(filter_penalty=0.3)),
    _regularized(
        _CIFAR10_110, "dropped-filters-and-penalty", Regularizers(filter_survival_prob=0.8, filter_penalty=0.3)
    ),
)
_STRENGTHS = (0.9, 0.7, 0.5)
_DIGITS_OTHERS = (
    *(_regularized(_DIGITS_56, f"dropout-{p}", Regularizers(activation_survival_prob=p)) for p in _STRENGTHS),
    *(_regularized(_DIGITS_56, f"dropped-filters-{p}", Regularizers(filter_survival_prob=p)) for p in _STRENGTHS),
    *(_decayed(_DIGITS_56, weight_decay) for weight_decay in (1e-3, 5e-3, 2e-2)),
)
REGULARIZERS = Study(
    "regularizers",
    "Stochastic depth compared with other regularizers",
    "The paper: dropout gains little with BatchNorm. Dropped filters and the filter penalty come from a public "
    "explainer that presents them as stochastic depth. For dropout and dropped filters, the number is the survival "
    "probability.",
    experiments=_REGULARIZERS,
    small_experiments=(*_DIGITS_56, *_DIGITS_OTHERS),
    claims=(
        Claim(
            "Stochastic depth is better than dropout, dropped filters and weight decay, whatever their strength.",
            _less((other, _DIGITS_56[1]) for other in _DIGITS_OTHERS),
        ),
    ),
)


# Not in the paper: from how many steps, and up to how many images, is stochastic depth better?
# stochastic-depth reproduce payoff --out runs/payoff --jobs 2
def _payoff(
    name: str, data: Any, num_layers: int, images: Sequence[int], rates: Mapping[int, tuple[float, float]]
) -> Iterator[Pair]:
    """Pairs by images of each class and by steps, with the rates for that number of steps."""
    for count, (steps, both) in product(images, rates.items()):
        passes = steps * few.BATCH_SIZE // (10 * count)
        epochs = max(number for number in range(1, 6) if passes % number == 0)
        pair = few.few(
            f"{name}-{count}-images-{steps}-steps", data(count), num_layers, steps=steps, epochs=epochs, rates=both
        )
        yield few.titled(pair, f"{10 * count:,} images, {steps:,} steps")


_DIGITS_PAYOFF = tuple(_payoff("digits", few.digits, 56, (2, 5, 10, 20, 50, 100), few.DIGITS_RATES))
_CIFAR10_PAYOFF = (
    # From 3,000 steps on at the paper's rate: with the rates that are chosen now, each run takes a quarter of an hour.
    *_payoff("cifar10", few.cifar10, 32, (10, 100, 500), {**few.CIFAR10_RATES, 3000: (0.1, 0.1)}),
    # 3,000 steps are 30 passes over 5,000 images, too few for stochastic depth; these are 100.
    *_payoff("cifar10", few.cifar10, 32, (500,), {10_000: (0.1, 0.1)}),
)
PAYOFF = Study(
    "payoff",
    "When does stochastic depth help? Number of training steps and images",
    "Not in the paper: test error of both methods over the number of steps and images, and where the curves cross.",
    experiments=_runs((*_DIGITS_PAYOFF, *_CIFAR10_PAYOFF)),
    small_experiments=_runs((*_DIGITS_PAYOFF, *_CIFAR10_PAYOFF)),
    figures=("crossing",),
    seeds=3,
)

# Not in the paper: the largest pair on CIFAR-10 that two cores finish in two hours. The paper's rate, not tuned.
# stochastic-depth reproduce cifar10-all --out runs/cifar10-all
_CIFAR10_ALL = paper.CIFAR10_UNAUGMENTED_32
CIFAR10_ALL = Study(
    "cifar10-all",
    "All of CIFAR-10 on a CPU",
    "The paper: stochastic depth lowers the test error. Here with 32 layers, 20 epochs and no augmentation.",
    experiments=_CIFAR10_ALL,
    small_experiments=_CIFAR10_ALL,
    figures=("curves", "gradient"),
    claims=(Claim("The paper: stochastic depth lowers the test error.", _less([_CIFAR10_ALL])),),
)


def _grid(pairs: Mapping[float, Pair]) -> tuple[Experiment, ...]:
    """Pairs by their learning rate: first those of constant depth."""
    titled = [few.titled(pair, f"rate {rate}") for rate, pair in pairs.items()]
    return (*(constant for constant, _ in titled), *(stochastic for _, stochastic in titled))


def _rate_grid(name: str, data: Data, num_layers: int, grids: Mapping[int, Sequence[float]]) -> tuple[Experiment, ...]:
    """A pair with every learning rate of the grid, by steps."""

    def with_rate(rate: float, steps: int) -> Pair:
        name_of_pair = f"{name}-{steps}-steps-rate-{rate}"
        of_rate = few.few(name_of_pair, data, num_layers, steps=steps, epochs=5, rates=(rate, rate))
        return few.titled(of_rate, f"{steps:,} steps")

    return tuple(
        each for steps, grid in grids.items() for each in _grid({rate: with_rate(rate, steps) for rate in grid})
    )


def _learning_rates(name: str, of: str, grid: tuple[Experiment, ...]) -> Study:
    return Study(
        name,
        f"Learning rates for {of}, chosen on validation images",
        "Which learning rate has the lowest validation error after the last step, for each method on its own? These "
        "seeds are not reported elsewhere.",
        experiments=grid,
        small_experiments=grid,
        figures=("rates",),
        seeds=2,
        first_seed=100,
    )


# Not in the paper: the runs that few.DIGITS_RATES and few.CIFAR10_RATES are chosen from.
# stochastic-depth reproduce learning-rates --out runs/learning-rates
LEARNING_RATES = _learning_rates(
    "learning-rates",
    "the digits",
    _rate_grid(
        "digits-56",
        few.digits(),
        56,
        {
            100: (0.01, 0.02, 0.05, 0.1, 0.2),
            300: (0.02, 0.05, 0.1, 0.2),
            1000: (0.02, 0.05, 0.1, 0.2, 0.4, 0.8),
            3000: (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        },
    ),
)
# stochastic-depth reproduce learning-rates-cifar10 --out runs/learning-rates
LEARNING_RATES_CIFAR10 = _learning_rates(
    "learning-rates-cifar10",
    "CIFAR-10",
    _rate_grid(
        "cifar10-32",
        few.cifar10(),
        32,
        dict.fromkeys((100, 300, 1000), (0.02, 0.05, 0.1, 0.2)) | {3000: (0.05, 0.1, 0.2, 0.4, 0.8)},
    ),
)


def _rate_grid_deeper(num_layers: int) -> tuple[Experiment, ...]:
    """With the steps of `deeper`, as shorter trials mislead; 1202 layers with a tenth: with all, each takes an hour."""
    rates = {
        20: (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2),
        56: (0.02, 0.05, 0.1, 0.2, 0.4),
        110: (0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
        302: (0.005, 0.02, 0.05, 0.1),
        1202: (0.0005, 0.002, 0.005, 0.02, 0.1),
    }
    steps, epochs = (200, 5) if num_layers == 1202 else (2000, 10)
    return _grid(
        {rate: _digits_deeper(num_layers, (rate, rate), steps, epochs, f"-rate-{rate}") for rate in rates[num_layers]}
    )


# stochastic-depth reproduce learning-rates-deeper --out runs/learning-rates
LEARNING_RATES_DEEPER = _learning_rates(
    "learning-rates-deeper",
    "20 to 1202 layers",
    tuple(each for num_layers in few.DEEPER_RATES for each in _rate_grid_deeper(num_layers)),
)
