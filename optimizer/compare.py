"""Two artifacts, judged by the gates: is the candidate shown to be no worse than the budget allows?

The baseline takes the role of the source. Both are asked the same items, anew: what stands in an artifact's `evidence/`
is outside its identity, so that anyone may have written it, and is taken only when the caller trusts it. A candidate
that is judged against the release before it alone may lose a little each time; a pinned artifact stops that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from optimizer.errors import CannotRun, CommandError, RecipeError
from optimizer.evaluate.flips import find_flips
from optimizer.evaluate.items import Item, encoded_again, items_hash, load_items
from optimizer.evaluate.parts import count_units
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.result import load as load_result
from optimizer.evaluate.text_reader import TextReader
from optimizer.examiner import Examined, Examiner, Known, Results, no_answers, points, weights_bytes
from optimizer.exams import Exam, portioned
from optimizer.fingerprint import fingerprint
from optimizer.package import has_artifact
from optimizer.recipe import Policy
from optimizer.recipe_reader import load_policy
from optimizer.record import Against, Answers, Compared, Comparison, Role, SizeVerdict
from optimizer.report import Reporter, Style, comparison_lines
from optimizer.source import read_object
from optimizer.speed import SpeedVerdict, Timing
from optimizer.speed_restarts import Setup, measure, require_measurable
from optimizer.store import Store, default_limit, default_root
from passes.base import ONNX, Model, PassError
from runtime.artifact import EVIDENCE, Manifest, verify
from runtime.errors import ServingError
from runtime.threads import default_threads

_NOT_JUDGED = "not judged, a recipe's budget counts against its own source"
RELATIVE = ("flips", "kl", "spearman")
"""Scores that may have been made against another model than the one that is compared now."""


def compare(
    baseline: Path,
    candidate: Path,
    *,
    policy: Path | None = None,
    settings: Sequence[str] = (),
    pinned: Path | None = None,
    trust_evidence: bool = False,
    store: Path | None = None,
    reporter: Style = "quiet",
) -> Comparison:
    """Judge one artifact against another.

    Args:
        baseline: folder of the artifact that the candidate may replace.
        candidate: folder of the artifact that is judged.
        policy: file with data, evaluate and gate; the candidate's own recipe if not given.
        settings: what to change in it, such as `data.test.csv=test.csv`.
        pinned: folder of an artifact that the candidate is judged against as well, by the same budgets.
        trust_evidence: take answers from the artifacts' evidence/ where they are to exactly these items.
        store: folder of scores; the user's cache if not given.
        reporter: what is shown while it runs.

    Raises:
        OptimizeError: the artifacts cannot be compared, the policy is wrong, or the work cannot be done.
    """
    told = Reporter(reporter)
    try:
        done = _compare(baseline, candidate, policy, settings, pinned, trust_evidence, store, told)
    except (PassError, ServingError) as error:
        raise CannotRun(str(error)) from error
    for line in comparison_lines(done):
        told.line(line)
    return done


def _compare(
    baseline: Path,
    candidate: Path,
    policy: Path | None,
    settings: Sequence[str],
    pinned: Path | None,
    trust_evidence: bool,
    store: Path | None,
    told: Reporter,
) -> Comparison:
    start = time.perf_counter()
    judged = _Side.open("candidate", candidate)
    references = [_Side.open("baseline", baseline), *([_Side.open("pinned", pinned)] if pinned else [])]
    for side in references:
        _require_comparable(side, judged)
    file = policy or candidate / "recipe.yaml"
    rules = _policy(file, settings, is_own=policy is None)
    with Store(store or default_root(), default_limit(), told.warn) as opened:
        bench = _Bench(rules, judged, len(references), opened, told, trust_evidence)
        against = tuple(map(bench.judge, references))
    notes = tuple(dict.fromkeys(bench.notes))
    return Comparison(str(file), bench.compared, against, notes, time.perf_counter() - start)


@dataclass(frozen=True)
class _Side:
    """An artifact, every file of it checked."""

    role: Role
    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, role: Role, folder: Path) -> _Side:
        """Check the artifact in a folder."""
        if not has_artifact(folder):
            name = _option(role)
            raise CommandError(f"{name}: {folder} is no artifact, expected a folder with manifest.json")
        return cls(role, folder, verify(folder))

    @property
    def option(self) -> str:
        """Return what names it on the command line."""
        return _option(self.role)

    @cached_property
    def model(self) -> Model:
        """Return the artifact as a model that can be scored."""
        return Model(ONNX, self.folder, self.folder, read_object(self.folder / "config.json"))

    @property
    def key(self) -> str:
        """Name all that decides its answers."""
        return fingerprint(["artifact", self.manifest.digest])

    @cached_property
    def reader(self) -> TextReader:
        """Return how it reads text."""
        return TextReader.of_artifact(self.folder, self.manifest)

    def told_answers(self, task: Any, name: str, items: Sequence[Item]) -> TaskResult | None:
        """Return the answers in its evidence; None where they are not to these items, asked in this way."""
        try:
            lock = json.loads((self.folder / "optimize.lock").read_bytes())
            asked = fingerprint([lock["evaluate"][name], lock["items"][name]])
            if asked != fingerprint([task.identity(), items_hash(items, 0)]):
                return None
            found = load_result(self.folder / EVIDENCE / "items" / name / "artifact")
        except (OSError, ValueError, KeyError, TypeError):
            return None
        wanted = {"nats_per_byte": None, "": items_hash(items, getattr(task, "context", None))}
        for metric, scores in found.scores.items():
            if scores.metric in RELATIVE or len(scores.groups) != count_units(items):
                return None
            if wanted.get(metric, wanted[""]) not in (None, scores.items):
                return None
        return found


def _option(role: Role) -> str:
    return "--pinned" if role == "pinned" else role.upper()


def _require_comparable(reference: _Side, candidate: _Side) -> None:
    """Refuse one folder in two roles, and artifacts of different kinds.

    Raises:
        CommandError: says what they are.
    """
    name = reference.option
    if reference.folder.resolve() == candidate.folder.resolve():
        raise CommandError(f"{name}: got {reference.folder}, which is CANDIDATE too, expected another artifact")
    if reference.manifest.kind != candidate.manifest.kind:
        kinds = f"{reference.manifest.described_kind}, CANDIDATE {candidate.manifest.described_kind}"
        raise CommandError(f"{name}: {reference.folder} is {kinds}; expected two artifacts of one kind")
    if reference.manifest.labels != candidate.manifest.labels:
        raise CommandError(f"{name}: {reference.folder} has other labels than CANDIDATE, or in another order")


def _policy(file: Path, settings: Sequence[str], is_own: bool) -> Policy:
    """Read the policy; mistakes in the candidate's own recipe say where to put them right.

    Raises:
        CommandError: there is none, or it has no budget.
        RecipeError: it is wrong.
    """
    if is_own and not file.is_file():
        raise CommandError(f"CANDIDATE: {file.parent} has no recipe.yaml with data and budgets; give a --policy")
    try:
        rules = load_policy(file, settings)
    except RecipeError as error:
        advice = "; this is the candidate's own recipe: correct it by --set, or give a --policy" if is_own else ""
        raise RecipeError([replace(each, message=each.message + advice) for each in error.mistakes]) from None
    has_others = not rules.is_recipe and (rules.gate.size is not None or rules.gate.speeds)
    if not has_others and not any(rules.limits(name) for name in rules.evaluate):
        raise CommandError(f"{file}: gate: has no budget that two artifacts can be judged by; add one, see docs/ci.md")
    return rules


@dataclass
class _Bench:
    """Judges one candidate.

    Attributes:
        references: how many artifacts it is judged against.
        compared: what is told of the candidate.
        notes: what a reader of the record should know.
    """

    rules: Policy
    candidate: _Side
    references: int
    store: Store
    told: Reporter
    trust_evidence: bool
    compared: Compared = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compared = _compared(self.candidate, {}, "not asked", 0.0)

    @property
    def threads(self) -> int:
        """Return how many threads an operator has."""
        return self.rules.target.threads or default_threads()

    def judge(self, reference: _Side) -> Against:
        """Judge the candidate against one other artifact; an artifact that is the same one is not asked."""
        size = self._size(reference)
        speeds, timing = self._speeds(reference)
        if reference.manifest.digest == self.candidate.manifest.digest:
            return Against(_compared(reference, {}, "not asked", 0.0), True, (), size, (), speeds, timing)
        found = self._examine(reference)
        tasks = {name: self.rules.evaluate[name] for name in found.results}
        flips = find_flips(tasks, found.items, found.source, found.results, reference.reader)
        before, asked = self.compared, found.asked
        self.compared = _compared(
            self.candidate,
            {**points(found.results), **before.scores},
            _came(found.results, asked.is_scored or before.answers == "scored", asked.score_s),
            before.score_s + asked.score_s,
        )
        asked = found.source_asked
        came = _came(found.source, asked.is_scored, asked.score_s)
        told = _compared(reference, points(found.source), came, asked.score_s)
        return Against(told, False, found.gates, size, flips, speeds, timing)

    def _examine(self, reference: _Side) -> Examined:
        """Ask both the same items and judge."""
        others, items = self._items(reference)
        examiner = Examiner(
            recipe=self.rules,
            store=self.store,
            told=self.told,
            source=reference.model,
            source_key=reference.key,
            threads=self.threads,
            reader=reference.reader,
            others=others,
            known=self._known(reference) if self.trust_evidence else no_answers,
            role=reference.role,
        )
        gate, claims = self.rules.gate, self.references * sum(len(self.rules.limits(name)) for name in items)
        parts = {name: portioned(self.rules, name, each) for name, each in items.items()}
        exam = Exam(parts, gate.alpha, gate.fail_alpha or gate.alpha / max(1, claims))
        itself = examiner.examine(reference.role, reference.model, reference.key, exam)  # and what it says twice
        found = examiner.examine("candidate", self.candidate.model, self.candidate.key, exam)
        found.source_asked.is_scored |= itself.source_asked.is_scored
        return found

    def _items(self, reference: _Side) -> tuple[dict[str, TextReader], dict[str, list[Item]]]:
        """Return the readers of the evaluations that the candidate reads in tokens of its own, and all items.

        Raises:
            CommandError: the artifacts read texts differently, and a budget compares token by token.
        """
        rules, reader, others = self.rules, self.candidate.reader, dict[str, TextReader]()
        items = load_items(rules.evaluate, rules.data, reference.reader)
        for name, own in load_items(rules.evaluate, rules.data, reader).items():
            if items_hash(own, 0) == items_hash(items[name], 0):
                continue
            metrics = {budget.metric for budget in rules.limits(name)}
            if not metrics:
                self.notes.append(f"{name}: left out, for the {reference.role} reads its texts as other tokens")
                del items[name]
            elif metrics == {"nats_per_byte"}:
                others[name] = reader
                _require_readable(name, items[name], reader)
            else:
                raise CommandError(
                    f"{reference.option}: {reference.folder} reads the texts of evaluate.{name} as other tokens than "
                    "CANDIDATE; of two tokenizers only perplexity can be compared, with max_increase_per_byte alone"
                )
        return others, items

    def _known(self, reference: _Side) -> Known:
        """Return what finds answers in the evidence of both artifacts."""

        def known(model: Model, name: str, items: Sequence[Item]) -> TaskResult | None:
            side = reference if model is reference.model else self.candidate
            found = side.told_answers(self.rules.evaluate[name], name, items)
            if found:
                self.notes.append(f"{name}: the {side.role}'s answers are those of its evidence, which anyone can edit")
            return found

        return known

    def _size(self, reference: _Side) -> SizeVerdict | None:
        """Compare sizes by a budget that is made for it: a recipe's counts against the source that it starts from."""
        budget = self.rules.gate.size
        if budget is None:
            return None
        size = SizeVerdict(weights_bytes(self.candidate.model), weights_bytes(reference.model), budget.max_ratio)
        if not self.rules.is_recipe:
            return size
        self.notes.append(f"size: {100 * size.ratio:.1f} % of the {reference.role}'s; {_NOT_JUDGED}")
        return None

    def _speeds(self, reference: _Side) -> tuple[tuple[SpeedVerdict, ...], Timing | None]:
        """Measure the speed of both on this machine, where a budget made for it asks for that."""
        gate, manifest = self.rules.gate, self.candidate.manifest
        if gate.speeds and self.rules.is_recipe:
            self.notes.append(f"speed: {_NOT_JUDGED}")
        if not gate.speeds or self.rules.is_recipe:
            return (), None
        require_measurable(gate.speeds, gate.workload, manifest.kind, manifest.context_length)
        sides = {"candidate": self.candidate, "reference": reference}
        graphs = {role: side.folder / side.manifest.graphs["model"] for role, side in sides.items()}
        setup = Setup(manifest.kind, manifest.vocabulary, gate.workload, self.threads)
        fail_alpha = gate.fail_alpha or gate.alpha / (self.references * len(gate.speeds))
        with self.told.progress("measuring speed") as progress:
            return measure(gate.speeds, graphs, setup, alpha=gate.alpha, fail_alpha=fail_alpha, progress=progress)


def _came(results: Results, is_scored: bool, seconds: float) -> Answers:
    if not results:
        return "not asked"
    return "scored" if is_scored else "stored" if seconds else "evidence"


def _compared(side: _Side, scores: Mapping[str, float], answers: Answers, seconds: float) -> Compared:
    return Compared(
        side.role, str(side.folder), side.manifest.digest, weights_bytes(side.model), scores, answers, seconds
    )


def _require_readable(name: str, items: Sequence[Item], reader: TextReader) -> None:
    try:
        encoded_again(items, reader)
    except ValueError as error:
        raise CannotRun(f"evaluate.{name}: {error}") from None
