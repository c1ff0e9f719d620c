"""Bounds of the macro-F1 lost: a score of the whole record, not a mean over items.

The labels averaged over are those of the references, fixed before any resampling; averaging over the labels of a
resample would change the denominator inside the bootstrap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .clusters import Array, resampled_sums, resamples_for, sum_by_group
from .rate import clustered_rate

Labels = NDArray[np.int64]

_JACKKNIFE_BLOCKS = 100


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

    Source: Efron 1987, JASA 82:171-185 (BCa). We differ: the acceleration comes from a grouped jackknife of 100 blocks.
    """
    columns = _columns(answers)
    resamples = resamples_for(min(alpha, fail_alpha))
    draws = np.sort(_loss(resampled_sums(columns, resamples)))
    loss = float(_loss(columns.sum(axis=0)))
    bias = _normal_rank(draws, loss)
    acceleration = _acceleration(columns)
    lower = _corrected_quantile(draws, bias, acceleration, fail_alpha)
    return lower, _corrected_quantile(draws, bias, acceleration, 1 - alpha)


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


def _acceleration(columns: Array) -> float:
    """Return the skewness of the loss's influence, over 6, from leaving out one block of groups at a time."""
    shuffled = np.random.default_rng(0).permutation(len(columns))  # items may come in an order of their own
    blocks = shuffled % min(_JACKKNIFE_BLOCKS, len(columns))
    left_out = np.zeros((int(blocks.max()) + 1, columns.shape[1]))
    np.add.at(left_out, blocks, columns)
    losses = _loss(columns.sum(axis=0) - left_out)
    influence = losses.mean() - losses
    spread = float(np.sum(influence**2))
    return float(np.sum(influence**3)) / (6 * spread**1.5) if spread > 0 else 0.0


def _normal_rank(draws: Array, loss: float) -> float:
    """Return the normal quantile of the share of draws below the loss, ties counted half."""
    from scipy.special import ndtri

    share = (np.searchsorted(draws, loss, "left") + np.searchsorted(draws, loss, "right")) / (2 * len(draws))
    return float(ndtri(np.clip(share, 1 / (len(draws) + 1), len(draws) / (len(draws) + 1))))


def _corrected_quantile(draws: Array, bias: float, acceleration: float, level: float) -> float:
    """Return the draw at `level`, corrected for bias and acceleration (Efron 1987)."""
    from scipy.special import ndtr, ndtri

    shifted = bias + float(ndtri(level))
    stretch = 1 - acceleration * shifted
    if stretch <= 0:  # the correction has a pole: take the extreme draw of that side
        return float(draws[0 if level < 0.5 else -1])
    rank = float(ndtr(bias + shifted / stretch)) * (len(draws) + 1)
    outward = math.floor(rank) if level < 0.5 else math.ceil(rank)
    return float(draws[min(max(outward, 1), len(draws)) - 1])
