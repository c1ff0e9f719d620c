"""What a model scored, item by item, and whether two such scores can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAYS = {
    "perplexity": ("nll", "tokens"),
    "nats_per_byte": ("nll", "bytes"),
    "accuracy": ("correct",),
    "f1": ("reference", "answer"),
    "spearman": ("reference", "answer"),
    "flips": ("flips", "tokens"),
    "kl": ("kl", "tokens"),
}
RECORDS = ("reference", "answer")  # what any other score is made of, where something scores them
AGAINST_SOURCE = ("flips", "kl")  # already a comparison: only the candidate has per-item values
_SAME_IN_BOTH = ("tokens", "bytes", "reference")


@dataclass(frozen=True)
class Scores:
    """What one model scored on one set of items, item by item.

    Attributes:
        metric: what kind of score it is: "perplexity", "nats_per_byte", "accuracy" (share of right items, whatever is
            right), "f1" (macro), "spearman", "flips" or "kl". Any other is reported, and a gate can judge it only with
            what scores its `reference` and `answer` (label indices).
        items: SHA-256 over the items; only scores of the same items can be compared.
        groups: document, passage or template of each item; unique strings when the items stand alone.
        values: per-item arrays [n]. perplexity: `nll` (summed nats), `tokens` (scored); nats_per_byte: `nll`, `bytes`
            (of the scored text in UTF-8); accuracy: `correct` (bool), of generated answers `truncated`
            (bool); f1: `reference`, `answer` (label indices);
            spearman: `reference`, `answer` (similarities); flips: `flips` (positions whose top-1 differs from the
            source's), `tokens` (positions); kl: `kl` (summed nats of KL(source || candidate)), `tokens`.
        point: the score as a person reads it.
    """

    metric: str
    items: str
    groups: tuple[str, ...]
    values: Mapping[str, NDArray[Any]]
    point: float


def arrays_of(metric: str) -> tuple[str, ...]:
    """Return the names of the arrays that a gate needs of a metric."""
    return ARRAYS.get(metric, RECORDS)


def check(source: Scores, candidate: Scores, metric: str) -> None:
    """Raise ValueError unless both score the same items by `metric`."""
    if not source.metric == candidate.metric == metric:
        got = f"source {source.metric!r}, candidate {candidate.metric!r}, budget {metric!r}"
        raise ValueError(f"gate: metrics differ, got {got}; score both models by the budget's metric")
    where = f"gate, {metric}"
    if len(source.groups) != len(candidate.groups):
        got = f"{len(candidate.groups)} items from the candidate, expected {len(source.groups)} as from the source"
        raise ValueError(f"{where}: items are missing or added, got {got}")
    if source.items != candidate.items:
        got = f"items {candidate.items[:12]} from the candidate, expected {source.items[:12]}"
        raise ValueError(f"{where}: the models answered different items, got {got}; score both on one set")
    if source.groups != candidate.groups:
        raise ValueError(f"{where}: the groups of the items differ between source and candidate")
    if not source.groups:
        raise ValueError(f"{where}: no items, expected at least one")
    _check_arrays(where, "candidate", candidate)
    if metric not in AGAINST_SOURCE:
        _check_arrays(where, "source", source)
        _check_same(where, source, candidate)


def _check_arrays(where: str, side: str, scores: Scores) -> None:
    expected = (len(scores.groups),)
    for name in arrays_of(scores.metric):
        if name not in scores.values:
            raise ValueError(f"{where}: the {side} has no {name!r}, got {', '.join(scores.values) or 'nothing'}")
        shape = np.shape(scores.values[name])
        if shape != expected:
            raise ValueError(f"{where}: {name!r} of the {side} has shape {shape}, expected {expected}: one per item")
    for name in {"tokens", "bytes"}.intersection(arrays_of(scores.metric)):
        counts = np.asarray(scores.values[name])
        if np.any(counts < 0) or not np.any(counts > 0):
            raise ValueError(f"{where}: {name!r} of the {side} must be counts with at least one above 0")


def _check_same(where: str, source: Scores, candidate: Scores) -> None:
    for name in _SAME_IN_BOTH:
        if name in arrays_of(source.metric):
            differs = np.flatnonzero(np.asarray(source.values[name]) != np.asarray(candidate.values[name]))
            if len(differs):
                raise ValueError(f"{where}: {name!r} differs between source and candidate, first at item {differs[0]}")


def noise(first: Scores, second: Scores) -> float:
    """Return the share of items that a model, asked twice, does not score alike: 0 unless something is random.

    Rounding, a millionth of the value or of one, is no difference; nan is like nan. Of flips and kl the second is
    against the first.

    Raises:
        ValueError: the scores are not of the same items or metric.
    """
    check(first, second, first.metric)
    differs = np.zeros(len(first.groups), bool)
    for name in arrays_of(first.metric):
        if name in first.values:
            one, other = (np.asarray(side.values[name]) for side in (first, second))
            rounding = 1e-6 if one.dtype.kind == "f" else 0.0
            differs |= ~np.isclose(one, other, rtol=rounding, atol=rounding, equal_nan=True)
    return float(differs.mean())


def not_finite(side: str, scores: Scores) -> str:
    """Name the items whose values are nan or infinite; empty when there are none."""
    for name in arrays_of(scores.metric):
        if name not in scores.values:
            continue
        bad = np.flatnonzero(~np.isfinite(np.asarray(scores.values[name], np.float64)))
        if len(bad):
            listed = ", ".join(str(item) for item in bad[:5]) + (", ..." if len(bad) > 5 else "")
            return f"the {side}'s {name} is not finite in {len(bad)} of {len(scores.groups)} items: {listed}"
    return "" if math.isfinite(scores.point) else f"the {side}'s {scores.metric} is {scores.point}"
