"""Verdicts against scipy's own tests, and the rule on made-up differences."""

import pytest
from scipy import stats

from stochastic_depth_lab.experiments.config import Claim, Comparison
from stochastic_depth_lab.report.study.verdicts import Paired, judge

COMPARISON = Comparison("less", "more")
CLAIM = Claim("Less.", (COMPARISON,))


def paired(*differences: float) -> Paired:
    return Paired(COMPARISON, differences)


@pytest.mark.parametrize("differences", [(-8.0, -9.5, -7.5, 0.2), (1.0, 2.0, 4.0), (-0.3, 0.4, 0.1, -0.2, 0.05)])
def test_the_tests_are_those_of_scipy(differences):
    ours, theirs = paired(*differences), stats.ttest_1samp(differences, 0)
    assert ours.p == pytest.approx(theirs.pvalue)
    interval = theirs.confidence_interval(0.95)
    assert (ours.mean - ours.half_width, ours.mean + ours.half_width) == pytest.approx((interval.low, interval.high))
    exact = stats.permutation_test((differences,), sum, permutation_type="samples", n_resamples=10_000)
    assert ours.exact_p == pytest.approx(exact.pvalue)


@pytest.mark.parametrize(
    ("groups", "verdict"),
    [
        ([(-8.0, -9.0, -7.0)], "confirmed"),
        ([(8.0, 9.0, 7.0)], "contradicted"),
        ([(-8.0, 9.0, -7.0)], "undecided"),
        ([(-8.0,)], "undecided"),
        ([(-8.0, -8.0)], "undecided"),
        ([(-8.0, -8.0, -8.0)], "confirmed"),
        ([(0.0, 0.0, 0.0)], "undecided"),
        ([(-8.0, -9.0, -7.0), (-1.0, 2.0, -3.0)], "undecided"),
        ([(-8.0, -9.0, -7.0), (8.0, 9.0, 7.0)], "contradicted"),
        # p = 0.04 alone, not below 0.05 / 2 beside another one.
        ([(1.4, 2.2, 3.1), (-1.0, 2.0, -3.0)], "undecided"),
        ([(1.4, 2.2, 3.1)], "contradicted"),
        ([], "undecided"),
    ],
    ids=str,
)
def test_the_rule(groups, verdict):
    assert judge(CLAIM, [paired(*differences) for differences in groups]).verdict == verdict
