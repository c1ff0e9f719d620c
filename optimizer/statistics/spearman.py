"""Bounds of the rank correlation lost: how much less well the candidate orders the items than the source does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .bca import bca_interval
from .clusters import Array, sum_by_group
from .rate import clustered_rate


@dataclass(frozen=True)
class Orders:
    """A reference and what two models gave to the same items, as numbers [n]; items of one group hang together."""

    reference: Array
    before: Array
    after: Array
    groups: tuple[str, ...]


def spearman(reference: Array, answer: Array) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; nan where either is constant or not finite."""
    if not (np.isfinite(reference).all() and np.isfinite(answer).all()):
        return math.nan
    weights = np.ones((1, len(reference)))
    return float(_correlation(weights, _Ranked(reference).ranks(weights), _Ranked(answer).ranks(weights))[0])


def spearman_interval(orders: Orders, alpha: float, fail_alpha: float) -> tuple[float, float]:
    """Bound spearman(before) - spearman(after) over groups: (lower at `fail_alpha`, upper at `alpha`).

    Every resample is ranked anew, by a cumulative sum of its weights in the order that was sorted once.

    Source: Efron 1987, JASA 82:171-185 (BCa).
    """
    _, group = np.unique(np.asarray(orders.groups), return_inverse=True)
    reference, before, after = (_Ranked(values) for values in (orders.reference, orders.before, orders.after))

    def loss(weights: Array) -> Array:
        per_item = weights[:, group]
        ranks = reference.ranks(per_item)
        lost = _correlation(per_item, ranks, before.ranks(per_item))
        return lost - _correlation(per_item, ranks, after.ranks(per_item))

    return bca_interval(loss, int(group.max()) + 1, alpha, fail_alpha)


def changed_places(before: Array, after: Array) -> NDArray[np.bool_]:
    """Tell which items stand at another place in the order [n]."""
    weights = np.ones((1, len(before)))
    different: NDArray[np.bool_] = _Ranked(before).ranks(weights)[0] != _Ranked(after).ranks(weights)[0]
    return different


def few_changes_interval(orders: Orders, alpha: float, fail_alpha: float) -> tuple[float, float]:
    """Bound the correlation lost when too few items changed places for a bootstrap: (lower, upper).

    As many items as the upper Clopper-Pearson bound of the share changed are taken to move as far as an item can. The
    lower bound exchanges the models.
    """
    exchanged = replace(orders, before=orders.after, after=orders.before)
    return -_worst_loss(exchanged, fail_alpha), _worst_loss(orders, alpha)


def _worst_loss(orders: Orders, alpha: float) -> float:
    changed = sum_by_group(changed_places(orders.before, orders.after).astype(np.float64), orders.groups)
    sizes = sum_by_group(np.ones(len(orders.before)), orders.groups)
    most = len(orders.before) * clustered_rate(changed, sizes, alpha, alpha)[1]
    return min(2.0, most * worst_loss_per_move(orders.reference, orders.before))


def worst_loss_per_move(reference: Array, answer: Array) -> float:
    """Return a bound of the rank correlation that one item costs by moving to any other place.

    The correlation is sum(a b) over the lengths of a and b, the centred ranks. A move changes the item's own b by at
    most n - 1 and that of each other item by at most 1. Answers are taken to have no ties, as similarities do.
    """
    n = len(reference)
    weights, middle = np.ones((1, n)), (n + 1) / 2
    a, b = (_Ranked(values).ranks(weights)[0] - middle for values in (reference, answer))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    change = (n - 1) * float(np.abs(a).max()) + float(np.abs(a).sum())
    return change / length if length > 0 else math.nan


class _Ranked:
    """Numbers that are ranked again and again under other weights; sorted once."""

    def __init__(self, values: Array) -> None:
        distinct, self._place = np.unique(values, return_inverse=True)
        self._order = np.argsort(self._place, kind="stable")
        self._starts = np.searchsorted(self._place[self._order], np.arange(len(distinct)))

    def ranks(self, weights: Array) -> Array:
        """Return the mid-rank of each item [R, n] where item i is there `weights[:, i]` times."""
        totals = np.add.reduceat(weights[:, self._order], self._starts, axis=1)  # [R, distinct values]
        middles = np.cumsum(totals, axis=1) - (totals - 1) / 2
        return np.asarray(middles[:, self._place], np.float64)


def _correlation(weights: Array, first: Array, second: Array) -> Array:
    """Return Pearson's correlation of each row [R] of numbers [R, n] with weights [R, n]; nan where one is constant."""
    middle = (weights.sum(axis=1, keepdims=True) + 1) / 2  # the mean of ranks
    first, second = first - middle, second - middle
    product = np.sum(weights * first * second, axis=1)
    spread = np.sqrt(np.sum(weights * first**2, axis=1) * np.sum(weights * second**2, axis=1))
    return np.asarray(np.divide(product, spread, out=np.full(len(product), np.nan), where=spread > 0), np.float64)
