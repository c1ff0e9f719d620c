"""What a recipe would do, pass by pass, before any work.

Configuration and headers tell most; a pass that lowers or fuses tries the architecture on a small twin, as the run does
first of all, so that what the run would refuse is refused here. No weight of the model is read.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from optimizer.recipe import Recipe
from passes.base import Context, Estimate, Model, PassError

NO_ESTIMATE = "no estimate"
NOTE = "Each pass is estimated on the source's weights, not on what the passes before it leave."


@dataclass(frozen=True)
class Step:
    """One pass and what it would do; `refusal` says why there is no estimate."""

    name: str
    estimate: Estimate | None
    refusal: str = ""
    optional: bool = False

    @property
    def is_refused(self) -> bool:
        """Say whether the pass would stop the run, rather than be skipped or have no estimate to give."""
        return self.estimate is None and self.refusal != NO_ESTIMATE and not self.optional


def plan(recipe: Recipe, source: Model) -> tuple[Step, ...]:
    """Return each pass's estimate. Passes after the first see the source's files at the stage they read."""
    with tempfile.TemporaryDirectory(prefix="optimize-plan-") as folder:
        context = Context(Path(folder), source, recipe.target.device)
        return tuple(_step(recipe, index, source, context) for index in range(len(recipe.passes)))


def _step(recipe: Recipe, index: int, source: Model, context: Context) -> Step:
    chosen = recipe.passes[index]
    try:
        chosen.admits(source, context)
        estimate = chosen.estimate(replace(source, stage=chosen.reads))
    except PassError as error:
        return Step(chosen.name(), None, str(error), chosen.optional)
    return Step(chosen.name(), estimate, "" if estimate else NO_ESTIMATE, chosen.optional)


def plan_lines(steps: tuple[Step, ...]) -> list[str]:
    """Return the plan as aligned lines: matches, weights afterwards and peak memory in MB."""
    width = max(len(step.name) for step in steps)
    lines = [f"{'pass':<{width}}  {'matches':>8}  {'weights MB':>11}  {'peak MB':>9}"]
    for step in steps:
        told = step.estimate
        row = f"{told.matches:>8}  {told.bytes / 1e6:>11.1f}  {told.peak_bytes / 1e6:>9.1f}" if told else step.refusal
        lines.append(f"{step.name:<{width}}  {row}")
    return [*lines, NOTE]
