"""The record of a run, or of a comparison: what was done, what the gates say, how it ended. Data only, for `--json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from optimizer.errors import ExitCode
from optimizer.gate import Verdict
from optimizer.openings import Openings
from optimizer.speed import SpeedVerdict, Timing

Outcome = Literal["pass", "fail", "inconclusive"]
Effect = Literal["worse", "better", "other"]
Role: TypeAlias = Literal["baseline", "candidate", "pinned"]
Answers: TypeAlias = Literal["scored", "stored", "evidence", "not asked"]
PartName: TypeAlias = Literal["", "search", "certify"]
FORMAT = 1
"""Of the document that `--json` prints; a program that reads it checks this first."""


@dataclass(frozen=True)
class Judged:
    """One gate after one pass: which evaluation, and what it says.

    Attributes:
        score: which of the evaluation's scores is judged; its metric's own name unless the task has several of a kind.
        part: "search" for items that choose between rungs, "certify" for those that judge the one that was chosen, ""
            where there is nothing to choose and all items judge.
    """

    evaluation: str
    verdict: Verdict
    score: str = ""
    part: PartName = ""

    @property
    def judges(self) -> str:
        """Return the name of the score that is judged."""
        return self.score or self.verdict.metric


@dataclass(frozen=True)
class Planned:
    """What the plan said of a step.

    Attributes:
        bytes, pass_s, score_s: as in `Step`.
        peak_bytes: the larger of the two of `Step`.
    """

    bytes: int
    peak_bytes: int
    pass_s: float
    score_s: float


@dataclass(frozen=True)
class Step:
    """One pass, or the source when `name` is "source".

    Attributes:
        changes: what the pass counted, such as `{"layers_quantized": 42}`.
        note: one line worth telling, or why an optional pass was skipped.
        is_skipped: an optional pass refused, or `skip` was the rung; the model went on unchanged.
        rung: which of the fallbacks this is, counted from 1; 0 for the pass itself.
        is_reported: what the gates say stops nothing: a later pass recovers, or the recipe says so.
        is_stored: what the pass made was found in the store.
        is_scored: the scores were made by this run, not found in the store.
        bytes: size on disk of what the runtime would load: weights, and the graph where there is one.
        pass_s: seconds the pass took when it was run, its own checks included.
        pass_peak_bytes: largest resident memory of the process when the pass was run; 0 where that is not measured.
        score_s: seconds the scoring took when it was run; 0 when nothing is evaluated.
        score_peak_bytes: largest resident memory of the process when it was scored; 0 where that is not measured.
        scores: evaluation and metric -> score.
        gates: what the gates say of the model at this point, against the source.
        planned: what was expected; None where nothing could be said beforehand.
    """

    name: str
    bytes: int
    scores: Mapping[str, float]
    gates: tuple[Judged, ...] = ()
    changes: Mapping[str, int] | None = None
    note: str = ""
    is_skipped: bool = False
    rung: int = 0
    is_reported: bool = False
    is_stored: bool = False
    is_scored: bool = False
    pass_s: float = 0.0
    pass_peak_bytes: int = 0
    score_s: float = 0.0
    score_peak_bytes: int = 0
    planned: Planned | None = None

    @property
    def peak_bytes(self) -> int:
        """Return the largest resident memory of pass and scoring."""
        return max(self.pass_peak_bytes, self.score_peak_bytes)


@dataclass(frozen=True)
class SizeVerdict:
    """Size against its budget: plain comparison, for size is no sample.

    Attributes:
        bytes: as in `Step`.
        source_bytes: the source's, as its files store it.
        max_ratio: the budget.
    """

    bytes: int
    source_bytes: int
    max_ratio: float

    @property
    def ratio(self) -> float:
        """Return the size as a share of the source's."""
        return self.bytes / self.source_bytes

    @property
    def outcome(self) -> Outcome:
        """Return "pass" or "fail"."""
        return "pass" if self.ratio <= self.max_ratio else "fail"


@dataclass(frozen=True)
class Flip:
    """One item whose answer changed.

    Attributes:
        item: its number in the evaluation, counted from 1.
        input: what was asked, cut where it is long.
        before: the source's answer.
        after: the model's.
        expected: the right one; None where none is known.
        effect: "worse" is right before and wrong after; "other" neither worse nor better, or not known.
    """

    item: int
    input: str
    before: str
    after: str
    expected: str | None
    effect: Effect


@dataclass(frozen=True)
class Flips:
    """The answers of one evaluation that changed.

    Attributes:
        changed: how many.
        answers: of how many.
        unit: what an answer is: "answers", one an item, or a decoder's "next tokens".
        shown: some of them in words, those that became worse first.
    """

    evaluation: str
    changed: int
    answers: int
    unit: str
    shown: tuple[Flip, ...]


@dataclass(frozen=True)
class Rejected:
    """A rung that did not do.

    Attributes:
        index: of the pass in the chain, counted from 0.
        step: what it did; of a pass that refused, its note says why.
        reason: why another was tried, in a clause.
    """

    index: int
    step: Step
    reason: str


