"""How long a run takes and how much memory, from what such work took before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from optimizer.costs import Basis, Work, expected, extent, recorded, scoring_at
from optimizer.evaluate.items import tokens_read
from optimizer.evaluate.parts import Part
from optimizer.examiner import AGAIN_TOKENS
from optimizer.exams import Exams
from optimizer.maker import Maker
from optimizer.planned import PlannedStep
from passes.base import TORCH, Pass, Stage

_BASES: Mapping[Basis, str] = {
    "measured": "measured here",
    "scaled": "scaled from other work measured here",
    "shipped": "as on another machine",
}
_ACTIVATIONS = {"torch": 500 << 20, "onnx": 250 << 20}
"""Bytes that texts take on their way through a model, and what the libraries load and keep for them."""


@dataclass
class Clock:
    """Goes along a chain.

    Attributes:
        resident: bytes of a process that has loaded its libraries, and nothing else.
        bytes: size of the model at this point of the chain.
        stage: its form.
        bases: how many figures come from where.
    """

    maker: Maker
    exams: Exams
    resident: int
    parameters: int
    bytes: int
    stage: Stage = TORCH
    bases: dict[Basis, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what was measured."""
        self._known = recorded(self.maker.store.root, self.maker.threads)
        self._layers = extent(self.maker.source)[1]

    @property
    def basis(self) -> str:
        """Say where the seconds come from."""
        return ", ".join(f"{self.bases[basis]} {words}" for basis, words in _BASES.items() if basis in self.bases)

    def scored(self, step: PlannedStep) -> PlannedStep:
        """Add to the source what scoring it takes."""
        return self._scored(step, 2 * AGAIN_TOKENS)

    def passed(self, step: PlannedStep, each: Pass) -> PlannedStep:
        """Add to a step, the next of the chain, what it takes; a pass that refuses takes nothing."""
        if step.refusal:
            return step
        step = replace(step, pass_s=self._seconds(each.name(), 0, self.bytes))
        self.bytes, self.stage = step.bytes or self.bytes, each.writes
        return self._scored(step, 0)

    def certifying_s(self, source_bytes: int) -> float:
        """Return the seconds that the last word takes, where items are kept for it: source and finished model."""
        if self.exams.last is None:
            return 0.0
        tokens = self._tokens(self.exams.last.parts)
        scored = ((TORCH, source_bytes), (self.stage, self.bytes))
        return sum(self._seconds(scoring_at(stage), tokens, size) for stage, size in scored)

    def seconds_of(self, steps: Sequence[PlannedStep]) -> dict[str, float]:
        """Return evaluation -> seconds of all scorings of the items that judge it."""
        exam = self.exams.last or self.exams.search
        total = self._tokens(exam.parts)
        spent = self.certifying_s(steps[0].bytes or 0) or sum(step.score_s for step in steps)
        return {name: spent * self._tokens({name: part}) / total for name, part in exam.parts.items()} if total else {}

    def _scored(self, step: PlannedStep, more_tokens: int) -> PlannedStep:
        tokens = self._tokens(self.exams.search.parts)
        if not tokens:
            return replace(step, peak_bytes=self.resident + (step.peak_bytes or 0))
        seconds = self._seconds(scoring_at(self.stage), tokens + more_tokens, self.bytes)
        scoring = step.scoring_bytes + _ACTIVATIONS[self.stage.name]
        return replace(step, score_s=seconds, peak_bytes=self.resident + max(step.peak_bytes or 0, scoring))

    def _tokens(self, parts: Mapping[str, Part]) -> int:
        tasks = {name: self.maker.recipe.evaluate[name] for name in parts}
        return tokens_read(tasks, {name: part.items for name, part in parts.items()})

    def _seconds(self, what: str, tokens: int, size: int) -> float:
        work = Work(what, size, self.parameters, self._layers, tokens)
        told = expected(work, self._known, self.maker.threads)
        self.bases[told.basis] = self.bases.get(told.basis, 0) + 1
        return told.seconds
