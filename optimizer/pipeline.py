"""The loop: for every pass, require, run, ensure, evaluate, judge; then the artifact.

Each result is stored under a key of all that decides it: the model it starts from, the pass's fields and code, the
versions of the libraries, seed and threads. So a run that is repeated, or was killed, goes on from what is there.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optimizer.errors import CannotRun
from optimizer.evaluate.items import Item, TextReader, items_hash, load_items, model_kind
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.result import load as load_result
from optimizer.fingerprint import fingerprint, source_fingerprint
from optimizer.gate import judge
from optimizer.lock import lock_text, machine, versions
from optimizer.package import Contents, model_card, require_replaceable, write_artifact
from optimizer.recipe import Recipe
from optimizer.report import Reporter, Style
from optimizer.run import Judged, Run, SizeVerdict, Step
from optimizer.source import Source, check_finite, load_source, source_identity
from optimizer.store import Store, default_limit, default_root
from passes.base import ONNX, TORCH, Context, Model, Pass, PassError, Stage
from runtime.threads import default_threads

SEED = 0
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
        OptimizeError: the work cannot be done.
        PassError: a pass refused the model, or its result is not what it promises.
    """
    start = time.perf_counter()
    folder = output or Path("artifacts") / recipe.name
    require_replaceable(folder)
    told = Reporter(reporter)
    with Store(store or default_root(), default_limit(), told.warn) as opened:
        chain = _Chain.begin(recipe, opened, told)
        steps = list(chain.steps(stop_after))
        size = chain.size(steps[-1]) if stop_after is None else None
        done = Run(recipe.name, tuple(steps), size, None, None, stop_after, time.perf_counter() - start)
        if stop_after is None and (keep or done.exit_code == 0):
            digest = chain.package(folder, done)
            done = replace(done, artifact=str(folder), digest=digest)
        done = replace(done, seconds=time.perf_counter() - start)
    told.end(done)
    return done


