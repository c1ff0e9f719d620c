"""What gate_error_rates.py asks of one gate: exact where it can be, else simulated; beside it two simpler gates.

Rates of false pass and false fail are at a true loss equal to the margin. Every function returns plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gate_samples as samples
import numpy as np
from gate_samples import Array, Pair
from scipy.special import ndtri

from optimizer.gate import Budget, Scores, Spending, Verdict, judge, looks
from optimizer.power import forecast
from optimizer.statistics import paired, power
from optimizer.statistics.macro_f1 import macro_f1
from optimizer.statistics.ratio import document_deviation
from optimizer.statistics.records import Score
from optimizer.statistics.spearman import spearman

Cell = dict[str, Any]
Rule = Callable[[Array, Array], tuple[Array, Array]]
"""Takes counts of losses and gains, returns where it passes and where it fails."""

ALPHA = 0.05
Z = float(ndtri(1 - ALPHA))
MOST_DISCORDANCE = 0.2
NUISANCE_POINTS = 150
CHECKED_TABLES = 3
BLOCKS = 50
MARGIN = 0.02
"""Nats a token, and share of changed positions."""


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
                verdict = judge(*samples.right_and_wrong(look.n, edge, gained), Budget("accuracy", margin))
                assert (verdict.outcome == "pass") == expected, (look.n, edge, gained)


def grouped_cell(size: int, correlation: float, runs: int) -> Cell:
    """Simulate 1,000 answers in groups that lose 2 points at a discordance of 6 %.

    Decided by the test alone, as `judge` decides; its bounds would take minutes more.
    """
    margin, counts = 0.02, dict.fromkeys(("pass", "fail", "normal pass", "normal fail", "points pass"), 0)
    draw = samples.grouped_losses(0.06, margin, size, correlation, 1000, seed=size)
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


def perplexity_cell(damage: str, documents: int, runs: int, *, loss: float = MARGIN, has_looks: bool = False) -> Cell:
    """Simulate documents that lose `loss` nats a token."""
    budget = Budget("perplexity", math.expm1(MARGIN))
    draw = samples.perplexities(damage, documents, loss, seed=documents)
    found = simulated(draw, budget, runs, Spending(documents) if has_looks else None)
    deviation = samples.perplexity_deviation(damage, loss)
    return found | {"promised": forecast(budget, documents, deviation, loss=math.expm1(loss)).power}


def flips_cell(documents: int, runs: int) -> Cell:
    """Simulate changed positions at a rate of 2 %, correlated within documents."""
    return simulated(samples.flips(MARGIN, 0.02, documents, seed=documents), Budget("flips", MARGIN), runs)


def f1_cell(zipf: bool, lost: float, gained: float, n: int, runs: int) -> Cell:
    """Simulate labels of 10 classes, of which some change."""
    limit = samples.f1_loss(10, zipf, lost, gained)
    return simulated(samples.labelled(10, zipf, lost, gained, n, seed=n), Budget("f1", limit), runs)


def f1_power_cell(n: int, runs: int) -> Cell:
    """Simulate a lossless change of 4 % of the answers, and what was forecast of it."""
    budget = Budget("f1", 0.015)
    found = simulated(samples.labelled(10, False, 0.02, 0.02, n, seed=n), budget, runs)
    return found | {"promised": forecast(budget, n, 0.04).power}


def spearman_cell(is_concentrated: bool, n: int, runs: int) -> Cell:
    """Simulate similarities."""
    budget = Budget("spearman", samples.spearman_loss(is_concentrated))
    return simulated(samples.orders(is_concentrated, n, seed=7), budget, runs)


def kappa_cell(lost: float, gained: float, n: int, runs: int) -> Cell:
    """Simulate a score of which the gate knows nothing."""
    budget = Budget("kappa", samples.kappa_loss(lost, gained), compute=samples.kappa)
    return simulated(samples.kappas(lost, gained, n, seed=n), budget, runs)


def simulated(draw: Iterator[Pair], budget: Budget, runs: int, spending: Spending | None = None) -> Cell:
    """Judge `runs` samples; return the share of each outcome, and what points and a normal interval would say.

    `warned` is the share that passed and carried a warning.
    """
    counts = dict.fromkeys(("pass", "fail", "inconclusive", "normal pass", "normal fail", "points pass", "warned"), 0)
    for _ in range(runs):
        source, candidate = next(draw)
        verdict = _judged(source, candidate, budget, spending)
        lower, upper = _normal_bounds(source, candidate, budget)
        counts[verdict.outcome] += 1
        counts["warned"] += verdict.outcome == "pass" and bool(verdict.flags)
        counts["points pass"] += verdict.difference <= budget.limit
        counts["normal pass"] += upper <= budget.limit
        counts["normal fail"] += lower > budget.limit
    return {name: count / runs for name, count in counts.items()} | {"runs": runs}


def _judged(source: Scores, candidate: Scores, budget: Budget, spending: Spending | None) -> Verdict:
    """Judge all items, or at every look until decided."""
    if spending is None:
        return judge(source, candidate, budget)
    previous = 0
    for n in looks(spending.most):
        verdict = judge(_first(source, n), _first(candidate, n), budget, spending=Spending(spending.most, previous))
        previous = verdict.looked_at
        if verdict.outcome != "inconclusive" or verdict.is_hopeless:
            break
    return verdict


def _first(scores: Scores, n: int) -> Scores:
    return replace(scores, groups=scores.groups[:n], values={name: array[:n] for name, array in scores.values.items()})


def _normal_bounds(source: Scores, candidate: Scores, budget: Budget) -> tuple[float, float]:
    """Return what a normal interval of all items says; documents are the units of a mean over tokens."""
    if "tokens" not in candidate.values:
        known: dict[str, Score] = {"f1": lambda answers, right: macro_f1(right, answers)}
        known["spearman"] = lambda answers, right: spearman(right, answers)
        return _jackknife_bounds(source, candidate, budget.compute or known[budget.metric])
    if source.metric == "perplexity":
        sums = candidate.values["nll"] - source.values["nll"]
    else:
        sums = candidate.values["flips"].astype(float)
    sizes = candidate.values["tokens"].astype(float)
    mean, width = sums.sum() / sizes.sum(), Z * document_deviation(sums, sizes) / math.sqrt(len(sums))
    bounds = mean - width, mean + width
    return (math.expm1(bounds[0]), math.expm1(bounds[1])) if source.metric == "perplexity" else bounds


def _jackknife_bounds(source: Scores, candidate: Scores, score: Score) -> tuple[float, float]:
    """Return loss and normal interval of a score, its standard error from leaving out one block of items at a time."""
    reference = source.values["reference"]
    before, after = source.values["answer"], candidate.values["answer"]
    blocks = np.arange(len(reference)) % BLOCKS

    def loss(kept: Array) -> float:
        return score(before[kept], reference[kept]) - score(after[kept], reference[kept])

    losses = np.array([loss(blocks != block) for block in range(BLOCKS)])
    point, width = loss(blocks >= 0), Z * math.sqrt((BLOCKS - 1) * float(losses.var()))
    return point - width, point + width
