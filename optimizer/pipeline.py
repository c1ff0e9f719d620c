"""From a recipe to an artifact: load and check the source, climb the chain of passes, package what came out.

Each result is stored under a key of all that decides it, so a run that is repeated, or was killed, goes on from what
is there: `maker.py` for models, `examiner.py` for answers.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from optimizer.chain import Chain
from optimizer.errors import CannotRun
from optimizer.evaluate.items import items_hash, load_items
from optimizer.evaluate.text_reader import TextReader
from optimizer.examiner import Examiner
from optimizer.exams import Exams
from optimizer.fingerprint import fingerprint
from optimizer.lock import lock_text
from optimizer.maker import SEED, Maker, hashes, options_of
from optimizer.markdown import report
from optimizer.package import Contents, has_artifact, model_card, require_replaceable, write_artifact
from optimizer.plan import plan
from optimizer.planned import Plan
from optimizer.quiet import quiet_libraries
from optimizer.ranking import quantizing_pass, rank, shown_texts
from optimizer.recipe import Recipe
from optimizer.record import Run
from optimizer.report import Reporter, Style
from optimizer.sensitivity import Sensitivity
from optimizer.source import Source, check_finite, load_source, source_identity
from optimizer.speed_restarts import require_measurable
from optimizer.stopwatch import Stopwatch
from optimizer.store import Store, default_limit, default_root
from passes._kind import kind_of, require_sizes
from passes._sentence import context_length, require_sentence
from passes.base import Model, PassError
from runtime.errors import ServingError
from runtime.threads import default_threads


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


def damages(
    recipe: Recipe,
    *,
    pass_name: str | None = None,
    items: int | None = None,
    store: Path | None = None,
    reporter: Style = "quiet",
) -> Sensitivity:
    """Measure what a recipe's first quantizing pass, or the named one, does to each layer of the model before it.

    Args:
        recipe: a checked recipe; its gates are not asked.
        pass_name: of another pass than the first.
        items: texts to measure with; None for as many as usual.
        store: where passes keep their work.
        reporter: as for `optimizer.run`.

    Raises:
        CommandError: no pass of the recipe quantizes, or not the named one; there are no texts.
        OptimizeError: the work cannot be done, or a pass refused the model.
    """
    index, told = quantizing_pass(recipe, pass_name), Reporter(reporter)
    try:
        with quiet_libraries(), Store(store or default_root(), default_limit(), told.warn) as opened:
            source, maker, exams = _load(recipe, opened, told)
            _require_finite(source, opened, told)
            texts = shown_texts(maker, exams, index, items)
            model, key = _before(index, maker, fingerprint(source_identity(source, opened)))
            return rank(maker, index, model, key, texts)
    except (PassError, ServingError) as error:
        raise CannotRun(str(error)) from error


def planned(recipe: Recipe, *, store: Path | None = None, reporter: Style = "quiet") -> Plan:
    """Return what to expect of a run of a checked recipe; reads no weights.

    Raises:
        OptimizeError: the model or the data cannot be used. What a pass refuses is part of the plan.
    """
    told = Reporter(reporter)
    try:
        with quiet_libraries(), Store(store or default_root(), default_limit(), told.warn) as opened:
            _, maker, exams = _load(recipe, opened, told)
            with told.progress("planning"):
                return plan(recipe, maker, exams, times_layers=True)
    except (PassError, ServingError) as error:
        raise CannotRun(str(error)) from error


def _run(recipe: Recipe, folder: Path, store: Path | None, stop_after: str | None, keep: bool, told: Reporter) -> Run:
    start = time.perf_counter()
    require_replaceable(folder)
    with quiet_libraries(), Store(store or default_root(), default_limit(), told.warn) as opened:
        source, chain = _begin(recipe, opened, told)
        done = chain.climb(stop_after, must_end=keep)
        if stop_after is None and (keep or done.exit_code == 0):
            with told.progress("packing"):
                digest = _package(folder, done, source, chain)
            done = replace(done, artifact=str(folder), digest=digest)
        elif has_artifact(folder):
            done = replace(done, earlier=str(folder))
        done = replace(done, seconds=time.perf_counter() - start)
    told.end(done)
    return done


def _load(recipe: Recipe, store: Store, told: Reporter) -> tuple[Source, Maker, Exams]:
    """Load and check the source, and read the texts."""
    with told.progress("loading") as progress:
        source = load_source(recipe.model, recipe.model_folder, progress)
        _require_sizes(source.model)
        require_sentence(source.model.assets, source.model.config)
        _require_measurable(recipe, source.model)
    reader = TextReader.of(source.model.assets, source.model.config)
    items = load_items(recipe.evaluate, recipe.data, reader) if recipe.evaluate else {}
    threads = recipe.target.threads or default_threads()
    maker = Maker(recipe, store, told, source.model, threads, reader, items)
    for index, each in enumerate(recipe.passes):
        maker.shown(each, index)
    return source, maker, Exams.of(recipe, items)


def _begin(recipe: Recipe, store: Store, told: Reporter) -> tuple[Source, Chain]:
    """Load the source, plan, and score the source; refuse what the passes can refuse before any work."""
    source, maker, exams = _load(recipe, store, told)
    with told.progress("planning"):
        made = plan(recipe, maker, exams)
    if made.refused:
        raise CannotRun(made.refused.refusal)
    _require_finite(source, store, told)
    key = fingerprint(source_identity(source, store))
    examiner = Examiner(recipe, store, told, source.model, key, maker.threads, maker.reader)
    return source, Chain(recipe, store, told, exams, examiner, maker, Stopwatch(recipe, told, maker, key), made)


def _require_finite(source: Source, store: Store, told: Reporter) -> None:
    with told.progress("reading weights") as progress:
        check_finite(source, store, progress)


def _before(index: int, maker: Maker, key: str) -> tuple[Model, str]:
    """Return the model that a pass takes where no gate is asked, and what names all that decided it."""
    model = maker.source
    for place, each in enumerate(maker.recipe.passes[:index]):
        try:
            model, entry = maker.make(each, place, model, key, each.name())
            key = entry.key
        except PassError:
            if not each.optional:
                raise
    return model, key


def _package(folder: Path, done: Run, source: Source, chain: Chain) -> str:
    """Write the artifact and return its identity."""
    recipe, maker, last = chain.recipe, chain.maker, chain.path[-1]
    taken = [point.taken for point in chain.path if point.taken is not None]
    ran = [(each.name(), options_of(each)) for each in taken]
    inputs = {
        "source": source_identity(source, chain.store),
        "passes": [{name: options} for name, options in ran],
        "evaluate": {name: task.identity() for name, task in recipe.evaluate.items()},
        "items": {name: items_hash(items, 0) for name, items in sorted(maker.items.items())},
        "calibration": [{each.name(): shown} for each in taken if (shown := hashes(maker.calibration[each]))],
        "seed": SEED,
        "threads": maker.threads,
    }

    def write_evidence(folder: Path) -> None:
        (folder / "run.json").write_text(done.to_json() + "\n", encoding="utf-8")
        (folder / "report.md").write_text(report(done), encoding="utf-8")
        (folder / "plan.json").write_text(chain.plan.to_json() + "\n", encoding="utf-8")
        for kind, results in (("source", last.examined.source), ("artifact", last.examined.results)):
            for name, result in results.items():
                result.save(folder / "items" / name / kind)

    card = model_card(recipe.name, source, ran)
    contents = Contents(recipe.text, lock_text(inputs), card, write_evidence)
    return write_artifact(folder, source, last.model, contents).digest


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
