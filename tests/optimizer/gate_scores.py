"""Scores of made-up samples, for the gate's tests."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from optimizer.gate import Budget, Scores

POINT = Budget("accuracy", 0.01)
TWO_POINTS = Budget("accuracy", 0.02)
PERCENT = Budget("perplexity", 0.01)


def scores(metric: str, point: float, groups: tuple[str, ...] | None = None, **values: ArrayLike) -> Scores:
    arrays = {name: np.asarray(value) for name, value in values.items()}
    n = len(next(iter(arrays.values())))
    return Scores(metric, "sha", groups or tuple(map(str, range(n))), arrays, point)


def right_and_wrong(
    n: int, lost: int, gained: int, groups: tuple[str, ...] | None = None, wrong: int = 30
) -> tuple[Scores, Scores]:
    """A source wrong on the last `wrong` items; the candidate loses the first items and gains the last."""
    source = np.arange(n) < n - wrong
    candidate = source.copy()
    candidate[:lost] = False
    candidate[n - gained :] = True
    return (
        scores("accuracy", float(source.mean()), groups, correct=source),
        scores("accuracy", float(candidate.mean()), groups, correct=candidate),
    )


def perplexities(
    increase: ArrayLike, count: int = 200, tokens: ArrayLike = 300, groups: tuple[str, ...] | None = None
) -> tuple[Scores, Scores]:
    """Documents whose mean negative log likelihood rises by `increase` nats."""
    tokens = np.broadcast_to(np.asarray(tokens), (count,))
    nll = tokens * (2 + 0.1 * np.cos(np.arange(count)))
    after = nll + tokens * np.asarray(increase)
    return (
        scores("perplexity", float(np.exp(nll.sum() / tokens.sum())), groups, nll=nll, tokens=tokens),
        scores("perplexity", float(np.exp(after.sum() / tokens.sum())), groups, nll=after, tokens=tokens),
    )


def wiggle(count: int, deviation: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Symmetric values of mean 0 and the given standard deviation."""
    values = np.sin(2.4 * np.arange(count))
    centred = values - values.mean()
    return np.asarray(deviation * centred / centred.std())


def flips(per_document: ArrayLike, tokens: int = 200, groups: tuple[str, ...] | None = None) -> tuple[Scores, Scores]:
    changed = np.asarray(per_document)
    positions = np.full(len(changed), tokens)
    return (
        scores("flips", 0.0, groups, flips=np.zeros(len(changed), int), tokens=positions),
        scores("flips", float(changed.sum() / positions.sum()), groups, flips=changed, tokens=positions),
    )


def labelled(n: int, classes: int, spoilt: int) -> tuple[Scores, Scores]:
    """A perfect source, and a candidate wrong on `spoilt` items spread over the classes."""
    reference = np.arange(n) % classes
    answer = reference.copy()
    items = np.linspace(0, n - 1, spoilt).astype(int)
    answer[items] = (reference[items] + 1) % classes
    return (
        scores("f1", 1.0, reference=reference, answer=reference),
        scores("f1", 1 - spoilt / n, reference=reference, answer=answer),
    )
