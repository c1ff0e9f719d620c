"""What a plan says: what each pass would leave and take, what each gate would be able to show. Data only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from optimizer.record import Planned, sayable

FORMAT = 1
"""Of the document that `optimize plan --json` prints."""


@dataclass(frozen=True)
class PlannedStep:
    """The source, a pass, or a fallback of one, and what to expect of it.

    Attributes:
        place: of the pass in the chain, counted from 1; 0 for the source.
        rung: which of the pass's fallbacks this is, counted from 1; 0 for the pass itself.
        words: options of a fallback.
        matches: places it would change; None where only the work itself can tell, as for the next three.
        bytes: size of the model's files afterwards.
        parameters: numbers that its weights stand for.
        peak_bytes: largest resident memory of the process meanwhile, scoring included.
        scoring_bytes: memory that scoring takes for the weights.
        pass_s: seconds of the pass.
        score_s: seconds of the scoring after it.
        note: what is left as it was, and why.
        refusal: why the pass would not take the model; empty where it would.
        is_optional: a refusal skips it.
        warnings: what is known to be unwise.
    """

    name: str
    place: int = 0
    rung: int = 0
    words: str = ""
    matches: int | None = None
    bytes: int | None = None
    parameters: int | None = None
    peak_bytes: int | None = None
    scoring_bytes: int = 0
    pass_s: float = 0.0
    score_s: float = 0.0
    note: str = ""
    refusal: str = ""
    is_optional: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def is_refused(self) -> bool:
        """Say whether the pass would stop the run, rather than be skipped."""
        return bool(self.refusal) and not self.is_optional


@dataclass(frozen=True)
class PlannedGate:
    """One gate of the finished model, and what to expect of it.

    Attributes:
        evaluation: what is scored.
        score: which of its scores is judged.
        metric: as in `gate.Scores`.
        limit: the budget, a share of the source's score where `relative` says so.
        alpha: level of the pass claim.
        items: that judge, at most.
        unit: what they are, in a word.
        is_top_up: they come in portions.
        floor: fewest items that can pass at all; None where nothing is known to forecast with.
        spread: expected; as in `gate.Verdict`. None as for `floor`.
        basis: where it comes from.
        power: probability of a pass when nothing is truly lost; None as for `floor`.
        enough: items that give a pass with probability 0.8; None where none do, and as for `floor`.
        enough_at_half, enough_at_double: the same, were the spread half or double.
        more_s: seconds that the items missing to `enough` would add to a run.
    """

    evaluation: str
    score: str
    metric: str
    limit: float
    relative: bool
    alpha: float
    items: int
    unit: str
    is_top_up: bool
    floor: int | None = None
    spread: float | None = None
    basis: str = ""
    power: float | None = None
    enough: int | None = None
    enough_at_half: int | None = None
    enough_at_double: int | None = None
    more_s: float = 0.0

    @property
    def can_pass(self) -> bool:
        """Tell whether these items could pass if not one answer changed."""
        return self.floor is None or self.items >= self.floor


@dataclass(frozen=True)
class Plan:
    """What to expect of a run.

    Attributes:
        steps: the source, then the passes.
        rungs: the fallbacks, each in the place of its pass; what would follow them is not planned.
        gates: those that decide about the finished model.
        seconds: of the run, fallbacks and speed gates left out.
        basis: where the seconds come from, in words.
        peak_bytes: largest resident memory of the process; 0 where nothing is known.
        disk_bytes: what the store and the artifact take.
        warnings: what is known to go wrong, or to be unwise.
    """

    name: str
    steps: tuple[PlannedStep, ...]
    rungs: tuple[PlannedStep, ...]
    gates: tuple[PlannedGate, ...]
    seconds: float
    basis: str
    peak_bytes: int
    disk_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def refused(self) -> PlannedStep | None:
        """Return the first pass that would stop the run: it refuses the model, and no fallback is there to try."""
        has_rungs = {rung.place for rung in self.rungs}
        return next((step for step in self.steps if step.is_refused and step.place not in has_rungs), None)

    def of(self, place: int, rung: int = 0) -> Planned | None:
        """Return what is expected of a step, or of a fallback; None where nothing is known of its size."""
        steps = self.rungs if rung else self.steps
        step = next(each for each in steps if (each.place, each.rung) == (place, rung))
        if step.bytes is None:
            return None
        return Planned(step.bytes, step.peak_bytes or 0, step.pass_s, step.score_s)

    def to_json(self) -> str:
        """Return the plan as one JSON document."""
        return json.dumps(sayable({"format": FORMAT, **asdict(self)}), indent=1, sort_keys=True)
