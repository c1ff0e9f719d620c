"""What gate_error_rates.py asks of one gate: exact where it can be, else simulated; beside it two simpler gates.

Rates of false pass and false fail are at a true loss equal to the margin. Every function returns plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from optimizer.gate import Budget, Scores, Spending, Verdict, judge, looks
from optimizer.power import forecast
from optimizer.statistics import paired, power
from optimizer.statistics.macro_f1 import macro_f1
from optimizer.statistics.ratio import document_deviation
from optimizer.statistics.spearman import spearman

Array = NDArray[Any]
Cell = dict[str, Any]
Rule = Callable[[Array, Array], tuple[Array, Array]]
"""Takes counts of losses and gains, returns where it passes and where it fails."""
Pair = tuple[Scores, Scores]

ALPHA = 0.05
Z = float(ndtri(1 - ALPHA))
MOST_DISCORDANCE = 0.2
NUISANCE_POINTS = 150
CHECKED_TABLES = 3
POPULATION = 2_000_000
TOKENS_CUT = 1024
EFFECT_SD, TOKEN_SD = 0.0346, 0.4


# ---- right or wrong: enumerated


def paired_cell(margin: float, n: int) -> Cell:
    """Return the worst rates over the discordance, of the gate, of a normal interval and of bare points."""
    (look,) = power.looks_of((n,), margin, ALPHA, ALPHA)
    _check_with_judge(look, margin)
    rules: dict[str, Rule] = {
        "gate": lambda lost, gained: (lost <= look.passes[gained], gained <= look.fails[lost]),
        "normal": lambda lost, gained: _normal(lost, gained, n, margin),
        "points": lambda lost, gained: (lost - gained <= n * margin, lost - gained > n * margin),
    }
    worst = {name: [0.0, 0.0] for name in rules}
    for discordance in discordances(margin):
        counts = power.trinomial(n, (discordance + margin) / 2, (discordance - margin) / 2)
        lost, gained = np.broadcast_arrays(counts.lost, counts.gained)
        lost, gained = np.minimum(lost, n), np.minimum(gained, n)
        for name, rule in rules.items():
            rates = (float(counts.mass[claim].sum()) for claim in rule(lost, gained))
            worst[name] = [max(pair) for pair in zip(worst[name], rates, strict=True)]
    return {name: {"pass": false_pass, "fail": false_fail} for name, (false_pass, false_fail) in worst.items()}


def discordances(margin: float) -> Array:
    """Return discordances from the margin, where nothing is gained, to 20 %; dense where rates change fast."""
    return margin + 2 * np.linspace(0, math.sqrt((MOST_DISCORDANCE - margin) / 2), NUISANCE_POINTS) ** 2


def _normal(lost: Array, gained: Array, n: int, margin: float) -> tuple[Array, Array]:
    """Decide by the normal interval of a mean of paired differences (Wald)."""
    loss = (lost - gained) / n
    width = Z * np.sqrt(np.maximum((lost + gained) / n - loss**2, 0) / n)
    return loss + width <= margin, loss - width > margin


def _check_with_judge(look: power.Look, margin: float) -> None:
    """Make sure that the enumerated region is what `judge` decides, on tables at its edges."""
    for gained in range(0, CHECKED_TABLES):
        lost = int(look.passes[gained])
        for edge, expected in ((lost, True), (lost + 1, False)):
            if edge >= 0:
                verdict = judge(*right_and_wrong(look.n, edge, gained), Budget("accuracy", margin))
                assert (verdict.outcome == "pass") == expected, (look.n, edge, gained)


def right_and_wrong(n: int, lost: int, gained: int) -> Pair:
    """Return scores with so many losses and gains."""
    source = np.arange(n) < n - gained
    candidate = np.arange(n) >= lost
    return _pair("accuracy", {"correct": source}, {"correct": candidate})


def grouped_cell(size: int, correlation: float, runs: int) -> Cell:
    """Simulate 1,000 answers in groups that lose 2 points at a discordance of 6 %.

    Decided by the test alone, as `judge` decides; its bounds would take minutes more.
    """
    margin, counts = 0.02, dict.fromkeys(("pass", "fail", "normal pass", "normal fail", "points pass"), 0)
    draw = grouped_losses(0.06, margin, size, correlation, 1000, seed=size)
    for losses, groups in (next(draw) for _ in range(runs)):
        lost, gained = int(np.sum(losses > 0)), int(np.sum(losses < 0))
        effect = paired.grouped_design_effect(losses, groups)
        against_pass = paired.shrunk(lost, gained, len(losses), effect)
        against_fail = paired.shrunk(gained, lost, len(losses), effect)
        counts["pass"] += paired.is_shown(*against_pass, margin, ALPHA)
        counts["fail"] += paired.is_shown(*against_fail, -margin, ALPHA)
        mean, width = losses.mean(), Z * losses.std() / math.sqrt(len(losses))
        counts["normal pass"] += mean + width <= margin
        counts["normal fail"] += mean - width > margin
        counts["points pass"] += mean <= margin
    return {name: count / runs for name, count in counts.items()} | {"runs": runs}


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


def top_up_cell(margin: float, most: int, fail_alpha: float) -> Cell:
    """Return the worst rates with looks, and what they cost and save where nothing is lost."""
    taken = power.looks_of(looks(most), margin, ALPHA, fail_alpha)
    once = power.looks_of((most,), margin, ALPHA, fail_alpha)
    at_margin = [power.chances(taken, discordance, margin) for discordance in discordances(margin)[::2]]
    rows = {}
    for discordance in (0.0, 0.01, 0.02, 0.04, 0.08):
        found, single = power.chances(taken, discordance), power.chances(once, discordance)
        told = forecast(Budget("accuracy", margin), most, discordance, alpha=ALPHA, top_up=True)
        rows[f"{discordance:g}"] = {
            "once": single.passed,
            "passed": found.passed,
            "promised": told.power,
            "items": found.items,
        }
    return {
        "looks": [look.n for look in taken],
        "pass": max(each.passed for each in at_margin),
        "fail": max(each.failed for each in at_margin),
        "power": rows,
    }


def forecast_cell(margin: float, discordance: float) -> Cell:
    """Return the items that the forecast asks for, and the power that they really have."""
    told = forecast(Budget("accuracy", margin), 200, discordance, alpha=ALPHA)
    assert told.items is not None
    exact = power.chances(power.looks_of((told.items,), margin, ALPHA), discordance).passed
    at_200 = power.chances(power.looks_of((200,), margin, ALPHA), discordance).passed
    formula = paired.items_needed(margin, discordance, ALPHA)
    return {"items": told.items, "formula": formula, "power": exact, "promised at 200": told.power, "at 200": at_200}


# ---- all others: simulated


def simulated(draw: Iterator[Pair], budget: Budget, runs: int, spending: Spending | None = None) -> Cell:
    """Judge `runs` samples; return the share of each outcome, and what points and a normal interval would say."""
    counts = dict.fromkeys(("pass", "fail", "inconclusive", "normal pass", "normal fail", "points pass"), 0)
    for _ in range(runs):
        verdict, (lower, upper) = _judged(*next(draw), budget, spending)
        counts[verdict.outcome] += 1
        counts["points pass"] += verdict.difference <= budget.limit
        counts["normal pass"] += upper <= budget.limit
        counts["normal fail"] += lower > budget.limit
    return {name: count / runs for name, count in counts.items()} | {"runs": runs}


def _judged(source: Scores, candidate: Scores, budget: Budget, spending: Spending | None) -> tuple[Verdict, Any]:
    """Judge at every look until decided; the normal interval is that of all items."""
    bounds = _normal_bounds(source, candidate)
    if spending is None:
        return judge(source, candidate, budget), bounds
    previous = 0
    for n in looks(spending.most):
        verdict = judge(_first(source, n), _first(candidate, n), budget, spending=Spending(spending.most, previous))
        previous = verdict.looked_at
        if verdict.outcome != "inconclusive" or verdict.is_hopeless:
            break
    return verdict, bounds


def _first(scores: Scores, n: int) -> Scores:
    values = {name: array[:n] for name, array in scores.values.items()}
    return Scores(scores.metric, scores.items, scores.groups[:n], values, scores.point)


def _normal_bounds(source: Scores, candidate: Scores) -> tuple[float, float]:
    """Return what a normal interval of the mean over tokens says, with documents as units; others have none."""
    if "tokens" not in candidate.values:
        return math.nan, math.nan
    if source.metric == "perplexity":
        sums = candidate.values["nll"] - source.values["nll"]
    else:
        sums = candidate.values["flips"].astype(float)
    sizes = candidate.values["tokens"].astype(float)
    mean, width = sums.sum() / sizes.sum(), Z * document_deviation(sums, sizes) / math.sqrt(len(sums))
    bounds = mean - width, mean + width
    return (math.expm1(bounds[0]), math.expm1(bounds[1])) if source.metric == "perplexity" else bounds


def perplexities(damage: str, spread: float, documents: int, loss: float, seed: int) -> Iterator[Pair]:
    """Yield documents cut at 1,024 tokens that lose `loss` nats a token on average.

    Lengths are lognormal around 600. A document's own effect has a standard deviation of 0.0346 nats, a token's 0.4, as
    measured with 4-bit weights; `damage` says how documents share the loss.
    """
    random = np.random.default_rng(seed)
    while True:
        tokens = np.clip(np.round(600 * np.exp(spread * random.normal(size=documents))), 2, TOKENS_CUT)
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


def perplexity_deviation(damage: str, spread: float, loss: float) -> float:
    """Return the deviation of documents as a forecast wants it, from a large sample."""
    source, candidate = next(perplexities(damage, spread, 200_000, loss, seed=99))
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
    """Return the rank correlation lost in a population."""
    source, candidate = next(orders(concentrated, POPULATION // 4, seed=99))
    reference = source.values["reference"]
    return spearman(reference, source.values["answer"]) - spearman(reference, candidate.values["answer"])


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
