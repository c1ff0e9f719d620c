"""Samples that gate_error_rates.py judges, with a loss that is known: by construction, or from a large population."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.gate import Scores
from optimizer.statistics.macro_f1 import macro_f1
from optimizer.statistics.ratio import document_deviation
from optimizer.statistics.spearman import spearman

Array = NDArray[Any]
Pair = tuple[Scores, Scores]

POPULATION = 2_000_000
TOKENS_CUT = 1024
SPREAD = 1.5
"""Deviation of the logarithm of a document's length."""
EFFECT_SD, TOKEN_SD = 0.0346, 0.4


def right_and_wrong(n: int, lost: int, gained: int) -> Pair:
    """Return scores with so many losses and gains."""
    source = np.arange(n) < n - gained
    candidate = np.arange(n) >= lost
    return _pair("accuracy", {"correct": source}, {"correct": candidate})


def grouped_losses(
    discordance: float, loss: float, size: int, correlation: float, n: int, seed: int
) -> Iterator[tuple[Array, tuple[str, ...]]]:
    """Yield losses of 1, -1 or 0 in groups of `size`: each item copies its group's with a chance."""
    random = np.random.default_rng(seed)
    shares = [(discordance + loss) / 2, (discordance - loss) / 2, 1 - discordance]
    groups = tuple(str(item // size) for item in range(n))
    while True:
        own = random.choice([1.0, -1.0, 0.0], size=n, p=shares)
        shared = np.repeat(random.choice([1.0, -1.0, 0.0], size=n // size, p=shares), size)
        yield np.where(random.random(n) < math.sqrt(correlation), shared, own), groups


def perplexities(damage: str, documents: int, loss: float, seed: int) -> Iterator[Pair]:
    """Yield documents cut at 1,024 tokens that lose `loss` nats a token on average.

    Lengths are lognormal around 600. A document's own effect has a standard deviation of 0.0346 nats, a token's 0.4, as
    measured with 4-bit weights; `damage` says how documents share the loss.
    """
    random = np.random.default_rng(seed)
    while True:
        tokens = np.clip(np.round(600 * np.exp(SPREAD * random.normal(size=documents))), 2, TOKENS_CUT)
        sums = tokens * (loss + _effects(damage, documents, loss, random))
        sums += np.sqrt(tokens) * TOKEN_SD * random.normal(size=documents)
        before = 2.0 * tokens
        yield _pair("perplexity", {"nll": before, "tokens": tokens}, {"nll": before + sums, "tokens": tokens})


def _effects(damage: str, count: int, loss: float, random: np.random.Generator) -> Array:
    """Return effects of mean 0: symmetric, of skewness 2, of skewness 6, or 5 % of the documents lose everything."""
    if damage == "symmetric":
        return EFFECT_SD * random.normal(size=count)
    if damage == "skewness 2":
        return EFFECT_SD * (random.exponential(size=count) - 1)
    if damage == "skewness 6":
        drawn = np.exp(random.normal(size=count))
        return EFFECT_SD * (drawn - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
    return loss * ((random.random(count) < 0.05) / 0.05 - 1)


def perplexity_deviation(damage: str, loss: float) -> float:
    """Return the deviation of documents as a forecast wants it, from a large sample."""
    source, candidate = next(perplexities(damage, 200_000, loss, seed=99))
    sums = candidate.values["nll"] - source.values["nll"]
    return document_deviation(sums, candidate.values["tokens"])


def flips(rate: float, correlation: float, documents: int, seed: int) -> Iterator[Pair]:
    """Yield documents of 50 to 400 positions whose answers change with a rate that varies between documents."""
    random = np.random.default_rng(seed)
    strength = 1 / correlation - 1
    while True:
        tokens = random.integers(50, 401, size=documents)
        changed = random.binomial(tokens, random.beta(rate * strength, (1 - rate) * strength, size=documents))
        yield _pair("flips", {"flips": 0 * changed, "tokens": tokens}, {"flips": changed, "tokens": tokens})


def labelled(classes: int, zipf: bool, lost: float, gained: float, n: int, seed: int) -> Iterator[Pair]:
    """Yield labels and two models' answers; the first is right in 92 % of the items."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, classes + 1) if zipf else np.ones(classes)
    while True:
        reference = random.choice(classes, size=n, p=weights / weights.sum())
        wrong = (reference + random.integers(1, classes, size=n)) % classes
        is_right, chance = random.random(n) < 0.92, random.random(n)
        becomes_right = np.where(is_right, chance >= lost / 0.92, chance < gained / 0.08)
        before, after = np.where(is_right, reference, wrong), np.where(becomes_right, reference, wrong)
        yield _pair("f1", {"reference": reference, "answer": before}, {"reference": reference, "answer": after})


def f1_loss(classes: int, zipf: bool, lost: float, gained: float) -> float:
    """Return the macro-F1 lost in a population."""
    source, candidate = next(labelled(classes, zipf, lost, gained, POPULATION, seed=99))
    reference = source.values["reference"]
    return macro_f1(reference, source.values["answer"]) - macro_f1(reference, candidate.values["answer"])


def orders(concentrated: bool, n: int, seed: int) -> Iterator[Pair]:
    """Yield similarities with a rank correlation of about 0.85; damage in all items, or in 5 % of them."""
    random = np.random.default_rng(seed)
    while True:
        reference = random.normal(size=n)
        before = reference + 0.6 * random.normal(size=n)
        spoilt = random.random(n) < (0.05 if concentrated else 1)
        after = before + np.where(spoilt, (1.2 if concentrated else 0.2) * random.normal(size=n), 0)
        yield _pair("spearman", {"reference": reference, "answer": before}, {"reference": reference, "answer": after})


def spearman_loss(concentrated: bool) -> float:
    """Return the rank correlation lost in populations, on average over 16: of one it is known to 1 % only."""
    lost = []
    for source, candidate in itertools.islice(orders(concentrated, POPULATION // 4, seed=99), 16):
        reference = source.values["reference"]
        lost.append(spearman(reference, source.values["answer"]) - spearman(reference, candidate.values["answer"]))
    return float(np.mean(lost))


def kappa(answers: Array, references: Array) -> float:
    """Return Cohen's kappa: a score of which the gate knows nothing."""
    counts = np.bincount(answers, minlength=100) * np.bincount(references, minlength=100)
    chance = counts.sum() / len(answers) ** 2
    return float((np.mean(answers == references) - chance) / (1 - chance))


def kappas(lost: float, gained: float, n: int, seed: int) -> Iterator[Pair]:
    """Yield labels of 10 unequal classes, to be scored by `kappa`."""
    for source, candidate in labelled(10, True, lost, gained, n, seed):
        yield _pair("kappa", source.values, candidate.values)


def kappa_loss(lost: float, gained: float) -> float:
    """Return the kappa lost in a population."""
    source, candidate = next(kappas(lost, gained, POPULATION, seed=99))
    reference = source.values["reference"]
    return kappa(source.values["answer"], reference) - kappa(candidate.values["answer"], reference)


def _pair(metric: str, before: Any, after: Any) -> Pair:
    names = tuple(map(str, range(len(next(iter(before.values()))))))
    source, candidate = (Scores(metric, "", names, values, 0.0) for values in (before, after))
    return source, candidate
