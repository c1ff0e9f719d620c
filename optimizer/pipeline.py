"""The loop: for every pass, require, run, ensure, evaluate, judge; then the artifact.

Each result is stored under a key of all that decides it: the model it starts from, the pass's fields and code, the
versions of the libraries, seed and threads. So a run that is repeated, or was killed, goes on from what is there.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optimizer.costs import measured
from optimizer.errors import CannotRun
from optimizer.evaluate.calibration import Calibration, load_calibration
from optimizer.evaluate.flips import find_flips
from optimizer.evaluate.items import Item, TextReader, items_hash, load_items, tokens_read
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.result import load as load_result
from optimizer.fingerprint import fingerprint, source_fingerprint
from optimizer.gate import judge, require_judgeable
from optimizer.lock import lock_text, machine, versions
from optimizer.package import Contents, has_artifact, model_card, require_replaceable, write_artifact
from optimizer.quiet import quiet_libraries
from optimizer.recipe import Recipe
from optimizer.record import Flips, Judged, Run, SizeVerdict, Step
from optimizer.report import Reporter, Style
from optimizer.source import Source, check_finite, load_source, source_identity
from optimizer.store import Store, default_limit, default_root
from passes._kind import kind_of, require_sizes
from passes._sentence import require_sentence
from passes.base import ONNX, TORCH, Context, Model, Pass, PassError, Stage, no_progress
from runtime.errors import ServingError
from runtime.threads import default_threads

SEED = 0
_M_MMAP_THRESHOLD = -3  # of <malloc.h>
Results = Mapping[str, TaskResult]


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
    with quiet_libraries(), Store(store or default_root(), default_limit(), told.warn) as opened:
        chain = _Chain.begin(recipe, opened, told)
        steps = tuple(chain.steps(stop_after, must_end=keep))
        size = chain.size(steps[-1]) if stop_after is None else None
        done = Run(recipe.name, steps, size, None, None, stop_after, time.perf_counter() - start, flips=chain.flips())
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
class Scored:
    """How a step's scores were come by; fields as in `Step`."""

    is_scored: bool = False
    score_s: float = 0.0
    score_peak_bytes: int = 0


