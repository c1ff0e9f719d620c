"""Random parts of a pool of records, judged by the gate and by two simpler rules. No model is asked anything.

Right and wrong answers are judged by how many were lost and gained, so verdicts on them are remembered by these counts.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from optimizer.gate import Budget, Outcome, Scores, Spending, judge, looks
from optimizer.statistics import power
from optimizer.statistics.ratio import document_deviation

ALPHA = 0.05
Z = float(ndtri(1 - ALPHA))
Array: TypeAlias = NDArray[Any]
RULES = ("gate", "normal", "points")


@dataclass(frozen=True)
class Pool:
    """What source and candidate scored on all items of a pool, and the budget."""

    source: Scores
    candidate: Scores
    budget: Budget

    @property
    def size(self) -> int:
        """Return the number of items."""
        return len(self.source.groups)

    @property
    def true_loss(self) -> float:
        """Return the loss on all items, in the unit of the budget."""
        return self.loss(*self.changes())

    @property
    def discordance(self) -> float:
        """Return the share of items that exactly one of the models answers right."""
        return float(np.mean(self.changes()[0] != 0))

    @property
    def margin(self) -> float:
        """Return the budget in the unit of `changes`: nats of perplexity."""
        return math.log1p(self.budget.limit) if self.budget.metric == "perplexity" else self.budget.limit

    def changes(self, items: Array | slice = slice(None)) -> tuple[Array, Array]:
        """Return per item its loss (1, 0 or -1 of answers, summed nats of documents) and its size (1, or tokens)."""
        name, sign = ("nll", 1) if self.budget.metric == "perplexity" else ("correct", -1)
        before, after = (np.asarray(side.values[name][items], np.float64) for side in (self.source, self.candidate))
        sizes = self.source.values["tokens"][items] if name == "nll" else np.ones(len(before))
        return sign * (after - before), np.asarray(sizes, np.float64)

    def loss(self, changes: Array, sizes: Array) -> float:
        """Return the loss in the unit of the budget."""
        mean = float(changes.sum() / sizes.sum())
        return math.expm1(mean) if self.budget.metric == "perplexity" else mean

    def part(self, items: Array) -> Pool:
        """Return some of the items; one that was drawn twice counts as two."""
        return Pool(_part(self.source, items), _part(self.candidate, items), self.budget)


def _part(scores: Scores, items: Array) -> Scores:
    values = {name: array[items] for name, array in scores.values.items()}
    point = float(np.mean(values["correct"])) if scores.metric == "accuracy" else scores.point
    return Scores(scores.metric, "part", tuple(map(str, range(len(items)))), values, point)


@dataclass
class Judge:
    """Asks the gate; what it says of counts is kept in a file."""

    path: Path
    known: dict[str, Outcome] = field(default_factory=dict)

    def load(self) -> None:
        """Read what was kept."""
        if self.path.exists():
            self.known = json.loads(self.path.read_text())

    def save(self) -> None:
        """Keep what is known."""
        self.path.write_text(json.dumps(self.known))

    def outcome(self, part: Pool) -> Outcome:
        """Return the verdict of one look at a part."""
        if part.budget.metric != "accuracy":
            return judge(part.source, part.candidate, part.budget, alpha=ALPHA).outcome
        changes, _ = part.changes()
        lost, gained = int(np.sum(changes > 0)), int(np.sum(changes < 0))
        key = f"{lost} {gained} {part.size} {part.budget.limit:g}"
        if key not in self.known:
            self.known[key] = judge(part.source, part.candidate, part.budget, alpha=ALPHA).outcome
        return self.known[key]


def by_interval(part: Pool) -> Outcome:
    """Decide by the normal interval of the paired loss (Wald)."""
    changes, sizes = part.changes()
    mean = float(changes.sum() / sizes.sum())
    width = Z * document_deviation(changes, sizes) / math.sqrt(part.size)
    if mean + width <= part.margin:
        return "pass"
    return "fail" if mean - width > part.margin else "inconclusive"


def by_points(part: Pool) -> Outcome:
    """Decide by the loss seen alone."""
    return "pass" if part.loss(*part.changes()) <= part.budget.limit else "fail"


def judged(pool: Pool, judge_of: Judge, n: int, subsets: int, seed: int) -> dict[str, Counter[Outcome]]:
    """Count by rule how it judges random parts of `n` items, drawn without replacement."""
    random = np.random.default_rng(seed)
    found: dict[str, Counter[Outcome]] = {rule: Counter() for rule in RULES}
    for _ in range(subsets):
        part = pool.part(random.choice(pool.size, n, replace=False))
        for rule, outcome in zip(RULES, (judge_of.outcome(part), by_interval(part), by_points(part)), strict=True):
            found[rule][outcome] += 1
    return found


# ---- looking several times


@dataclass(frozen=True)
class Ended:
    """How runs that look several times ended: outcome and items of each, and of the same items looked at once."""

    outcomes: list[Outcome]
    items: list[int]
    once: list[Outcome]


def topped_up(pool: Pool, most: int, runs: int, seed: int) -> Ended:
    """Run a gate with looks so often, each time on items drawn anew, with replacement: as if the pool were endless."""
    random = np.random.default_rng(seed)
    taken = _regions(pool.budget.limit, most) if pool.budget.metric == "accuracy" else {}
    ended = Ended([], [], [])
    for _ in range(runs):
        drawn = random.choice(pool.size, most)
        changes, _ = pool.changes(drawn)
        outcome, items = looked(changes, taken, pool.margin) if taken else _asked(pool, drawn)
        ended.outcomes.append(outcome)
        ended.items.append(items)
        if taken:
            ended.once.append(decided(changes, once_region(pool.budget.limit, most)))
        else:
            part = pool.part(drawn)
            ended.once.append(judge(part.source, part.candidate, part.budget, alpha=ALPHA).outcome)
    return ended


def once_region(margin: float, most: int) -> power.Look:
    """Return what a single look must show."""
    return power.looks_of((most,), margin, ALPHA, ALPHA)[0]


def _regions(margin: float, most: int) -> Mapping[int, power.Look]:
    """Return the looks that can decide, by how many items they see."""
    return {look.n: look for look in power.looks_of(looks(most), margin, ALPHA, ALPHA)}


def decided(changes: Array, look: power.Look) -> Outcome:
    """Decide by the counts alone: the regions of `judge`, without its bounds, which take a second."""
    lost, gained = int(np.sum(changes > 0)), int(np.sum(changes < 0))
    if lost <= look.passes[gained]:
        return "pass"
    return "fail" if gained <= look.fails[lost] else "inconclusive"


def looked(changes: Array, taken: Mapping[int, power.Look], margin: float) -> tuple[Outcome, int]:
    """Return how a run over these answers ends, and after how many: decided, hopeless, or at its last item.

    Whether going on is hopeless is asked with the normal standard error, of which `judge`'s interval is a little wider.
    """
    most, previous = max(taken), 0
    for n, look in sorted(taken.items()):
        seen = changes[:n]
        outcome = decided(seen, look)
        error = float(seen.std()) / math.sqrt(n)
        stops = Spending(most, previous).is_hopeless(float(seen.mean()), error, margin, n, (ALPHA, ALPHA))
        if outcome != "inconclusive" or stops or n == most:
            return outcome, n
        previous = n
    raise AssertionError("the last look ends every run")


def _asked(pool: Pool, drawn: Array) -> tuple[Outcome, int]:
    """Ask the gate at every look, as the pipeline does."""
    most, previous = len(drawn), 0
    for n in looks(most):
        part = pool.part(drawn[:n])
        verdict = judge(part.source, part.candidate, part.budget, alpha=ALPHA, spending=Spending(most, previous))
        if verdict.outcome != "inconclusive" or verdict.is_hopeless or n == most:
            return verdict.outcome, n
        previous = verdict.looked_at
    raise AssertionError("the last look ends every run")


def disagreements(pool: Pool, most: int, runs: int, seed: int) -> tuple[int, int]:
    """Ask `judge` itself in so many runs over right and wrong answers; return (runs that end otherwise, runs)."""
    random = np.random.default_rng(seed)
    taken, differ = _regions(pool.budget.limit, most), 0
    for _ in range(runs):
        drawn = random.choice(pool.size, most)
        differ += looked(pool.changes(drawn)[0], taken, pool.margin) != _asked(pool, drawn)
    return differ, runs
