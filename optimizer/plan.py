"""What a recipe would do, pass by pass, before any work.

Configuration and headers tell most; a pass that lowers or fuses tries the architecture on a small twin, as the run does
first of all, so that what the run would refuse is refused here. No weight of the model is read.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from optimizer.recipe import Recipe
from passes.base import Context, Estimate, Model, Pass, PassError

NO_ESTIMATE = "no estimate"


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
    """Return each pass's estimate, from what the passes before it would leave."""
    steps: list[Step] = []
    model = source
    with tempfile.TemporaryDirectory(prefix="optimize-plan-") as folder:
        for number, each in enumerate(recipe.passes):
            context = Context(Path(folder, str(number)), source, recipe.target.device)
            context.workdir.mkdir()
            step = _step(each, model, context)
            steps.append(step)
            if step.estimate:
                model = step.estimate.model
    return tuple(steps)


def _step(chosen: Pass, model: Model, context: Context) -> Step:
    if model.stage != chosen.reads:
        return Step(chosen.name(), None, NO_ESTIMATE, chosen.optional)
    try:
        chosen.admits(context.source, context)
        chosen.requires(model)
        estimate = chosen.estimate(model, context)
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
    return lines