@dataclass
class _Chain:
    """A model on its way through the passes.

    Attributes:
        model: as the last pass left it.
        key: names all that decided it.
        items: of each evaluation.
        source_results: scores of the untouched model.
        results: scores of the model as it is now.
    """

    recipe: Recipe
    store: Store
    told: Reporter
    source: Source
    threads: int
    model: Model
    key: str
    items: Mapping[str, list[Item]]
    source_results: Results
    results: Results

    @classmethod
    def begin(cls, recipe: Recipe, store: Store, told: Reporter) -> _Chain:
        """Load, check and score the source."""
        with told.progress("loading") as progress:
            source = load_source(recipe.model, recipe.model_folder, progress)
            check_finite(source, store, progress)
        reader = TextReader.of(source.model.assets, source.model.config)
        items = load_items(recipe.evaluate, recipe.data, reader) if recipe.evaluate else {}
        threads = recipe.target.threads or default_threads()
        key = fingerprint(source_identity(source, store))
        chain = cls(recipe, store, told, source, threads, source.model, key, items, {}, {})
        chain.source_results = chain.results = chain._score("source")
        return chain

    def steps(self, stop_after: str | None) -> Iterator[Step]:
        """Run the passes, one step each after the source's own; end early after a gate that fails."""
        passes = self.recipe.passes
        before = Step("source", self._bytes(), self._points())
        self.told.step(0, len(passes), before, None)
        yield before
        for number, each in enumerate(passes, 1):
            step = self._step(each)
            self.told.step(number, len(passes), step, before)
            yield step
            if each.name() == stop_after or any(gate.verdict.outcome == "fail" for gate in step.gates):
                return
            before = step

    def size(self, last: Step) -> SizeVerdict | None:
        """Compare the size of the weights with the source's, both as stored."""
        budget = self.recipe.gate.size
        return SizeVerdict(last.bytes, _weights_bytes(self.source.model), budget.max_ratio) if budget else None

    def package(self, folder: Path, done: Run) -> str:
        """Write the artifact and return its identity."""
        names = [step.name for step in done.steps[1:] if not step.is_skipped]
        fields = {each.name(): _options(each) for each in self.recipe.passes}
        inputs = {
            "source": source_identity(self.source, self.store),
            "passes": [{name: fields[name]} for name in names],
            "items": {name: items_hash(items, 0) for name, items in sorted(self.items.items())},
            "seed": SEED,
            "threads": self.threads,
        }
        card = model_card(self.recipe.name, self.source, {name: str(fields[name]) for name in names})
        contents = Contents(self.recipe.name, self.recipe.text, lock_text(inputs), card)
        with tempfile.TemporaryDirectory() as evidence:
            (Path(evidence) / "run.json").write_text(done.to_json() + "\n", encoding="utf-8")
            for kind, results in (("source", self.source_results), ("artifact", self.results)):
                for name, result in results.items():
                    result.save(Path(evidence) / "items" / name / kind)
            return write_artifact(folder, self.source, self.model, contents, Path(evidence)).digest

    def _step(self, each: Pass) -> Step:
        key = fingerprint([self.key, _pass_identity(each), self.threads, SEED, versions(), machine()])
        try:
            with self.told.progress(each.name()) as progress:
                entry = self.store.get_or_build(key, lambda folder: self._run(each, folder, progress))
        except PassError as refusal:
            if not each.optional:
                raise
            return Step(each.name(), self._bytes(), self._points(), self._judge(), None, str(refusal), True)
        meta = entry.meta
        self.key = key
        self.model = Model(Stage(**meta["stage"]), entry.folder, self.model.assets, meta["config"])
        self.results = self._score(each.name())
        return Step(
            name=each.name(),
            bytes=self._bytes(),
            scores=self._points(),
            gates=self._judge(),
            changes=meta["changes"],
            note=meta["note"],
            is_stored=not entry.is_new,
            pass_s=meta["seconds"],
        )

    def _run(self, each: Pass, folder: Path, progress: Any) -> Mapping[str, Any]:
        """Run one pass into `folder`; return what the store is to remember of it."""
        import torch

        start = time.perf_counter()
        torch.set_num_threads(self.threads)
        torch.manual_seed(SEED)
        context = Context(folder, self.source.model, self.recipe.target.device, self.threads, SEED, progress)
        with _quiet_libraries():
            each.requires(self.model)
            result = each.run(self.model, context)
            each.ensures(self.model, result.model, context)
        return {
            "stage": asdict(result.model.stage),
            "config": dict(result.model.config),
            "changes": dict(result.changes),
            "note": result.note,
            "seconds": time.perf_counter() - start,
        }

    def _score(self, what: str) -> Results:
        """Return the model's result on every evaluation, from the store where it is known."""
        if not self.items:
            return {}
        asked = {name: [items_hash(self.items[name], 0), asdict(task)] for name, task in self.recipe.evaluate.items()}
        parts = ["scores", self.key, asked, self.threads, versions(), machine(), self._source_key()]
        entry = self.store.get_or_build(fingerprint(parts), lambda folder: self._evaluate(what, folder))
        return {name: load_result(entry.folder / name) for name in self.items}

    def _source_key(self) -> str:
        return "" if self.model is self.source.model else source_identity(self.source, self.store)

    def _evaluate(self, what: str, folder: Path) -> Mapping[str, Any]:
        from optimizer.evaluate.run import evaluate

        against = None if self.model is self.source.model else self.source_results
        with self.told.progress(f"scoring {what}") as progress, _quiet_libraries():
            results = evaluate(self.recipe.evaluate, self.items, self._scorer(), against, progress)
        for name, result in results.items():
            result.save(folder / name)
        return {}

    def _scorer(self) -> Any:
        from optimizer.evaluate.scorers import RuntimeScorer, TorchScorer

        kind = model_kind(self.source.model.config)
        if self.model.stage == TORCH:
            return TorchScorer(self.model, kind, self.threads)
        if self.model.stage == ONNX:
            return RuntimeScorer(self.model.folder / "model.onnx", kind, self.threads)
        raise CannotRun(f"a model at stage {self.model.stage} cannot be scored; expected {TORCH} or {ONNX}")

    def _judge(self) -> tuple[Judged, ...]:
        """Return every gate's verdict on the model as it is now, against the source."""
        gate = self.recipe.gate
        limits = [(name, budget) for name in self.recipe.evaluate for budget in self.recipe.limits(name)]
        fail_alpha = gate.fail_alpha or gate.alpha / max(1, len(limits) * len(self.recipe.passes))
        return tuple(
            Judged(
                name,
                judge(
                    self.source_results[name].scores[budget.metric],
                    self.results[name].scores[budget.metric],
                    budget,
                    alpha=gate.alpha,
                    fail_alpha=fail_alpha,
                ),
            )
            for name, budget in limits
        )

    def _points(self) -> dict[str, float]:
        return {
            f"{name}/{metric}": scores.point
            for name, result in self.results.items()
            for metric, scores in result.scores.items()
        }

    def _bytes(self) -> int:
        return _weights_bytes(self.model)


def _weights_bytes(model: Model) -> int:
    """Return the size of the files that hold the weights and the graph."""
    if model.stage == TORCH:
        from passes._safetensors import weight_files

        return sum(path.stat().st_size for path in weight_files(model.folder))
    return sum(path.stat().st_size for path in model.folder.glob("model.onnx*"))


def _options(each: Pass) -> dict[str, Any]:
    options = asdict(each)
    del options["optional"]
    return options


def _pass_identity(each: Pass) -> dict[str, Any]:
    """Return what decides a pass's result besides its input: name, fields, and the code it runs."""
    module = importlib.import_module(type(each).__module__)
    return {"name": each.name(), "options": _options(each), "code": source_fingerprint(module)}


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the user's screen."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
