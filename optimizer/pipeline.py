"""The loop: for every pass, require, run, ensure, evaluate, judge; then the artifact.

Each result is stored under a key of all that decides it: the model it starts from, the pass's fields and code, the
versions of the libraries, seed and threads. So a run that is repeated, or was killed, goes on from what is there.

Where a pass has `otherwise`, the items are split. *Search* items choose: a rung that they show to be over budget, or
whose score on them is, gives way to the next. *Certify* items judge the finished model and nothing else; a model that
does not pass there gives way too, and the next one is judged at half the level (docs/gates.md).
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from optimizer.costs import measured
from optimizer.errors import CannotRun
from optimizer.evaluate.calibration import Calibration, load_calibration
from optimizer.evaluate.flips import find_flips
from optimizer.evaluate.items import Item, TextReader, items_hash, load_items
from optimizer.examiner import Examined, Examiner, weights_bytes
from optimizer.exams import Exams
from optimizer.fingerprint import fingerprint, source_fingerprint
from optimizer.lock import lock_text, machine, versions
from optimizer.markdown import report
from optimizer.openings import Openings, opened
from optimizer.package import GRAPH, Contents, has_artifact, model_card, require_replaceable, write_artifact
from optimizer.quiet import quiet_libraries
from optimizer.recipe import Keep, Recipe, Skip, changes_weights, rung_text
from optimizer.record import Flips, Judged, Rejected, Run, SizeVerdict, Step
from optimizer.report import Reporter, Style, label
from optimizer.source import Source, check_finite, load_source, source_identity
from optimizer.speed import SpeedVerdict, Timing
from optimizer.speed_restarts import Setup, measure, require_measurable
from optimizer.store import Entry, Store, default_limit, default_root
from passes._kind import kind_of, require_sizes, vocabulary_size
from passes._sentence import context_length, require_sentence
from passes.base import Context, Model, Pass, PassError, Stage, no_progress
from runtime.errors import ServingError
from runtime.threads import default_threads

SEED = 0
_M_MMAP_THRESHOLD = -3  # of <malloc.h>


def run(
    recipe: Recipe,
    *,
    output: Path | None = None,
    store: Path | None = None,
    stop_after: str | None = None,
    keep: bool = False,
    reporter: Style = "quiet",
) -> Run:
    """Run a checked recipe; arguments as for `optimizer.run`.

    Raises:
        OptimizeError: the work cannot be done, a pass refused the model, or its result is not what it promises.
    """
    try:
        return _run(recipe, output or Path("artifacts") / recipe.name, store, stop_after, keep, Reporter(reporter))
    except (PassError, ServingError) as error:
        raise CannotRun(str(error)) from error


def _run(recipe: Recipe, folder: Path, store: Path | None, stop_after: str | None, keep: bool, told: Reporter) -> Run:
    start = time.perf_counter()
    require_replaceable(folder)
    with quiet_libraries(), Store(store or default_root(), default_limit(), told.warn) as opened_store:
        chain = _Chain.begin(recipe, opened_store, told)
        done = chain.climb(stop_after, must_end=keep)
        if stop_after is None and (keep or done.exit_code == 0):
            with told.progress("packing"):
                digest = chain.package(folder, done)
            done = replace(done, artifact=str(folder), digest=digest)
        elif has_artifact(folder):
            done = replace(done, earlier=str(folder))
        done = replace(done, seconds=time.perf_counter() - start)
    told.end(done)
    return done


@dataclass(frozen=True)
class _Point:
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
class _Chain:
    """A model on its way through the passes.

    Attributes:
        reader: how source and results read text.
        items: of each evaluation.
        exams: which items choose and which judge, at which levels.
        path: the models so far, the source first; those of rungs that were given up are gone from it.
        rungs: which fallback of each pass is tried, 0 for the pass itself.
        rejected: the rungs that did not do.
        openings: how often a finished model was judged.
        ledger: evaluation -> how often its items were opened, over all runs.
        calibration: of each pass, the token ids it is shown.
    """

    recipe: Recipe
    store: Store
    told: Reporter
    source: Source
    threads: int
    reader: TextReader
    items: Mapping[str, list[Item]]
    exams: Exams
    examiner: Examiner
    path: list[_Point] = field(default_factory=list)
    rungs: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    openings: int = 0
    ledger: dict[str, Openings] = field(default_factory=dict)
    calibration: dict[Pass, Calibration] = field(default_factory=dict)

    @classmethod
    def begin(cls, recipe: Recipe, store: Store, told: Reporter) -> _Chain:
        """Load, check and score the source."""
        with told.progress("loading") as progress:
            source = load_source(recipe.model, recipe.model_folder, progress)
            _require_sizes(source.model)
            require_sentence(source.model.assets, source.model.config)
            _require_measurable(recipe, source.model)
            check_finite(source, store, progress)
        reader = TextReader.of(source.model.assets, source.model.config)
        items = load_items(recipe.evaluate, recipe.data, reader) if recipe.evaluate else {}
        threads = recipe.target.threads or default_threads()
        key = fingerprint(source_identity(source, store))
        examiner = Examiner(recipe, store, told, source.model, key, threads, reader)
        exams = Exams.of(recipe, items)
        chain = cls(recipe, store, told, source, threads, reader, items, exams, examiner)
        for index, each in enumerate(recipe.passes):
            chain._calibration(each, index)
            if not each.optional and not recipe.fallback(index).otherwise:
                chain._admit(each)
        examined = examiner.examine("source", source.model, key, exams.search)
        step = Step("source", weights_bytes(source.model), examined.points(), **examined.cost())
        chain.path.append(_Point(source.model, key, step, None, examined))
        chain.rungs = [0] * len(recipe.passes)
        return chain

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
            speeds, timing = self._speeds()
            if any(speed.outcome == "fail" for speed in speeds) and self._fall_back("the model is too slow"):
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

    def package(self, folder: Path, done: Run) -> str:
        """Write the artifact and return its identity."""
        taken = [point.taken for point in self.path if point.taken is not None]
        ran = [(each.name(), _options(each)) for each in taken]
        inputs = {
            "source": source_identity(self.source, self.store),
            "passes": [{name: options} for name, options in ran],
            "evaluate": {name: task.identity() for name, task in self.recipe.evaluate.items()},
            "items": {name: items_hash(items, 0) for name, items in sorted(self.items.items())},
            "calibration": [{each.name(): shown} for each in taken if (shown := _hashes(self.calibration[each]))],
            "seed": SEED,
            "threads": self.threads,
        }
        card = model_card(self.recipe.name, self.source, ran)
        examined = self.path[-1].examined

        def write_evidence(folder: Path) -> None:
            (folder / "run.json").write_text(done.to_json() + "\n", encoding="utf-8")
            (folder / "report.md").write_text(report(done), encoding="utf-8")
            for kind, results in (("source", examined.source), ("artifact", examined.results)):
                for name, result in results.items():
                    result.save(folder / "items" / name / kind)

        contents = Contents(self.recipe.text, lock_text(inputs), card, write_evidence)
        return write_artifact(folder, self.source, self.path[-1].model, contents).digest

    # ---- one pass

    def _advance(self, index: int) -> _Point:
        """Take the next step, by the rung whose turn it is.

        Raises:
            PassError: the pass refused the model.
        """
        first, rung = self.recipe.passes[index], self.rungs[index]
        chosen = self.recipe.fallback(index).otherwise[rung - 1] if rung else first
        if isinstance(chosen, Skip):
            return self._unchanged(index, "as `otherwise` says")
        each = self._keeping(first, chosen, index) if isinstance(chosen, Keep) else chosen
        before = self.path[-1]
        model, entry = self._made(each, index, before.model, before.key, each.name())
        examined = self.examiner.examine(each.name(), model, entry.key, self.exams.search)
        meta = entry.meta
        step = Step(
            name=each.name(),
            bytes=weights_bytes(model),
            scores=examined.points(),
            gates=examined.gates,
            changes=meta["changes"],
            note=meta["note"],
            rung=rung,
            is_reported=self.recipe.reports_only(index),
            is_stored=not entry.is_new,
            pass_s=meta["seconds"],
            pass_peak_bytes=meta.get("peak_bytes", 0),
            **examined.cost(),
        )
        return _Point(model, entry.key, step, each, examined)

    def _made(self, each: Pass, index: int, before: Model, key: str, what: str) -> tuple[Model, Entry]:
        """Take a model, named by its key, through a pass, or find in the store what an earlier run made of it."""
        shown = _hashes(self._calibration(each, index))
        key = fingerprint([key, _pass_identity(each), shown, self.threads, SEED, versions(), machine()])
        self._admit(each)
        with self.told.progress(what) as progress:
            entry = self.store.get_or_build(key, lambda folder: self._run(each, index, before, folder, progress))
        return Model(Stage(**entry.meta["stage"]), entry.folder, before.assets, entry.meta["config"]), entry

    def _unchanged(self, index: int, note: str) -> _Point:
        """Leave a pass out."""
        before, name = self.path[-1], self.recipe.passes[index].name()
        size, rung = weights_bytes(before.model), self.rungs[index]
        step = Step(name, size, before.step.scores, before.step.gates, {}, note, is_skipped=True, rung=rung)
        return replace(before, step=step, taken=None)

    def _run(self, each: Pass, index: int, before: Model, folder: Path, progress: Any) -> Mapping[str, Any]:
        """Run one pass into `folder`; return what the store is to remember of it."""
        import torch

        torch.set_num_threads(self.threads)
        _give_back_freed_memory()
        torch.manual_seed(SEED)
        context = self._context(folder, progress, self._calibration(each, index))
        is_new = not any(folder.iterdir())
        root, name = self.store.root, each.name()
        with measured(root, name, weights_bytes(before), threads=self.threads, keep=is_new) as spent:
            each.requires(before)
            result = each.run(before, context)
            each.ensures(before, result.model, context)
        return {
            "stage": asdict(result.model.stage),
            "config": dict(result.model.config),
            "changes": dict(result.changes),
            "note": result.note,
            "seconds": spent.seconds,
            "peak_bytes": spent.peak_bytes,
        }

    def _admit(self, each: Pass) -> None:
        """Let a pass refuse the architecture before anything is done; the store remembers that it did not."""
        key = fingerprint(["admitted", self.source.model.config, _pass_identity(each), SEED, versions(), machine()])

        def ask(folder: Path) -> Mapping[str, Any]:
            with self.told.progress(f"{each.name()}: trying the architecture"):
                each.admits(self.source.model, self._context(folder, no_progress, {}))
            return {}

        if type(each).admits is not Pass.admits:
            self.store.get_or_build(key, ask)

    def _context(self, folder: Path, progress: Any, calibration: Calibration) -> Context:
        device = self.recipe.target.device
        return Context(folder, self.source.model, device, self.threads, SEED, progress, calibration)

    def _calibration(self, each: Pass, index: int) -> Calibration:
        """Return the token ids that a pass is shown."""
        if each not in self.calibration:
            where = f"passes.{index}.{each.name()}"
            self.calibration[each] = load_calibration(each, where, self.recipe.data, self.reader, self.items)
        return self.calibration[each]

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

    def _keeping(self, first: Pass, chosen: Keep, index: int) -> Pass:
        """Return the pass with the layers it damages most in another format."""
        raise PassError(f"passes.{index}: keep: the damage of single layers of {first.name()} is not known")

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
        for name in self.recipe.gate.budgets:
            part = (exam or self.exams.search).parts[name]
            judging = fingerprint([items_hash(part.items, 0), self.path[0].key])
            self.ledger[name] = opened(self.store.root, name, judging, point.key, self.recipe.gate.alpha)
        return certified

    def _speeds(self) -> tuple[tuple[SpeedVerdict, ...], Timing | None]:
        """Measure the last model's speed on this machine, and the reference artifact's where a budget asks for it."""
        gate, config = self.recipe.gate, self.source.model.config
        if not gate.speeds:
            return (), None
        graphs = {"candidate": self.path[-1].model.folder / GRAPH}
        if any(limit.is_ratio for limit in gate.speeds):
            graphs["reference"] = self._reference().folder / GRAPH
        setup = Setup(kind_of(config), vocabulary_size(config), gate.workload, self.threads)
        fail_alpha = gate.fail_alpha or gate.alpha / len(gate.speeds)
        with self.told.progress("measuring speed") as progress:
            return measure(gate.speeds, graphs, setup, alpha=gate.alpha, fail_alpha=fail_alpha, progress=progress)

    def _reference(self) -> Model:
        """Return the source lowered by this chain's passes but those that change its weights."""
        model, key = self.path[0].model, self.path[0].key
        for index, each in enumerate(self.recipe.passes):
            if not changes_weights(type(each)):
                try:
                    model, entry = self._made(each, index, model, key, f"reference: {each.name()}")
                    key = entry.key
                except PassError as refusal:
                    if each.reads != each.writes:
                        raise
                    self.told.line(f"the reference artifact goes without {each.name()}: {refusal}")
        return model

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
            flips=self._flips(),
        )

    def _flips(self) -> tuple[Flips, ...]:
        """Return the answers of the last model that differ from the source's."""
        found = self.path[-1].examined
        tasks = {name: self.recipe.evaluate[name] for name in found.results}
        return find_flips(tasks, found.items, found.source, found.results, self.reader)

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


