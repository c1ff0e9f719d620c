"""Bounds of the macro-F1 lost: a score of the whole record, not a mean over items.

The labels averaged over are those of the references, fixed before any resampling; averaging over the labels of a
resample would change the denominator inside the bootstrap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .bca import bca_interval
from .clusters import Array, sum_by_group
from .rate import clustered_rate

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What two models answered to the same items, as label indices [n]; items of one group hang together."""

    reference: Labels
    before: Labels
    after: Labels
    groups: tuple[str, ...]


def macro_f1(reference: Labels, answer: Labels) -> float:
    """Return the mean F1 over the labels seen in `reference`; an answer outside them is simply wrong."""
    return float(_scores(*_class_counts(reference, answer)).mean())


def macro_f1_interval(answers: Answers, alpha: float, fail_alpha: float) -> tuple[float, float]:
    """Bound macro-F1(before) - macro-F1(after) over groups: (lower at `fail_alpha`, upper at `alpha`).

    Source: Efron 1987, JASA 82:171-185 (BCa).
    """
    columns = _columns(answers)
    return bca_interval(lambda weights: _loss(weights @ columns), len(columns), alpha, fail_alpha)


def few_changes_interval(answers: Answers, alpha: float, fail_alpha: float) -> tuple[float, float]:
    """Bound the macro-F1 lost when too few answers changed for a bootstrap: (lower, upper).

    As many answers as the upper Clopper-Pearson bound of the share changed are taken to change in the worst way. For
    accuracy this would be 1 - alpha^(1/n) at zero changes. The lower bound exchanges the models.
    """
    exchanged = replace(answers, before=answers.after, after=answers.before)
    return -_worst_loss(exchanged, fail_alpha), _worst_loss(answers, alpha)


def _worst_loss(answers: Answers, alpha: float) -> float:
    changed = sum_by_group((answers.before != answers.after).astype(np.float64), answers.groups)
    sizes = sum_by_group(np.ones(len(answers.before)), answers.groups)
    most = len(answers.before) * clustered_rate(changed, sizes, alpha, alpha)[1]
    return min(1.0, most * worst_loss_per_change(answers.reference, answers.before, most))


def worst_loss_per_change(reference: Labels, answer: Labels, changes: float) -> float:
    """Return the most macro-F1 that one of `changes` changed answers can cost, on average over them.

    A changed answer can take a hit from one class and be a false alarm in another. The k-th lost hit of a class costs
    more than the first, so each class is charged its mean cost of `changes` lost hits; a false alarm costs most as the
    first one.
    """
    references, answers, hits = _class_counts(reference, answer)
    lost = np.minimum(math.ceil(changes), hits)
    f1 = _scores(references, answers, hits)
    per_hit = (f1 - 2 * (hits - lost) / (references + answers - lost)) / np.maximum(lost, 1)
    per_alarm = f1 - _scores(references, answers + 1, hits)
    return float(per_hit.max() + per_alarm.max()) / len(references)


def _class_counts(reference: Labels, answer: Labels) -> tuple[Array, Array, Array]:
    """Count references, answers and hits of every label seen in the references, each [C]."""
    labels = np.unique(reference)
    one_group = np.zeros(len(reference), np.int64)
    counts = _count(labels, reference, one_group), _count(labels, answer, one_group)
    hits = _count(labels, np.where(reference == answer, reference, labels[0] - 1), one_group)
    return counts[0][0], counts[1][0], hits[0]


def _count(labels: Labels, values: Labels, group: Labels) -> Array:
    """Count the values of each group by label [G, C]; a value that is no label counts nowhere."""
    where = np.minimum(np.searchsorted(labels, values), len(labels) - 1)
    is_label = labels[where] == values
    shape = int(group.max()) + 1, len(labels)
    flat = np.bincount(group[is_label] * len(labels) + where[is_label], minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.float64)


def _columns(answers: Answers) -> Array:
    """Tally each group: references, answers and hits before, answers and hits after, by label [G, 5 C]."""
    labels = np.unique(answers.reference)
    _, group = np.unique(np.asarray(answers.groups), return_inverse=True)
    tallied = [answers.reference]
    for given in (answers.before, answers.after):
        tallied += [given, np.where(given == answers.reference, given, labels[0] - 1)]
    return np.concatenate([_count(labels, values, group) for values in tallied], axis=1)


def _loss(totals: Array) -> Array:
    """Return macro-F1 before minus after from tallies [..., 5 C]."""
    references, answers, hits, answers_after, hits_after = np.split(totals, 5, axis=-1)
    lost: Array = np.mean(_scores(references, answers, hits) - _scores(references, answers_after, hits_after), axis=-1)
    return lost


def _scores(references: Array, answers: Array, hits: Array) -> Array:
    """Return F1 per class, 0 for a class that a resample holds no trace of."""
    return 2 * hits / np.maximum(references + answers, 1)
