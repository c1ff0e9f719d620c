"""Bounds of a centre from a handful of numbers: few restarts, no normal approximation, no variance to estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hodges_lehmann(values: Sequence[float]) -> float:
    """Return the median of all means of two values, a value with itself included.

    Source: Hodges & Lehmann 1963, Annals of Mathematical Statistics 34:598-611.
    """
    return float(np.median(walsh_averages(values)))


def signed_rank_bounds(values: Sequence[float], lower_alpha: float, upper_alpha: float) -> tuple[float, float]:
    """Bound the centre of a symmetric distribution: (lower at `lower_alpha`, upper at `upper_alpha`), both exact.

    The k-th smallest and the k-th largest Walsh average, k as large as the null distribution of Wilcoxon's signed-rank
    statistic allows; infinite where the values are too few for the level, whatever they are.

    Source: Tukey 1949 and Walsh 1949, as in Hollander, Wolfe & Chicken 2014, Nonparametric Statistical Methods, 3.3.
    """
    averages = np.sort(walsh_averages(values))
    low, high = (largest_rank(signed_rank_tail(len(values)), level) for level in (lower_alpha, upper_alpha))
    return _order_statistics(averages, low, high)


def median_bounds(values: Sequence[float], lower_alpha: float, upper_alpha: float) -> tuple[float, float]:
    """Bound the median of any distribution by order statistics: (lower at `lower_alpha`, upper at `upper_alpha`).

    Exact for continuous values; infinite where they are too few for the level.

    Source: the sign test, as in Hollander, Wolfe & Chicken 2014, Nonparametric Statistical Methods, 3.6.
    """
    low, high = (largest_rank(sign_tail(len(values)), level) for level in (lower_alpha, upper_alpha))
    return _order_statistics(np.sort(np.asarray(values, np.float64)), low, high)


def walsh_averages(values: Sequence[float]) -> Array:
    """Return the means [n (n + 1) / 2] of every two values, each with itself included."""
    array = np.asarray(values, np.float64)
    first, second = np.triu_indices(len(array))
    averages: Array = (array[first] + array[second]) / 2
    return averages


def signed_rank_tail(n: int) -> Array:
    """Return P(T <= t) of the signed-rank statistic of n symmetric values around 0, for t = 0 to n (n + 1) / 2.

    T sums the ranks 1 to n whose sign is positive, each with probability one half: a product of n polynomials.
    """
    counts = np.ones(1)
    for rank in range(1, n + 1):
        counts = np.convolve(counts, np.bincount([0, rank], minlength=rank + 1))
    return np.cumsum(counts) / 2.0**n


def sign_tail(n: int) -> Array:
    """Return P(S <= s) of the number of positive ones among n values of median 0, for s = 0 to n."""
    return np.cumsum([math.comb(n, s) for s in range(n + 1)]) / 2.0**n


def largest_rank(tail: Array, level: float) -> int:
    """Return the largest k with P(statistic <= k - 1) <= level: which order statistic is a bound; 0 for none."""
    return int(np.searchsorted(tail, level, side="right"))


def _order_statistics(ordered: Array, low: int, high: int) -> tuple[float, float]:
    """Return the `low`-th smallest and the `high`-th largest value, counted from 1; infinite for 0."""
    lower = float(ordered[low - 1]) if low else -math.inf
    upper = float(ordered[-high]) if high else math.inf
    return lower, upper