def _require_sizes(model: Model) -> None:
    """Refuse a configuration that leaves open what tokenizer and artifact must agree with.

    Raises:
        CannotRun: names the first key that is missing or no size.
    """
    try:
        require_sizes(model.config)
    except PassError as error:
        raise CannotRun(f"{model.folder}/{error}") from error


def _require_measurable(recipe: Recipe, source: Model) -> None:
    """Refuse a speed that a model like this does not have, or a workload longer than its context."""
    gate = recipe.gate
    if gate.speeds:
        context = context_length(source.assets, source.config)
        require_measurable(gate.speeds, gate.workload, kind_of(source.config), context)


def _hashes(calibration: Calibration) -> dict[str, str]:
    """Return entry of `data` -> hash of the token ids."""
    return {name: items_hash([Item(ids, "") for ids in texts], 0) for name, texts in sorted(calibration.items())}


def _options(each: Pass) -> dict[str, Any]:
    options = asdict(each)
    del options["optional"]
    return options


def _pass_identity(each: Pass) -> dict[str, Any]:
    """Return what decides a pass's result besides its input: name, fields, and the code it runs."""
    module = importlib.import_module(type(each).__module__)
    return {"name": each.name(), "options": _options(each), "code": source_fingerprint(module)}


def _give_back_freed_memory() -> None:
    """Let glibc return every freed block of a megabyte and more to the system at once.

    Left alone it raises that threshold to 32 MiB by itself, and blocks of weights that come and go leave a heap that
    grows with the model's depth (measured: docs/log.md, 2026-11-20). Elsewhere there is no `mallopt`, and no need.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
