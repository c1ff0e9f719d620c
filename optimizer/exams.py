"""Which items choose, which judge, and at which levels: decided before the first answer is seen.

Without a choice to make there is no split: all items judge. Items that choose need no level, for what they choose is
judged by others. Those are opened again where a model does not pass, at half the level each time, so that all openings
of a run together wrongly pass a model with a chance of at most alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optimizer.evaluate.items import Item, TopUp
from optimizer.evaluate.parts import Part, count_units, halves, topped_up, whole
from optimizer.record import PartName
from optimizer.statistics.clusters import FEWEST_GROUPS
from optimizer.statistics.rate import zero_change_floor

if TYPE_CHECKING:
    from optimizer.gate import Budget
    from optimizer.recipe import Policy, Recipe

MEANS = ("perplexity", "nats_per_byte", "flips", "kl")
"""Metrics whose independent units are documents."""
CORPUS_ITEMS = 500
"""Fewest items for a score that is no mean of its items."""


@dataclass(frozen=True)
class Exam:
    """What is asked, and at which levels it is judged.

    Attributes:
        parts: items of each evaluation.
        alpha: level of the pass claims.
        fail_alpha: level of the fail claims.
        name: what the items are for; "" where they serve every decision.
    """

    parts: Mapping[str, Part]
    alpha: float
    fail_alpha: float
    name: PartName = ""


@dataclass(frozen=True)
class Exams:
    """The exams of a run.

    Attributes:
        search: asked after every pass.
        last: asked of a finished model, at the level of the first and only opening; None where `search` judges.
        openings: how often it may be opened.
    """

    search: Exam
    last: Exam | None
    openings: int

    @classmethod
    def of(cls, recipe: Recipe, items: Mapping[str, Sequence[Item]]) -> Exams:
        """Decide on the exams of a recipe with these items."""
        alpha, gates = recipe.gate.alpha, sum(len(recipe.limits(name)) for name in items)
        fail_alpha = recipe.gate.fail_alpha or alpha / max(1, gates * len(recipe.passes))
        asked = {name: portioned(recipe, name, each) for name, each in items.items()}
        search = Exam(asked, alpha / recipe.rungs, fail_alpha)
        if recipe.rungs == 1 or not all(_can_split(recipe, name, each) for name, each in items.items()):
            return cls(search, None, 1)
        split = {name: halves(each) for name, each in items.items()}
        choosing = {name: whole(first) for name, (first, _) in split.items()}
        judging = {name: portioned(recipe, name, rest) for name, (_, rest) in split.items() if recipe.limits(name)}
        fail_alpha = recipe.gate.fail_alpha or alpha / max(1, gates)
        last = Exam(judging, alpha, fail_alpha, "certify")
        return cls(replace(search, parts=choosing, alpha=alpha, name="search"), last, recipe.rungs)

    def certify(self, opening: int) -> Exam | None:
        """Return the exam of a finished model that is the `opening`-th to be judged, counted from 1."""
        if self.last is None:
            return None
        share = share_of_level(opening, self.openings)
        return replace(self.last, alpha=share * self.last.alpha, fail_alpha=share * self.last.fail_alpha)


def share_of_level(opening: int, openings: int) -> float:
    """Return the part of a level that an opening may spend: half of what is left, the last of them all of it."""
    return 0.5 ** min(opening, openings - 1)


def portioned(recipe: Recipe | Policy, name: str, items: Sequence[Item]) -> Part:
    """Return the items of an evaluation in the portions in which they are asked for."""
    return topped_up(items) if isinstance(getattr(recipe.evaluate[name], "items", None), TopUp) else whole(items)


def _can_split(recipe: Recipe, name: str, items: Sequence[Item]) -> bool:
    """Tell whether a task's items can be split, and twice as many are there as the least that could ever pass."""
    budgets = recipe.limits(name)
    if not budgets:
        return True
    is_divisible = getattr(recipe.evaluate[name], "is_divisible", True)
    return is_divisible and all(_units(budget, items) >= 2 * _fewest(budget, recipe.gate.alpha) for budget in budgets)


def _units(budget: Budget, items: Sequence[Item]) -> int:
    return len({item.group for item in items}) if budget.metric in MEANS else count_units(items)


def _fewest(budget: Budget, alpha: float) -> int:
    """Return the fewest items, or documents, that could show that a loss is within a budget."""
    if budget.metric == "accuracy":
        return zero_change_floor(budget.limit, alpha)
    return FEWEST_GROUPS if budget.metric in MEANS else CORPUS_ITEMS
