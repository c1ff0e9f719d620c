"""Ask source and candidate the same items, no more of them than the gates need, and judge.

What a model answers to a portion of items is stored; evaluations on the same items share one pass through the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from optimizer.costs import Work, extent, measured, scoring_at
from optimizer.errors import CannotRun
from optimizer.evaluate.items import Item, encoded_again, items_hash, tokens_read
from optimizer.evaluate.parts import Part
from optimizer.evaluate.result import TaskResult, joined
from optimizer.evaluate.result import load as load_result
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.text_reader import TextReader
from optimizer.exams import Exam
from optimizer.fingerprint import fingerprint, source_fingerprint
from optimizer.gate import Spending, Verdict, judge, noise, require_judgeable
from optimizer.lock import machine, versions
from optimizer.recipe import Policy, Recipe
from optimizer.record import Judged
from optimizer.report import Reporter
from optimizer.store import Entry, Store
from passes._kind import kind_of
from passes.base import ONNX, TORCH, Model

Results = Mapping[str, TaskResult]
AGAIN_TOKENS = 2048
"""Tokens that the source is asked twice."""
Known = Callable[[Model, str, Sequence[Item]], TaskResult | None]


def no_answers(model: Model, name: str, items: Sequence[Item]) -> None:
    """Know nothing: every model is asked."""


@dataclass
class Asked:
    """What asking one model took.

    Attributes:
        is_scored: it was scored by this run, not found in the store.
        score_s: seconds the scoring took when it was done.
        peak_bytes: largest resident memory of the process meanwhile; 0 where that is not measured.
    """

    is_scored: bool = False
    score_s: float = 0.0
    peak_bytes: int = 0

    def add(self, entry: Entry) -> None:
        """Count the answers to another portion."""
        self.is_scored |= entry.is_new
        self.score_s += entry.meta["seconds"]
        self.peak_bytes = max(self.peak_bytes, entry.meta.get("peak_bytes", 0))


@dataclass
class Examined:
    """What came out.

    Attributes:
        items: that were asked.
        results: the candidate's, on these items.
        source: the source's, on the same items.
        gates: the verdicts.
        asked: what asking the candidate took.
        source_asked: what asking the source took.
    """

    items: dict[str, list[Item]] = field(default_factory=dict)
    results: dict[str, TaskResult] = field(default_factory=dict)
    source: dict[str, TaskResult] = field(default_factory=dict)
    gates: tuple[Judged, ...] = ()
    asked: Asked = field(default_factory=Asked)
    source_asked: Asked = field(default_factory=Asked)

    def cost(self) -> dict[str, Any]:
        """Return what the scoring took, as a step of the record names it."""
        asked = self.asked
        return {"is_scored": asked.is_scored, "score_s": asked.score_s, "score_peak_bytes": asked.peak_bytes}

    def points(self) -> dict[str, float]:
        """Return evaluation and metric -> score of the candidate."""
        return points(self.results)


@dataclass
class Examiner:
    """Asks models of one recipe.

    Attributes:
        source: the untouched model.
        source_key: names all that decided it.
        reader: how all models read text.
        noise: evaluation/score -> share of items that the source scores differently when asked again, in other batches.
        others: evaluation -> how candidates read its texts, where they have another tokenizer.
        known: gives a model's answers to items of an evaluation that need not be asked; None where it has none.
        role: how the source is called while it is scored.
    """

    recipe: Recipe | Policy
    store: Store
    told: Reporter
    source: Model
    source_key: str
    threads: int
    reader: TextReader
    noise: dict[str, float] = field(default_factory=dict)
    others: Mapping[str, TextReader] = field(default_factory=dict)
    known: Known = no_answers
    role: str = "source"

    @property
    def _kind(self) -> str:
        return kind_of(self.source.config)

    @cached_property
    def _circumstances(self) -> list[Any]:
        """Return what decides an answer besides model, items and threads."""
        return [scoring_code(), versions(), machine()]

    def examine(self, what: str, model: Model, key: str, exam: Exam) -> Examined:
        """Ask a model and judge it; the source itself is asked the first portion and not judged.

        Args:
            what: how the model is called while it is scored.
            model: the candidate.
            key: names all that decided it.
            exam: what to ask.
        """
        found = Examined()
        for names in _together(exam.parts):
            gates = self._ask(names, what, model, key, exam, found)
            found.gates += gates
        found.gates = tuple(sorted(found.gates, key=lambda gate: list(exam.parts).index(gate.evaluation)))
        return found

    def _ask(
        self, names: Sequence[str], what: str, model: Model, key: str, exam: Exam, found: Examined
    ) -> tuple[Judged, ...]:
        """Ask the evaluations that have the same items, portion by portion, until all their gates are decided."""
        part, before, after = exam.parts[names[0]], list[Results](), list[Results]()
        verdicts: dict[tuple[str, int], Verdict] = {}
        for portion in part.portions:
            before.append(self._answers(self.role, self.source, self.source_key, names, portion, None, found))
            if model is self.source:
                self._note(names, part, before, before, found)
                found.asked = found.source_asked
                self._ask_again([name for name in names if self.recipe.limits(name)], portion)
                return ()
            other = self.others.get(names[0])
            asked = encoded_again(portion, other) if other else portion
            after.append(self._answers(what, model, key, names, asked, before[-1], found))
            self._note(names, part, before, after, found)
            verdicts = {
                (name, place): self._judged(name, place, found, exam, verdicts.get((name, place)))
                for name in names
                for place in range(len(self.recipe.limits(name)))
            }
            if verdicts and all(map(_is_over, verdicts.values())):
                break
        return tuple(
            Judged(name, verdict, self.recipe.limits(name)[place].score, exam.name)
            for (name, place), verdict in verdicts.items()
        )

    def _ask_again(self, names: Sequence[str], items: Sequence[Item]) -> None:
        """Ask the source a few items twice, in batches and one by one: whatever differs is noise that a gate counts."""
        if not names:
            return
        tasks = {name: self.recipe.evaluate[name] for name in names}
        sample = _first_few(items, max(getattr(task, "max_tokens", 0) for task in tasks.values()))
        asked = {name: [items_hash(sample, 0), task.identity()] for name, task in tasks.items()}

        def ask(folder: Path) -> Mapping[str, Any]:
            together, alone = (scorer_of(self.source, self._kind, self.threads, alone=alone) for alone in (False, True))
            items_of = dict.fromkeys(names, sample)
            with self.told.progress("asking the source again") as progress:
                first = evaluate(tasks, items_of, together, None, progress, self.reader)
                second = evaluate(tasks, items_of, alone, first, progress, self.reader)
            return {
                f"{name}/{score}": noise(scores, second[name].scores[score])
                for name in names
                for score in {budget.judges for budget in self.recipe.limits(name)}
                if (scores := first[name].scores.get(score))
            }

        parts = ["noise", self._circumstances, self.source_key, asked, self.threads]
        self.noise |= self.store.get_or_build(fingerprint(parts), ask).meta

    def _note(
        self, names: Sequence[str], part: Part, before: Sequence[Results], after: Sequence[Results], found: Examined
    ) -> None:
        for name in names:
            task = self.recipe.evaluate[name]
            compute = getattr(getattr(task, "module", None), "compute", None) if len(after) > 1 else None
            found.items[name] = [item for portion in part.portions[: len(after)] for item in portion]
            found.source[name] = joined([results[name] for results in before], compute)
            found.results[name] = joined([results[name] for results in after], compute)

    def _judged(self, name: str, place: int, found: Examined, exam: Exam, last: Verdict | None) -> Verdict:
        """Judge one score by one budget, unless an earlier look has decided it."""
        if last is not None and _is_over(last):
            return last
        budget, part = self.recipe.limits(name)[place], exam.parts[name]
        source, candidate = found.source[name].scores, found.results[name].scores
        for scores in (source, candidate):
            try:
                require_judgeable(scores, budget)
            except ValueError as error:
                raise CannotRun(f"gate.{name}.{error}") from None
        return judge(
            source[budget.judges],
            candidate[budget.judges],
            budget,
            alpha=exam.alpha,
            fail_alpha=exam.fail_alpha,
            chance=self.recipe.evaluate[name].chance(part.items),
            self_noise=self.noise.get(f"{name}/{budget.judges}", 0.0),
            spending=Spending(part.units, last.looked_at if last else 0) if len(part.portions) > 1 else None,
        )

    def _answers(
        self,
        what: str,
        model: Model,
        key: str,
        names: Sequence[str],
        items: Sequence[Item],
        against: Results | None,
        found: Examined,
    ) -> Results:
        """Return a model's answers to some items, from the store or from the model."""
        known = {name: result for name in names if (result := self.known(model, name, items)) is not None}
        names = [name for name in names if name not in known]
        if not names:
            return known
        asked = {name: [items_hash(items, 0), self.recipe.evaluate[name].identity()] for name in names}
        source_key = "" if against is None else self.source_key
        parts = ["scores", self._circumstances, key, asked, self.threads, source_key]
        entry = self.store.get_or_build(
            fingerprint(parts), lambda folder: self._evaluate(what, model, names, items, against, folder)
        )
        (found.source_asked if against is None else found.asked).add(entry)
        return {**known, **{name: load_result(entry.folder / name) for name in names}}

    def _evaluate(
        self,
        what: str,
        model: Model,
        names: Sequence[str],
        items: Sequence[Item],
        against: Results | None,
        folder: Path,
    ) -> Mapping[str, Any]:
        scorer = scorer_of(model, self._kind, self.threads)
        tasks, asked = {name: self.recipe.evaluate[name] for name in names}, {name: list(items) for name in names}
        work = Work(scoring_at(model.stage), weights_bytes(model), *extent(self.source), tokens_read(tasks, asked))
        with (
            self.told.progress(f"scoring {what}") as progress,
            measured(self.store.root, work, self.threads) as spent,
        ):
            results = evaluate(tasks, asked, scorer, against, progress, self.reader)
        for name, result in results.items():
            result.save(folder / name)
        return {"seconds": spent.seconds, "peak_bytes": spent.peak_bytes}


