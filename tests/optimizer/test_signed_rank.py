"""Exact bounds of a centre, against every sign pattern there is."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, wilcoxon

from optimizer.statistics.signed_rank import (
    hodges_lehmann,
    largest_rank,
    median_bounds,
    sign_tail,
    signed_rank_bounds,
    signed_rank_tail,
)

LEVELS = (0.0125, 0.0375, 0.05, 0.2)
distinct = st.lists(st.integers(-1000, 1000), min_size=1, max_size=10, unique=True)


def rank_sums(n: int) -> list[int]:
    """Return the signed-rank statistic of every pattern of n signs."""
    return [sum(itertools.compress(range(1, n + 1), signs)) for signs in itertools.product((0, 1), repeat=n)]


@pytest.mark.parametrize("n", range(1, 11))
def test_the_null_distribution_is_that_of_all_sign_patterns(n: int) -> None:
    sums = np.array(rank_sums(n))
    assert signed_rank_tail(n) == pytest.approx([np.mean(sums <= t) for t in range(n * (n + 1) // 2 + 1)], abs=1e-15)
    assert sign_tail(n) == pytest.approx(binom.cdf(range(n + 1), n, 0.5), abs=1e-15)


@pytest.mark.parametrize(
    ("n", "level", "rank"),
    [(4, 0.05, 0), (5, 0.05, 1), (6, 0.0125, 0), (7, 0.0125, 1), (8, 0.0125, 3), (8, 0.05, 6), (16, 0.05, 36)],
)
def test_published_critical_values(n: int, level: float, rank: int) -> None:
    # Tables of the signed-rank test, one-sided: 5 values are the least at 5 %, n = 8: T <= 5, n = 16: T <= 35.
    assert largest_rank(signed_rank_tail(n), level) == rank


@given(distinct, st.sampled_from(LEVELS))
def test_the_lower_bound_is_where_the_exact_test_begins_to_accept(values: list[int], level: float) -> None:
    lower, _ = signed_rank_bounds(values, level, 0.05)
    if math.isinf(lower):
        assert 2.0 ** -len(values) > level
        return
    assert p_of_centre_above(values, lower - 0.25) <= level  # means of two whole numbers are halves apart
    assert p_of_centre_above(values, lower + 0.25) > level


def p_of_centre_above(values: Sequence[float], centre: float) -> float:
    """Return P(statistic >= observed) were `centre` the centre, by enumeration."""
    moved = np.array(values) - centre
    ranks = np.argsort(np.argsort(np.abs(moved))) + 1
    return float(np.mean(np.array(rank_sums(len(values))) >= ranks[moved > 0].sum()))


@given(distinct)
def test_upper_and_lower_bound_mirror_each_other(values: list[int]) -> None:
    for bounds in (signed_rank_bounds, median_bounds):
        lower, upper = bounds(values, 0.0125, 0.05)
        assert bounds([-value for value in values], 0.05, 0.0125) == (-upper, -lower)


@given(distinct)
def test_the_estimate_lies_between_the_bounds(values: list[int]) -> None:
    lower, upper = signed_rank_bounds(values, 0.05, 0.05)
    assert lower <= hodges_lehmann(values) <= upper
    lower, upper = median_bounds(values, 0.05, 0.05)
    assert lower <= np.median(values) <= upper


@given(st.lists(st.integers(-1000, 1000).filter(bool), min_size=8, max_size=16, unique_by=abs))
def test_a_bound_beyond_zero_is_a_significant_signed_rank_test(values: list[int]) -> None:
    # scipy's exact method knows neither ties nor zeros
    lower, _ = signed_rank_bounds(values, 0.05, 0.05)
    assert (lower > 0) == (wilcoxon(values, alternative="greater", method="exact").pvalue <= 0.05)


def test_hodges_lehmann_by_hand() -> None:
    # 1, 2, 6 and the means 1.5, 3.5, 4: the middle two are 2 and 3.5.
    assert hodges_lehmann([1, 2, 6]) == 2.75


def test_median_bounds_by_hand() -> None:
    # 8 values: P(at most 1 above the median) = 9/256 = 3.5 %, so the second of each end at 5 %; the first at 1.25 %.
    values = [5, 1, 8, 2, 7, 3, 6, 4]
    assert median_bounds(values, 0.05, 0.05) == (2, 7)
    assert median_bounds(values, 0.0125, 0.05) == (1, 7)
    assert median_bounds(values, 0.001, 0.001) == (-math.inf, math.inf)


def test_too_few_values_bound_nothing() -> None:
    assert signed_rank_bounds([1, 2, 3, 4], 0.05, 0.05) == (-math.inf, math.inf)
    assert signed_rank_bounds([1, 2, 3, 4, 5], 0.05, 0.01) == (1, math.inf)
