"""What a person reads of a plan, and of what became of it."""

from __future__ import annotations

from collections.abc import Iterator

from optimizer.planned import Plan, PlannedGate, PlannedStep
from optimizer.power import WANTED
from optimizer.report import UNITS

_CHANGED = {"accuracy": "discordance", "f1": "changed answers", "flips": "changed answers"}


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the chain in aligned columns, then what it takes in all, each gate, and what is known to go wrong."""
    rungs = {(rung.place, rung.rung): rung for rung in plan.rungs}
    rows = [(step.name, _cells(step)) for step in plan.steps]
    width = max(len(name) for name, _ in rows)
    yield f"{'pass':<{width}}  {'matches':>8}  {'MB':>10}  {'M params':>9}  {'peak MB':>8}  {'pass':>8}  {'scoring':>8}"
    for step in plan.steps:
        yield f"{step.name:<{width}}  {_cells(step)}"
        yield from (f"  {line}" for line in filter(None, (step.note, step.refusal)))
        for (place, number), rung in sorted(rungs.items()):
            if place == step.place:
                yield f"  otherwise {number}: {rung.words}{_rung_text(rung)}"
    yield total_text(plan)
    yield from (gate_text(gate) for gate in plan.gates)
    yield from (f"warning: {warning}" for warning in plan.warnings)


def total_text(plan: Plan) -> str:
    """Return what a run takes in all."""
    memory = f", {plan.peak_bytes / 1e9:.2f} GB of memory" if plan.peak_bytes else ""
    return f"about {duration(plan.seconds)} ({plan.basis}){memory}, {plan.disk_bytes / 1e6:,.0f} MB of disk"


def gate_text(gate: PlannedGate) -> str:
    """Return what one gate will be able to show."""
    name = " ".join(dict.fromkeys((gate.evaluation, gate.score)))
    head = f"{name}, budget {_budget(gate)}: {gate.items:,} {gate.unit}"
    if gate.spread is None or gate.power is None:
        return f"{head}, of at least {gate.floor:,} that can pass; no forecast, for nothing like it was measured yet"
    at = f"at {_spread(gate)} pass with probability {gate.power:.2f} if nothing is lost"
    if gate.enough is None:
        return f"{head} {at}; such a change is over the budget by itself ({gate.basis})"
    more = f", {duration(gate.more_s)} more" if gate.more_s else ""
    needs = f"{gate.enough:,} would give {WANTED:.2f}{more}"
    others = f"{_count(gate.enough_at_half)} at half that, {_count(gate.enough_at_double)} at double"
    return f"{head} {at}; {needs} ({others}; {gate.basis})"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 0.8 s, 8 s, 3 min, 2.5 h."""
    if seconds < 2:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cells(step: PlannedStep) -> str:
    def number(value: float | None, spec: str) -> str:
        return "" if value is None else format(value, spec)

    megabytes = [None if each is None else each / 1e6 for each in (step.bytes, step.parameters, step.peak_bytes)]
    cells = [
        f"{number(step.matches, ','):>8}",
        f"{number(megabytes[0], ',.2f'):>10}",
        f"{number(megabytes[1], ',.1f'):>9}",
        f"{number(megabytes[2], ',.0f'):>8}",
        f"{duration(step.pass_s) if step.place and not step.refusal else '':>8}",
        f"{duration(step.score_s) if step.score_s else '':>8}",
    ]
    return "  ".join(cells).rstrip()


def _rung_text(rung: PlannedStep) -> str:
    if rung.refusal or rung.note or rung.bytes is None:
        told = rung.refusal or rung.note
        return f": {told}" if told else ""
    return f": {rung.matches:,} matches, {rung.bytes / 1e6:,.2f} MB"


def _budget(gate: PlannedGate) -> str:
    if gate.relative and gate.metric != "perplexity":
        return f"{100 * gate.limit:g} % of the source's"
    unit = UNITS.get(gate.metric)
    return f"{100 * gate.limit:g}{unit}" if unit else f"{gate.limit:g}"


def _spread(gate: PlannedGate) -> str:
    assert gate.spread is not None
    if gate.metric in _CHANGED:
        return f"{100 * gate.spread:.2g} % {_CHANGED[gate.metric]}"
    return f"a spread of {gate.spread:.2g}"


def _count(items: int | None) -> str:
    return "none" if items is None else f"{items:,}"
