"""Verdicts on claims from runs paired by seed: confirmed, contradicted or undecided, by a stated test.

Two runs with one seed share training images, initial weights and order, so a two-sided paired t-test tests their
difference. Its assumption, normal differences, cannot be checked with a few seeds. The exact sign-flip test beside it
assumes only symmetry, but its p cannot fall below 2 / 2^n: 0.0625 with five seeds.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from stochastic_depth_lab.experiments.config import Claim, Comparison

Verdict = Literal["confirmed", "contradicted", "undecided"]
LEVEL = 0.05
RULE = (
    "Confirmed: every comparison has the claimed sign with p < 0.05 (two-sided paired t-test over at least three "
    "seeds). Contradicted: one comparison has the opposite sign with p < 0.05 divided by the number of comparisons. "
    "Undecided: otherwise."
)


@dataclass(frozen=True)
class Paired:
    """The differences of two methods over their common seeds."""

    comparison: Comparison
    differences: tuple[float, ...]
    """Less minus more, seed by seed: negative where the claim holds."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.mean(self.differences)

    @property
    def num_wins(self) -> int:
        """Seeds in which the claim holds."""
        return sum(difference < 0 for difference in self.differences)

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval of the mean, by the t distribution; infinite for a single seed."""
        n = len(self.differences)
        if n < 2:
            return math.inf
        return float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * statistics.stdev(self.differences) / math.sqrt(n)

    @property
    def p(self) -> float:
        """Of the two-sided paired t-test; 1 for fewer than three seeds, which decide nothing."""
        n = len(self.differences)
        if n < 3:
            return 1.0
        deviation = statistics.stdev(self.differences)
        if deviation == 0:
            return 0.0 if self.mean else 1.0
        return float(2 * stats.t.sf(abs(self.mean) / deviation * math.sqrt(n), n - 1))

    @property
    def exact_p(self) -> float:
        """Of the sign-flip test: the share of the 2^n ways to swap the two that give at least this mean."""
        observed = abs(math.fsum(self.differences))
        sums = [
            abs(math.fsum(sign * difference for sign, difference in zip(signs, self.differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(self.differences))
        ]
        return sum(total >= observed * (1 - 1e-12) for total in sums) / len(sums)


@dataclass(frozen=True)
class Judged:
    """A claim and its verdict."""

    claim: Claim
    paired: tuple[Paired, ...]
    verdict: Verdict


def judge(claim: Claim, paired: Sequence[Paired]) -> Judged:
    """The verdict on a claim, by `RULE`.

    Args:
        claim: what is claimed.
        paired: its comparisons, each with the differences of at least one seed.

    Example:
        >>> comparison = Comparison("stochastic", "constant")
        >>> judge(Claim("Less error.", (comparison,)), [Paired(comparison, (-8.0, -9.5, -7.5))]).verdict
        'confirmed'
    """
    verdict: Verdict = "undecided"
    if paired and all(each.mean < 0 and each.p < LEVEL for each in paired):
        verdict = "confirmed"
    elif any(each.mean > 0 and each.p < LEVEL / len(paired) for each in paired):
        verdict = "contradicted"
    return Judged(claim, tuple(paired), verdict)