@dataclass
class _Chain:
    """A model on its way through the passes.

    Attributes:
        reader: how source and results read text.
        model: as the last pass left it.
        key: names all that decided it.
        items: of each evaluation.
        calibration: of each pass, the token ids it is shown.
        source_results: scores of the untouched model.
        results: scores of the model as it is now.
        scored: how those were come by.
    """

    recipe: Recipe
    store: Store
    told: Reporter
    source: Source
    threads: int
    reader: TextReader
    model: Model
    key: str
    items: Mapping[str, list[Item]]
    calibration: Mapping[Pass, Calibration]
    source_results: Results
    results: Results
    scored: Scored

    @classmethod
    def begin(cls, recipe: Recipe, store: Store, told: Reporter) -> _Chain:
        """Load, check and score the source."""
        with told.progress("loading") as progress:
            source = load_source(recipe.model, recipe.model_folder, progress)
            _require_sizes(source.model)
            require_sentence(source.model.assets, source.model.config)
            check_finite(source, store, progress)
        reader = TextReader.of(source.model.assets, source.model.config)
        items = load_items(recipe.evaluate, recipe.data, reader) if recipe.evaluate else {}
        calibration = {
            each: load_calibration(each, f"passes.{number}.{each.name()}", recipe.data, reader, items)
            for number, each in enumerate(recipe.passes)
        }
        threads = recipe.target.threads or default_threads()
        key = fingerprint(source_identity(source, store))
        chain = cls(
            recipe, store, told, source, threads, reader, source.model, key, items, calibration, {}, {}, Scored()
        )
        for each in recipe.passes:
            if not each.optional:
                chain._admit(each)
        chain._score("source")
        chain.source_results = chain.results
        chain._require_judgeable(chain.results)
        return chain

    def steps(self, stop_after: str | None, must_end: bool) -> Iterator[Step]:
        """Run the passes, one step each after the source's own; end early after a gate that fails unless `must_end`."""
        passes = self.recipe.passes
        width = max(len(name) for name in ("source", *(each.name() for each in passes)))
        source = Step("source", self._bytes(), self._points(), **asdict(self.scored))
        self.told.step(0, len(passes), source, None, width)
        yield source
        for number, each in enumerate(passes, 1):
            step = self._step(each)
            self.told.step(number, len(passes), step, source, width)
            yield step
            is_over = not must_end and any(gate.verdict.outcome == "fail" for gate in step.gates)
            if is_over or each.name() == stop_after:
                return

    def size(self, last: Step) -> SizeVerdict | None:
        """Compare the size of the weights with the source's, both as stored."""
        budget = self.recipe.gate.size
        return SizeVerdict(last.bytes, _weights_bytes(self.source.model), budget.max_ratio) if budget else None

    def flips(self) -> tuple[Flips, ...]:
        """Return the answers of the model as it is now that differ from the source's."""
        return find_flips(self.recipe.evaluate, self.items, self.source_results, self.results, self.reader)

    def package(self, folder: Path, done: Run) -> str:
        """Write the artifact and return its identity."""
        steps = zip(self.recipe.passes, done.steps[1:], strict=True)
        taken = [each for each, step in steps if not step.is_skipped]
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

        def write_evidence(folder: Path) -> None:
            (folder / "run.json").write_text(done.to_json() + "\n", encoding="utf-8")
            for kind, results in (("source", self.source_results), ("artifact", self.results)):
                for name, result in results.items():
                    result.save(folder / "items" / name / kind)

        contents = Contents(self.recipe.text, lock_text(inputs), card, write_evidence)
        return write_artifact(folder, self.source, self.model, contents).digest

    def _admit(self, each: Pass) -> None:
        """Let a pass refuse the architecture before anything is done; the store remembers that it did not."""
        key = fingerprint(["admitted", self.source.model.config, _pass_identity(each), SEED, versions(), machine()])

        def ask(folder: Path) -> Mapping[str, Any]:
            with self.told.progress(f"{each.name()}: trying the architecture"):
                each.admits(self.source.model, self._context(each, folder, no_progress))
            return {}

        if type(each).admits is not Pass.admits:
            self.store.get_or_build(key, ask)

    def _context(self, each: Pass, folder: Path, progress: Any) -> Context:
        device, calibration = self.recipe.target.device, self.calibration[each]
        return Context(folder, self.source.model, device, self.threads, SEED, progress, calibration)

    def _step(self, each: Pass) -> Step:
        shown = _hashes(self.calibration[each])
        key = fingerprint([self.key, _pass_identity(each), shown, self.threads, SEED, versions(), machine()])
        try:
            self._admit(each)
            with self.told.progress(each.name()) as progress:
                entry = self.store.get_or_build(key, lambda folder: self._run(each, folder, progress))
        except PassError as refusal:
            if not each.optional:
                raise
            return Step(each.name(), self._bytes(), self._points(), self._judge(), {}, str(refusal), True)
        meta = entry.meta
        self.key = key
        self.model = Model(Stage(**meta["stage"]), entry.folder, self.model.assets, meta["config"])
        self._score(each.name())
        return Step(
            name=each.name(),
            bytes=self._bytes(),
            scores=self._points(),
            gates=self._judge(),
            changes=meta["changes"],
            note=meta["note"],
            is_stored=not entry.is_new,
            pass_s=meta["seconds"],
            pass_peak_bytes=meta.get("peak_bytes", 0),
            **asdict(self.scored),
        )

    def _run(self, each: Pass, folder: Path, progress: Any) -> Mapping[str, Any]:
        """Run one pass into `folder`; return what the store is to remember of it."""
        import torch

        torch.set_num_threads(self.threads)
        _give_back_freed_memory()
        torch.manual_seed(SEED)
        context = self._context(each, folder, progress)
        is_new = not any(folder.iterdir())
        root, name = self.store.root, each.name()
        with measured(root, name, self._bytes(), threads=self.threads, keep=is_new) as spent:
            each.requires(self.model)
            result = each.run(self.model, context)
            each.ensures(self.model, result.model, context)
        return {
            "stage": asdict(result.model.stage),
            "config": dict(result.model.config),
            "changes": dict(result.changes),
            "note": result.note,
            "seconds": spent.seconds,
            "peak_bytes": spent.peak_bytes,
        }

    def _score(self, what: str) -> None:
        """Score the model on every evaluation, or take its results from the store."""
        if not self.items:
            return
        asked = {
            name: [items_hash(self.items[name], 0), task.identity()] for name, task in self.recipe.evaluate.items()
        }
        code = scoring_code()
        parts = ["scores", code, self.key, asked, self.threads, versions(), machine(), self._source_key()]
        entry = self.store.get_or_build(fingerprint(parts), lambda folder: self._evaluate(what, folder))
        self.results = {name: load_result(entry.folder / name) for name in self.items}
        self.scored = Scored(entry.is_new, entry.meta["seconds"], entry.meta.get("peak_bytes", 0))

    def _source_key(self) -> str:
        return "" if self.model is self.source.model else source_identity(self.source, self.store)

    def _evaluate(self, what: str, folder: Path) -> Mapping[str, Any]:
        from optimizer.evaluate.run import evaluate

        against = None if self.model is self.source.model else self.source_results
        scorer = self._scorer()
        name, tokens = f"scoring {self.model.stage.name}", tokens_read(self.recipe.evaluate, self.items)
        with (
            self.told.progress(f"scoring {what}") as progress,
            measured(self.store.root, name, self._bytes(), tokens=tokens, threads=self.threads) as spent,
        ):
            results = evaluate(self.recipe.evaluate, self.items, scorer, against, progress, self.reader)
        for name, result in results.items():
            result.save(folder / name)
        return {"seconds": spent.seconds, "peak_bytes": spent.peak_bytes}

    def _scorer(self) -> Any:
        from optimizer.evaluate.scorers import RuntimeScorer, TorchScorer

        kind = kind_of(self.source.model.config)
        if self.model.stage == TORCH:
            importlib.import_module("passes._walk")  # with torch and transformers, whose loading is not scoring
            return TorchScorer(self.model, kind, self.threads)
        if self.model.stage == ONNX:
            return RuntimeScorer(self.model.folder / "model.onnx", kind, self.threads)
        raise CannotRun(f"a model at stage {self.model.stage} cannot be scored; expected {TORCH} or {ONNX}")

    def _judge(self) -> tuple[Judged, ...]:
        """Return every gate's verdict on the model as it is now, against the source."""
        gate = self.recipe.gate
        limits = [(name, budget) for name in self.recipe.evaluate for budget in self.recipe.limits(name)]
        self._require_judgeable(self.results)
        fail_alpha = gate.fail_alpha or gate.alpha / max(1, len(limits) * len(self.recipe.passes))
        return tuple(
            Judged(
                name,
                judge(
                    self.source_results[name].scores[budget.judges],
                    self.results[name].scores[budget.judges],
                    budget,
                    alpha=gate.alpha,
                    fail_alpha=fail_alpha,
                    chance=self.recipe.evaluate[name].chance(self.items[name]),
                ),
                budget.score,
            )
            for name, budget in limits
        )

    def _require_judgeable(self, results: Results) -> None:
        """Refuse a budget of a score that a task does not give, or that no interval is known for."""
        for name in self.recipe.gate.budgets:
            for budget in self.recipe.limits(name):
                try:
                    require_judgeable(results[name].scores, budget)
                except ValueError as error:
                    raise CannotRun(f"gate.{name}.{error}") from None

    def _points(self) -> dict[str, float]:
        return {
            f"{name}/{metric}": scores.point
            for name, result in self.results.items()
            for metric, scores in result.scores.items()
        }

    def _bytes(self) -> int:
        return _weights_bytes(self.model)


def _require_sizes(model: Model) -> None:
    """Refuse a configuration that leaves open what tokenizer and artifact must agree with.

    Raises:
        CannotRun: names the first key that is missing or no size.
    """
    try:
        require_sizes(model.config)
    except PassError as error:
        raise CannotRun(f"{model.folder}/{error}") from error


def _weights_bytes(model: Model) -> int:
    """Return the size of the files that hold the weights and the graph."""
    if model.stage == TORCH:
        from passes._safetensors import weight_files

        return sum(path.stat().st_size for path in weight_files(model.folder))
    return sum(path.stat().st_size for path in model.folder.glob("model.onnx*"))


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
