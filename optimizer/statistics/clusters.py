"""Items of one document, passage or template are not independent: whole groups are counted and resampled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEWEST_GROUPS = 30
FEW_CHANGED_GROUPS = 10
_WEIGHTS_AT_ONCE = 125_000  # 1 MB: they stay in the processor's cache


def sum_by_group(values: Array, groups: Sequence[str]) -> Array:
    """Sum `values` [n] within groups: [G], groups in sorted order."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.asarray(np.bincount(index, weights=values), np.float64)


def effective_groups(sizes: Array) -> float:
    """Count the equal groups that would carry as much information as groups of these sizes (items or tokens).

    Source: Kish 1965, Survey Sampling: (sum L)^2 / sum L^2.
    """
    return float(sizes.sum() ** 2 / np.sum(sizes**2))


def design_effect(sums: Array, sizes: Array, unit_variance: float) -> float:
    """Return how many times larger the variance of sum(sums) / sum(sizes) is than with independent units, at least 1.

    With fewer than 10 groups that changed, the variance between groups cannot be estimated and each group counts as
    one unit: the effect of perfect correlation within groups, sum L^2 / sum L.

    Args:
        sums: [G] summed change of a group.
        sizes: [G] units (items, tokens) of a group.
        unit_variance: variance of one unit's change.

    Source: linearised ratio variance, Cochran 1977, Sampling Techniques; Kish 1965.
    """
    total, count = sizes.sum(), len(sizes)
    correlated = float(np.sum(sizes**2) / total)
    if count < 2 or unit_variance <= 0:
        return correlated
    residuals = sums - sums.sum() / total * sizes
    variance = count / (count - 1) * np.sum(residuals**2) / total**2
    estimated = max(1.0, float(variance / (unit_variance / total)))
    return estimated if np.count_nonzero(sums) >= FEW_CHANGED_GROUPS else max(estimated, correlated)


def resamples_for(alpha: float) -> int:
    """Return how many bootstrap resamples a bound at level `alpha` needs: 20 in the tail, never fewer than 1999."""
    return max(1999, math.ceil(20 / alpha))


def resampled_sums(columns: Array, resamples: int, seed: int = 0) -> Array:
    """Draw groups with replacement and sum: `columns` [G, C] -> [resamples, C].

    Source: Efron 1979, Annals of Statistics 7:1-26.
    """
    return np.concatenate([weights @ columns for weights in resampled_weights(len(columns), resamples, seed)])


def resampled_weights(count: int, resamples: int, seed: int = 0) -> Iterator[Array]:
    """Yield how often each of `count` groups is drawn, some resamples at a time: [rows, count]."""
    random = np.random.default_rng(seed)
    rows = max(1, _WEIGHTS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        taken = min(rows, resamples - start)
        drawn = random.integers(count, size=(taken, count)) + count * np.arange(taken)[:, None]
        yield np.bincount(drawn.ravel(), minlength=taken * count).reshape(taken, count).astype(np.float64)
