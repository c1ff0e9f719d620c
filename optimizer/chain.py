"""A model on its way through the passes: what follows each gate, which rung is tried, and who has the last word.

Where a pass has `otherwise`, the items are split. *Search* items choose: a rung that they show to be over budget, or
whose loss on them is above it, gives way to the next. *Certify* items judge the finished model and nothing else; a
model that does not pass there gives way too, and the next one is judged at half the level (docs/gates.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from optimizer.errors import CannotRun
from optimizer.evaluate.flips import find_flips
from optimizer.evaluate.items import items_hash
from optimizer.examiner import Examined, Examiner, weights_bytes
from optimizer.exams import Exams
from optimizer.fingerprint import fingerprint
from optimizer.maker import Maker
from optimizer.openings import Openings, opened
from optimizer.plan import source_name
from optimizer.planned import Plan
from optimizer.ranking import choosing_texts, rank
from optimizer.recipe import Keep, Recipe, Skip, rung_text
from optimizer.record import Flips, Judged, Rejected, Run, SizeVerdict, Step
from optimizer.report import Reporter, label
from optimizer.sensitivity import keep, kept_text
from optimizer.spreads import note
from optimizer.stopwatch import Stopwatch
from optimizer.store import Store
from passes._kind import kind_of
from passes.base import Model, Pass, PassError


@dataclass(frozen=True)
class Point:
    """The model between two passes.

    Attributes:
        key: names all that decided it.
        step: what led here.
        taken: the pass that did; None where nothing was done.
        examined: what it answered.
    """

    model: Model
    key: str
    step: Step
    taken: Pass | None
    examined: Examined


@dataclass
class Chain:
    """A model on its way through the passes.

    Attributes:
        exams: which items choose and which judge, at which levels.
        path: the models so far, the source first; those of rungs that were given up are gone from it.
        rungs: which fallback of each pass is tried, 0 for the pass itself.
        rejected: the rungs that did not do.
        openings: how often a finished model was judged.
        ledger: evaluation -> how often its items were opened, over all runs.
    """

    recipe: Recipe
    store: Store
    told: Reporter
    exams: Exams
    examiner: Examiner
    maker: Maker
    stopwatch: Stopwatch
    plan: Plan
    path: list[Point] = field(default_factory=list)
    rungs: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    openings: int = 0
    ledger: dict[str, Openings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with the source."""
        model, key = self.examiner.source, self.examiner.source_key
        examined = self.examiner.examine("source", model, key, self.exams.search)
        step = Step("source", weights_bytes(model), examined.points(), planned=self.plan.of(0), **examined.cost())
        self.path.append(Point(model, key, step, None, examined))
        self.rungs = [0] * len(self.recipe.passes)

    def climb(self, stop_after: str | None, must_end: bool) -> Run:
        """Run the passes, and other rungs where gates fail, until a model passes or nothing is left to try."""
        self._tell()
        while True:
            is_over = self._run_passes(stop_after, must_end)
            if is_over or stop_after is not None:
                return self._ended(None, (), stop_after)
            size = self._size()
            if size and size.outcome == "fail" and self._fall_back("the model is too large"):
                continue
            speeds, timing = self.stopwatch.judge(self.path[-1].model)
            if any(speed.outcome != "pass" for speed in speeds) and self._fall_back("not shown to be fast enough"):
                continue
            certified = self._certify()
            judged = certified or self.path[-1].step.gates
            if any(gate.verdict.outcome != "pass" for gate in judged) and self._fall_back("a gate did not pass it"):
                continue
            return replace(self._ended(size, certified, None), speeds=speeds, timing=timing)

    def _run_passes(self, stop_after: str | None, must_end: bool) -> bool:
        """Run the passes that are left, or other rungs where gates fail; return whether a gate or the user ends it."""
        while len(self.path) <= len(self.recipe.passes):
            index = len(self.path) - 1
            try:
                point = self._advance(index)
            except PassError as refusal:
                if self._has_rungs(index):
                    self._reject(index, Step(self.recipe.passes[index].name(), 0, {}), str(refusal))
                    continue
                if not self.recipe.passes[index].optional:
                    raise
                point = self._unchanged(index, str(refusal))
            self.path.append(point)
            self._tell()
            step = point.step
            reason = "" if step.is_reported else self._miss(step)
            if reason and self._fall_back(reason):
                continue
            has_failed = not step.is_reported and any(gate.verdict.outcome == "fail" for gate in step.gates)
            if (has_failed and not must_end) or step.name == stop_after:
                return True
        return False

    # ---- one pass

    def _advance(self, index: int) -> Point:
        """Take the next step, by the rung whose turn it is.

        Raises:
            PassError: the pass refused the model.
        """
        first, rung = self.recipe.passes[index], self.rungs[index]
        chosen = self.recipe.fallback(index).otherwise[rung - 1] if rung else first
        if isinstance(chosen, Skip):
            return self._unchanged(index, "as `otherwise` says")
        each, kept = self._keeping(first, chosen, index) if isinstance(chosen, Keep) else (chosen, "")
        before = self.path[-1]
        model, entry = self.maker.make(each, index, before.model, before.key, each.name())
        examined = self.examiner.examine(each.name(), model, entry.key, self.exams.search)
        self._note(examined, [*self._taken(), each])
        meta = entry.meta
        step = Step(
            name=each.name(),
            bytes=weights_bytes(model),
            scores=examined.points(),
            gates=examined.gates,
            changes=meta["changes"],
            note="; ".join(filter(None, (meta["note"], kept))),
            rung=rung,
            is_reported=self.recipe.reports_only(index),
            is_stored=not entry.is_new,
            pass_s=meta["seconds"],
            pass_peak_bytes=meta.get("peak_bytes", 0),
            planned=self.plan.of(index + 1, rung),
            **examined.cost(),
        )
        return Point(model, entry.key, step, each, examined)

    def _taken(self) -> list[Pass]:
        return [point.taken for point in self.path if point.taken is not None]

    def _note(self, examined: Examined, passes: Sequence[Pass]) -> None:
        """Remember what gates found, for plans to come."""
        if examined.asked.is_scored:
            key, kind = source_name(self.recipe, self.maker.source), kind_of(self.maker.source.config)
            for judged in examined.gates:
                note(self.store.root, key, passes, judged, examined.items[judged.evaluation], kind)

    def _unchanged(self, index: int, reason: str) -> Point:
        """Leave a pass out."""
        before, name = self.path[-1], self.recipe.passes[index].name()
        size, rung = weights_bytes(before.model), self.rungs[index]
        step = Step(name, size, before.step.scores, before.step.gates, {}, reason, is_skipped=True, rung=rung)
        return replace(before, step=step, taken=None)

    # ---- which rung

    def _miss(self, step: Step) -> str:
        """Return why the model after a step should give way where there is a choice; "" when it need not."""
        for gate in step.gates:
            verdict = gate.verdict
            if verdict.outcome == "fail":
                return f"{label(gate)}: {verdict.reason}"
            if not verdict.difference <= verdict.limit:
                return f"{label(gate)}: the loss seen is above the budget"
        return ""

    def _keeping(self, first: Pass, chosen: Keep, index: int) -> tuple[Pass, str]:
        """Return the pass with the layers it damages most in another format, and in words which they are."""
        before = self.path[-1]
        texts = choosing_texts(self.maker, self.exams, index, chosen.calibration)
        if texts is None:
            raise CannotRun(
                f"passes.{index}.otherwise: keep: too few items to set some aside for choosing layers; add "
                "`calibration: NAME`, an entry of `data` with other texts"
            )
        ranked = rank(self.maker, index, before.model, before.key, texts)
        worst = ranked.worst(chosen.worst, chosen.format)
        return keep(first, worst, chosen.format), kept_text(worst, chosen.format)

    def _has_rungs(self, index: int) -> bool:
        return self.rungs[index] < len(self.recipe.fallback(index).otherwise)

    def _fall_back(self, reason: str) -> bool:
        """Give up the last step that another rung can take the place of; return whether there is one."""
        for index in reversed(range(len(self.path) - 1)):
            if self._has_rungs(index):
                step = self.path[index + 1].step
                del self.path[index + 1 :]
                self._reject(index, step, reason)
                return True
        return False

    def _reject(self, index: int, step: Step, reason: str) -> None:
        rungs = self.recipe.fallback(index).otherwise
        self.rejected.append(Rejected(index, replace(step, rung=self.rungs[index]), reason))
        self.rungs[index] += 1
        number = self.rungs[index]
        self.told.fallback(self.rejected[-1], number, len(rungs), rung_text(rungs[number - 1]))

    # ---- the end

    def _certify(self) -> tuple[Judged, ...]:
        """Let the items kept for it judge the finished model; return nothing where all items have judged it already."""
        self.openings += 1
        point, exam, certified = self.path[-1], self.exams.certify(self.openings), tuple[Judged, ...]()
        if exam is not None:
            examined = self.examiner.examine("the finished model", point.model, point.key, exam)
            self.path[-1], certified = replace(point, examined=examined), examined.gates
            self._note(examined, self._taken())
        for name in self.recipe.gate.budgets:
            part = (exam or self.exams.search).parts[name]
            judging = fingerprint([items_hash(part.items, 0), self.path[0].key])
            self.ledger[name] = opened(self.store.root, name, judging, point.key, self.recipe.gate.alpha)
        return certified

    def _ended(self, size: SizeVerdict | None, certified: tuple[Judged, ...], stopped_after: str | None) -> Run:
        return Run(
            name=self.recipe.name,
            steps=tuple(point.step for point in self.path),
            size=size,
            artifact=None,
            digest=None,
            stopped_after=stopped_after,
            seconds=0.0,
            rejected=tuple(self.rejected),
            certified=certified,
            openings=tuple(self.ledger.values()),
            noise={name: share for name, share in self.examiner.noise.items() if share},
            flips=self._flips(),
        )

    def _flips(self) -> tuple[Flips, ...]:
        """Return the answers of the last model that differ from the source's."""
        found = self.path[-1].examined
        tasks = {name: self.recipe.evaluate[name] for name in found.results}
        return find_flips(tasks, found.items, found.source, found.results, self.maker.reader)

    def _size(self) -> SizeVerdict | None:
        """Compare the size of the weights with the source's, both as stored."""
        budget = self.recipe.gate.size
        if budget is None:
            return None
        return SizeVerdict(self.path[-1].step.bytes, self.path[0].step.bytes, budget.max_ratio)

    def _tell(self) -> None:
        """Say what the last step did."""
        width = max(len(name) for name in ("source", *(each.name() for each in self.recipe.passes)))
        number, total = len(self.path) - 1, len(self.recipe.passes)
        self.told.step(number, total, self.path[-1].step, self.path[0].step if number else None, width)
