"""Bounds of what is lost by any score of answers and references, of which nothing is known but its value.

Known gap: with few changed answers the bound tries each class's right answers turned into the rarest and the most
frequent other answer. A score that some other change hurts more would be bounded too narrowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .bca import bca_interval
from .clusters import Array, sum_by_group
from .rate import clustered_rate

Labels: TypeAlias = NDArray[np.int64]
Score: TypeAlias = Callable[[Labels, Labels], float]
"""Takes answers and references, both [n]."""


@dataclass(frozen=True)
class Records:
    """What two models answered to the same items, as label indices [n], and what scores them."""

    reference: Labels
    before: Labels
    after: Labels
    groups: tuple[str, ...]
    score: Score

    def direction(self) -> int:
        """Return 1 where more is better, -1 where less is, 0 where right answers do not tell.

        Nothing is better than right answers: where they score more than both models, more is better. Where both models
        are right all the time, they are compared with answers that are all wrong.
        """
        best = self.score(self.reference, self.reference)
        for worse in ((self.before, self.after), (self._all_wrong(),)):
            signs = {int(np.sign(best - self.score(answers, self.reference))) for answers in worse} - {0}
            if signs:
                return signs.pop() if len(signs) == 1 else 0
        return 0

    def _all_wrong(self) -> Labels:
        labels, index = np.unique(self.reference, return_inverse=True)
        return np.asarray(labels[(index + 1) % len(labels)], np.int64)


def interval(records: Records, alpha: float, fail_alpha: float) -> tuple[float, float]:
    """Bound the loss over groups: (lower at `fail_alpha`, upper at `alpha`); nan where a resample scores no number.

    Cost: two scores for each of at least 2,099 resamples.

    Source: Efron 1987, JASA 82:171-185 (BCa).
    """
    _, group = np.unique(np.asarray(records.groups), return_inverse=True)
    direction, each = records.direction(), np.arange(len(records.reference))

    def lost(weights: Array) -> float:
        drawn = np.repeat(each, weights[group].astype(np.int64))
        scores = [
            records.score(answers[drawn], records.reference[drawn]) for answers in (records.before, records.after)
        ]
        return direction * (scores[0] - scores[1])

    def loss(weights: Array) -> Array:
        return np.array([lost(row) for row in weights])

    return bca_interval(loss, int(group.max()) + 1, alpha, fail_alpha)


def few_changes_interval(records: Records, alpha: float, fail_alpha: float) -> tuple[float, float]:
    """Bound the loss when too few answers changed for a bootstrap: (lower, upper).

    As many answers as the upper Clopper-Pearson bound of the share changed are taken to change in the worst way tried.
    The lower bound exchanges the models.
    """
    exchanged = replace(records, before=records.after, after=records.before)
    return -_worst_loss(exchanged, fail_alpha), _worst_loss(records, alpha)


def _worst_loss(records: Records, alpha: float) -> float:
    changed = sum_by_group((records.before != records.after).astype(np.float64), records.groups)
    sizes = sum_by_group(np.ones(len(records.before)), records.groups)
    most = math.ceil(len(records.before) * clustered_rate(changed, sizes, alpha, alpha)[1])
    return most * max((_cost(records, *change, most) for change in _worst_changes(records)), default=math.inf)


def _worst_changes(records: Records) -> list[tuple[int, int]]:
    """Return pairs (right label, answer instead) to try: of every label the rarest and the most frequent other one."""
    labels = np.unique(np.concatenate([records.reference, records.before, records.after]))
    counts = [np.count_nonzero(records.before == label) for label in labels]
    ordered = labels[np.argsort(counts, kind="stable")].tolist()
    others = {label: [other for other in ordered if other != label] for label in ordered}
    return [(label, other) for label in ordered for other in dict.fromkeys(others[label][:1] + others[label][-1:])]


def _cost(records: Records, label: int, other: int, most: int) -> float:
    """Return what one of up to `most` right answers costs that turn into another, on average or the first one alone."""
    right = np.flatnonzero((records.reference == label) & (records.before == label))[:most]
    costs = [0.0]
    for turned in (right[:1], right):
        answers = records.before.copy()
        answers[turned] = other
        lost = records.score(records.before, records.reference) - records.score(answers, records.reference)
        costs.append(records.direction() * lost / max(1, len(turned)))
    return max(costs)