def _first_few(items: Sequence[Item], answer_tokens: int) -> list[Item]:
    """Return the first items that have `AGAIN_TOKENS` tokens together with their answers; whole questions."""
    taken: list[Item] = []
    tokens = 0
    for item in items:
        if tokens >= AGAIN_TOKENS and (item.unit is None or item.unit != taken[-1].unit):
            break
        taken.append(item)
        tokens += sum(map(len, item.texts)) + answer_tokens
    return taken


def points(results: Results) -> dict[str, float]:
    """Return evaluation and metric -> score."""
    return {
        f"{name}/{metric}": scores.point for name, result in results.items() for metric, scores in result.scores.items()
    }


def weights_bytes(model: Model) -> int:
    """Return the size of the files that hold the weights and the graph."""
    if model.stage == TORCH:
        from passes._safetensors import weight_files

        return sum(path.stat().st_size for path in weight_files(model.folder))
    from passes._graph import weight_bytes

    return weight_bytes(model.folder)


def scorer_of(model: Model, kind: str, threads: int, alone: bool = False) -> Any:
    """Return what answers for a model at a stage that can be scored, each item by itself where `alone` says so."""
    from optimizer.evaluate.scorers import RuntimeScorer, TorchScorer

    if model.stage == TORCH:
        importlib.import_module("passes._walk")  # with torch and transformers, whose loading is not scoring
        return TorchScorer(model, kind, threads, **({"tokens_per_batch": 1} if alone else {}))
    if model.stage == ONNX:
        return RuntimeScorer(model.folder / "model.onnx", kind, threads)
    raise CannotRun(f"a model at stage {model.stage} cannot be scored; expected {TORCH} or {ONNX}")


def scoring_code() -> str:
    """Return the hash of the code that turns a model and items into scores, as far as it is ours."""
    import optimizer.evaluate
    import passes
    import runtime

    folders = (*optimizer.evaluate.__path__, *runtime.__path__)
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    of_passes = [source_fingerprint(Path(passes.__path__[0]) / name) for name in ("_walk.py", "_pooling.py")]
    return fingerprint(
        [of_passes, {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8") for path in files}]
    )


def _together(parts: Mapping[str, Part]) -> list[list[str]]:
    """Group evaluations that ask the same items in the same portions."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, part in parts.items():
        shared.setdefault(tuple(items_hash(portion, 0) for portion in part.portions), []).append(name)
    return list(shared.values())


def _is_over(verdict: Verdict) -> bool:
    """Tell whether more items would change nothing."""
    return verdict.outcome != "inconclusive" or verdict.is_hopeless
