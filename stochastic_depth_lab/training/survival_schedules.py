"""Survival over the epochs: how much of the drop rates of the schedule over depth counts, as a pure function.

In epoch e block l survives with 1 - s(e) (1 - p_l), where s in [0, 1] is the strength: 1 is the schedule over depth as
it stands, 0 is constant depth. `depth.set_survival_probs` is told every epoch; checkpoints hold what it was told.
"""

import math
from collections.abc import Sequence

from stochastic_depth_lab.experiments.config import Depth


def survival_probs(over_depth: Sequence[float], depth: Depth, epoch: int, epochs: int) -> list[float]:
    """The survival probabilities of one epoch.

    Args:
        over_depth: those of the schedule over depth.
        depth: says how they change over time.
        epoch: from 1.
        epochs: of the whole run.

    Example:
        >>> survival_probs([0.75, 0.5], Depth(over_time="early", turn=0.5), 3, 8)
        [0.875, 0.75]
    """
    share = strength(depth, (epoch - 1) / epochs)
    return [1 - share * (1 - prob) for prob in over_depth]


def mean_survival_probs(over_depth: Sequence[float], depth: Depth, epochs: int) -> list[float]:
    """Mean over the epochs of a run: what a block's realised frequency is to be compared with."""
    by_epoch = [survival_probs(over_depth, depth, epoch, epochs) for epoch in range(1, epochs + 1)]
    return [math.fsum(probs) / epochs for probs in zip(*by_epoch, strict=True)]


def strength(depth: Depth, progress: float) -> float:
    """The share of the drop rates that counts.

    Args:
        depth: `over_time` names the schedule, `turn` is the share of the run after which it turns.
        progress: share of the epochs that are done, in [0, 1).

    Example:
        >>> [round(strength(Depth(over_time="plateau", turn=0.5), e / 8), 2) for e in range(8)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.5]
    """
    turn = depth.turn
    match depth.over_time:
        case "constant":
            return 1.0
        case "warm_up":
            return min(progress / turn, 1.0)
        case "early":
            return max(1 - progress / turn, 0.0)
        case "late":
            return float(progress >= turn)
        case "exponential":
            # DeepSpeed's progressive layer drop: theta(t) = (1 - theta) exp(-gamma t) + theta; 99 % of it at the turn.
            return 1 - 100 ** (-progress / turn)
        case "plateau":
            lowest = (1 + turn) / 2
            return 1.0 if progress < turn else abs(progress - lowest) / (lowest - turn)