@dataclass(frozen=True)
class Run:
    """How a recipe ended.

    Attributes:
        steps: the source, then the passes of the chain that was kept.
        rejected: the rungs tried before, in order.
        certified: what the items say that were kept for the last word; empty where every gate used all items.
        openings: how often the items that judge were opened, over all runs.
        noise: evaluation/score -> share of items that the source scores differently when asked again, if any.
        artifact: folder of the artifact, None where none was made.
        digest: identity of the artifact.
        earlier: folder where an artifact of an earlier run still lies, when this run made none.
        stopped_after: the pass the user asked to stop after.
        seconds: of this run, what was found in the store not included.
        flips: answers of the last model that differ from the source's.
        speeds: what the speed gates say of the last model.
        timing: under what conditions that was measured.
    """

    name: str
    steps: tuple[Step, ...]
    size: SizeVerdict | None
    artifact: str | None
    digest: str | None
    stopped_after: str | None
    seconds: float
    earlier: str | None = None
    flips: tuple[Flips, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    certified: tuple[Judged, ...] = ()
    openings: tuple[Openings, ...] = ()
    noise: Mapping[str, float] = field(default_factory=dict)
    speeds: tuple[SpeedVerdict, ...] = ()
    timing: Timing | None = None

    @property
    def verdicts(self) -> tuple[Judged, ...]:
        """Return what the gates say of the last model, on the items that judge."""
        return self.certified or self.steps[-1].gates

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what every gate says of the last model."""
        return _outcomes(self.verdicts, self.size, self.speeds)

    @property
    def outcome(self) -> Outcome:
        """Return what all gates together say."""
        return together(self.outcomes)

    @property
    def exit_code(self) -> ExitCode:
        """Return 1 when a gate failed, 3 when one is undecided, else 0."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> str:
        """Return the run as one JSON document; numbers that JSON cannot say are null."""
        content = {"format": FORMAT, "exit_code": int(self.exit_code), **asdict(self), "size": _told_size(self.size)}
        return json.dumps(sayable(content), indent=1, sort_keys=True)


@dataclass(frozen=True)
class Compared:
    """An artifact that is compared.

    Attributes:
        role: what it is here.
        folder: as it was named.
        digest: its identity.
        bytes: as in `Step`.
        scores: evaluation and metric -> score; empty where nothing had to be scored.
        answers: where its answers come from.
        score_s: seconds the scoring took when it was done.
    """

    role: Role
    folder: str
    digest: str
    bytes: int
    scores: Mapping[str, float]
    answers: Answers
    score_s: float


@dataclass(frozen=True)
class Against:
    """The candidate judged against one other artifact.

    Attributes:
        reference: what it is judged against.
        is_same: both are one artifact, byte for byte: no answer can differ, so that none is judged.
        gates: what the gates say of the candidate.
        flips: answers of the candidate that differ from the reference's.
        speeds: what the speed gates say of the candidate.
        timing: under what conditions; None where no speed was measured.
    """

    reference: Compared
    is_same: bool
    gates: tuple[Judged, ...]
    size: SizeVerdict | None
    flips: tuple[Flips, ...]
    speeds: tuple[SpeedVerdict, ...] = ()
    timing: Timing | None = None

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what every gate says."""
        return _outcomes(self.gates, self.size, self.speeds)


@dataclass(frozen=True)
class Comparison:
    """How one artifact does against another, and against a pinned one where that is asked for.

    Attributes:
        policy: the file with data, tasks and budgets.
        against: the baseline first.
        notes: what a reader should know, such as a budget that does not apply here.
        seconds: of this comparison, what was found in the store not included.
    """

    policy: str
    candidate: Compared
    against: tuple[Against, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def outcome(self) -> Outcome:
        """Return what all gates together say."""
        return together([outcome for each in self.against for outcome in each.outcomes])

    @property
    def exit_code(self) -> ExitCode:
        """Return 1 when a gate failed, 3 when one is undecided, else 0."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> str:
        """Return the comparison as one JSON document; numbers that JSON cannot say are null."""
        against = [{**asdict(each), "size": _told_size(each.size)} for each in self.against]
        content = {"format": FORMAT, "exit_code": int(self.exit_code), **asdict(self), "against": against}
        return json.dumps(sayable(content), indent=1, sort_keys=True)


EXIT_CODES: Mapping[Outcome, ExitCode] = {
    "pass": ExitCode.PASS,
    "fail": ExitCode.FAIL,
    "inconclusive": ExitCode.INCONCLUSIVE,
}


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Return "fail" when one failed, "inconclusive" when one is undecided, else "pass"."""
    if "fail" in outcomes:
        return "fail"
    return "inconclusive" if "inconclusive" in outcomes else "pass"


def _outcomes(gates: Sequence[Judged], size: SizeVerdict | None, speeds: Sequence[SpeedVerdict]) -> tuple[Outcome, ...]:
    judged = (each.verdict.outcome for each in gates)
    return (*judged, *((size.outcome,) if size else ()), *(each.outcome for each in speeds))


def _told_size(size: SizeVerdict | None) -> Mapping[str, Any] | None:
    return None if size is None else {**asdict(size), "ratio": size.ratio, "outcome": size.outcome}


def sayable(value: Any) -> Any:
    """Return a value with null in the place of numbers that JSON cannot say, whatever it is nested in."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: sayable(item) for key, item in value.items()}
    return [sayable(item) for item in value] if isinstance(value, list | tuple) else value
