"""What a recipe would do, pass by pass, from configuration and headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optimizer.recipe import Recipe
from passes.base import Estimate, Model, PassError

NO_ESTIMATE = "no estimate"
NOTE = "Each pass is estimated on the source's weights, not on what the passes before it leave."


@dataclass(frozen=True)
class Step:
    """One pass and what it would do; `refusal` says why there is no estimate."""

    name: str
    estimate: Estimate | None
    refusal: str = ""

    @property
    def is_refused(self) -> bool:
        """Say whether the pass refused the model, rather than having no estimate to give."""
        return self.estimate is None and self.refusal != NO_ESTIMATE


def plan(recipe: Recipe, source: Model) -> tuple[Step, ...]:
    """Return each pass's estimate. Passes after the first see the source's files at the stage they read."""
    return tuple(_step(recipe, index, source) for index in range(len(recipe.passes)))


def _step(recipe: Recipe, index: int, source: Model) -> Step:
    chosen = recipe.passes[index]
    try:
        estimate = chosen.estimate(replace(source, stage=chosen.reads))
    except PassError as error:
        return Step(chosen.name(), None, str(error))
    return Step(chosen.name(), estimate, "" if estimate else NO_ESTIMATE)


def plan_lines(steps: tuple[Step, ...]) -> list[str]:
    """Return the plan as aligned lines: matches, weights afterwards and peak memory in MB."""
    width = max(len(step.name) for step in steps)
    lines = [f"{'pass':<{width}}  {'matches':>8}  {'weights MB':>11}  {'peak MB':>9}"]
    for step in steps:
        told = step.estimate
        row = f"{told.matches:>8}  {told.bytes / 1e6:>11.1f}  {told.peak_bytes / 1e6:>9.1f}" if told else step.refusal
        lines.append(f"{step.name:<{width}}  {row}")
    return [*lines, NOTE]
