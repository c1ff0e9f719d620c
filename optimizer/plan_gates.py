"""What each gate of a recipe will be able to show with the items it has, before a model is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from optimizer.evaluate.items import Item
from optimizer.evaluate.parts import Part
from optimizer.exams import MEANS, Exams
from optimizer.gate import Budget
from optimizer.planned import PlannedGate
from optimizer.power import Forecast, forecast
from optimizer.recipe import Recipe
from optimizer.spreads import Expected, Spread, expected, natural_units
from optimizer.statistics.clusters import FEWEST_GROUPS


def plan_gates(
    recipe: Recipe,
    exams: Exams,
    kind: str,
    source_key: str,
    known: Sequence[Spread],
    seconds_of: Mapping[str, float],
) -> tuple[PlannedGate, ...]:
    """Return the gates that decide about the finished model.

    Args:
        recipe: the recipe.
        exams: its exams.
        kind: of model.
        source_key: names the untouched model.
        known: what gates found on this machine.
        seconds_of: evaluation -> seconds that all scorings of its items take in a run.
    """
    exam = exams.certify(1) or exams.search
    found = []
    for name, part in exam.parts.items():
        for budget in recipe.limits(name):
            gate = _bare(name, part, budget, exam.alpha, kind)
            told = expected(known, source_key, recipe.passes, f"{name}/{budget.judges}", budget, kind)
            gate = _forecast(gate, part, budget, kind, told)
            more = max(0, (gate.enough or 0) - gate.items)
            found.append(replace(gate, more_s=seconds_of.get(name, 0.0) * more / gate.items))
    return tuple(found)


def _bare(name: str, part: Part, budget: Budget, alpha: float, kind: str) -> PlannedGate:
    items: Sequence[Item] = part.items
    if budget.metric in MEANS and (kind == "decoder" or budget.metric != "flips"):
        count, unit = len({item.group for item in items}), "documents"
    else:
        count, unit = part.units, "items"
    return PlannedGate(
        name,
        budget.judges,
        budget.metric,
        budget.limit,
        budget.relative,
        alpha,
        count,
        unit,
        len(part.portions) > 1,
    )


def _forecast(gate: PlannedGate, part: Part, budget: Budget, kind: str, told: Expected | None) -> PlannedGate:
    """Say what the gate can be expected to show, by what is known of such models."""
    units = natural_units(budget.metric, part.items, kind) * (told.units if told else 1.0)
    per_unit = gate.items / units
    ask = partial(forecast, budget, int(units), alpha=gate.alpha, top_up=gate.is_top_up)
    fewest = FEWEST_GROUPS if gate.unit == "documents" else 0
    if told is None:
        return replace(gate, floor=max(fewest, _items(ask(0.0).floor, per_unit)))
    ask = partial(ask, score=told.score, loss=told.loss if budget.metric == "kl" else 0.0)
    at, half, double = (ask(told.spread * times) for times in (1.0, 0.5, 2.0))
    return replace(
        gate,
        floor=max(fewest, _items(at.floor, per_unit)),
        spread=told.spread,
        basis=told.basis,
        power=at.power,
        enough=_enough(at, per_unit, fewest),
        enough_at_half=_enough(half, per_unit, fewest),
        enough_at_double=_enough(double, per_unit, fewest),
    )


def _enough(told: Forecast, per_unit: float, fewest: int) -> int | None:
    return None if told.items is None else max(fewest, _items(told.items, per_unit))


def _items(units: int, per_unit: float) -> int:
    """Return how many items make so many effective units."""
    return -int(-units * per_unit // 1)
