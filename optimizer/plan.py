"""What a recipe would do, before any work: what each pass leaves, what it takes, what the gates will be able to show.

Configuration and headers tell most; a pass that lowers or fuses tries the architecture on a small twin, as the run does
first of all, so that what the run would refuse is refused here. Whether quantized layers are fast is measured, one at
a time. No weight of the model is read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from optimizer.costs import give_back_freed_memory, host, resident_bytes
from optimizer.examiner import weights_bytes
from optimizer.exams import Exams
from optimizer.fingerprint import fingerprint
from optimizer.kernels import slow_layers
from optimizer.lock import versions
from optimizer.maker import Maker, pass_identity
from optimizer.plan_costs import Clock
from optimizer.plan_gates import plan_gates
from optimizer.planned import Plan, PlannedStep
from optimizer.recipe import Keep, Recipe, Rung, Skip, rung_text
from optimizer.spreads import noted
from passes._kind import kind_of
from passes._safetensors import tensor_index
from passes.base import TORCH, Context, Model, Pass, PassError, no_progress

NO_ESTIMATE = "no estimate"
_LOADED = 1.5
"""Times its size that a graph takes in memory: its weights, and what kernels make of some of them."""


def plan(recipe: Recipe, maker: Maker, exams: Exams, *, times_layers: bool = False) -> Plan:
    """Return what to expect of a run of a recipe.

    Args:
        recipe: the recipe.
        maker: makes its models.
        exams: what it asks.
        times_layers: warn of quantized layers that this processor is slow at, which takes seconds to find out.
    """
    source = maker.source
    outlines = _outlines(recipe, maker, times_layers)
    first, *others = map(_read, outlines["steps"])
    clock = Clock(maker, exams, int(outlines["resident_bytes"]), first.parameters or 0, first.bytes or 0)
    steps = (clock.scored(first), *map(clock.passed, others, recipe.passes))
    rungs = tuple(map(_read, outlines["rungs"]))
    name, known = source_name(recipe, source), noted(maker.store.root)
    gates = plan_gates(recipe, exams, kind_of(source.config), name, known, clock.seconds_of(steps))
    sizes = [step.bytes or 0 for step in steps]
    made = Plan(
        name=recipe.name,
        steps=steps,
        rungs=rungs,
        gates=gates,
        seconds=sum(step.pass_s + step.score_s for step in steps) + clock.certifying_s(first.bytes or 0),
        basis=clock.basis,
        peak_bytes=max(step.peak_bytes or 0 for step in steps),
        disk_bytes=sum(sizes[1:]) + sizes[-1],
    )
    return replace(made, warnings=tuple(_warnings(recipe, made, maker.store.root)))


def _outlines(recipe: Recipe, maker: Maker, times_layers: bool) -> Mapping[str, Any]:
    """Return what every step would leave, from the store where a plan was made before."""
    key = outline_key(maker.source)
    offered = [identity(each) for each in _offered(recipe)]
    timed, plain = (
        fingerprint(["plan", key, offered, versions(), host(), maker.threads, is_timed]) for is_timed in (True, False)
    )
    known = maker.store.get(timed) if not times_layers else None
    chosen = timed if times_layers else plain
    return (known or maker.store.get_or_build(chosen, lambda _: _outlined(recipe, maker, times_layers))).meta


def outline_key(source: Model) -> str:
    """Return what names the source without a look at its weights: configuration and headers."""
    shapes = {name: [entry.dtype, list(entry.shape)] for name, entry in sorted(tensor_index(source.folder).items())}
    return fingerprint([dict(source.config), shapes])


def source_name(recipe: Recipe, source: Model) -> str:
    """Return what names the source among others of its shape: where it comes from, besides."""
    where = str(recipe.model_folder.resolve()) if recipe.model_folder else recipe.model
    return fingerprint([where, outline_key(source)])


def identity(rung: Rung) -> Any:
    """Return what decides the outline of a step."""
    return pass_identity(rung) if isinstance(rung, Pass) else rung_text(rung)


def _offered(recipe: Recipe) -> Iterator[Rung]:
    for index, each in enumerate(recipe.passes):
        yield each
        yield from recipe.fallback(index).otherwise


def _read(step: Mapping[str, Any]) -> PlannedStep:
    return PlannedStep(**{**step, "warnings": tuple(step["warnings"])})


# ---- what passes leave


def _outlined(recipe: Recipe, maker: Maker, times_layers: bool) -> Mapping[str, Any]:
    """Return every pass's estimate, from what the passes before it would leave."""
    source = model = maker.source
    parameters = sum(prod(entry.shape) for entry in tensor_index(source.folder).values())
    size = weights_bytes(source)
    steps = [PlannedStep("source", bytes=size, parameters=parameters, scoring_bytes=_scoring_bytes(source, size))]
    rungs: list[PlannedStep] = []
    with tempfile.TemporaryDirectory(prefix="optimize-plan-") as folder:
        for index, each in enumerate(recipe.passes):
            before = model
            step, model = _outline(each, before, maker, Path(folder, str(index)), times_layers)
            steps.append(replace(step, place=index + 1))
            for number, rung in enumerate(recipe.fallback(index).otherwise, 1):
                told, _ = _outline(rung, before, maker, Path(folder, f"{index}.{number}"), times_layers)
                rungs.append(
                    replace(told, name=told.name or each.name(), place=index + 1, rung=number, words=rung_text(rung))
                )
    give_back_freed_memory()
    return {
        "steps": [asdict(step) for step in steps],
        "rungs": [asdict(step) for step in rungs],
        "resident_bytes": resident_bytes(),
    }


def _outline(rung: Rung, model: Model, maker: Maker, folder: Path, times_layers: bool) -> tuple[PlannedStep, Model]:
    if isinstance(rung, Skip):
        return PlannedStep(""), model
    if isinstance(rung, Keep):
        return PlannedStep("", note="which layers is found by measuring each of them"), model
    step = PlannedStep(rung.name(), is_optional=rung.optional)
    folder.mkdir()
    context = Context(folder, maker.source, maker.recipe.target.device, maker.threads, progress=no_progress)
    try:
        maker.admit(rung)
        if model.stage != rung.reads:  # a pass before it had no estimate
            return replace(step, note=NO_ESTIMATE), model
        rung.requires(model)
        told = rung.estimate(model, context)
    except PassError as error:
        return replace(step, refusal=str(error)), model
    if told is None:
        return replace(step, note=NO_ESTIMATE), model
    step = replace(step, matches=told.matches, bytes=told.bytes, parameters=told.parameters)
    step = replace(step, peak_bytes=told.peak_bytes, scoring_bytes=_scoring_bytes(told.model, told.bytes))
    warnings = slow_layers(model, told, maker) if times_layers else ()
    return replace(step, note=told.note, warnings=warnings), told.model


def _scoring_bytes(model: Model, size: int) -> int:
    """Return the memory that the weights of a model of this size take while it is scored."""
    from passes._outline import walking_bytes

    if model.stage != TORCH:
        return int(_LOADED * size)
    try:
        return walking_bytes(model)
    except PassError:  # the files are no whole model: whatever reads them says so
        return size


# ---- what is known to go wrong


def _warnings(recipe: Recipe, made: Plan, store: Path) -> Iterator[str]:
    for gate in made.gates:
        if not gate.can_pass:
            yield (
                f"gate.{gate.evaluation}: {gate.items:,} {gate.unit} cannot pass even if no answer changes; "
                f"{gate.floor:,} could"
            )
    sizes, budget = [step.bytes for step in made.steps], recipe.gate.size
    if budget and sizes[0] and sizes[-1] and sizes[-1] / sizes[0] > budget.max_ratio:
        yield (
            f"gate.size: cannot pass, {sizes[-1] / 1e6:.2f} MB is {sizes[-1] / sizes[0]:.1%} of the source, of at most "
            f"{budget.max_ratio:.1%}"
        )
    for step in (*made.steps, *made.rungs):
        yield from (f"passes.{step.place - 1}.{step.name}: {warning}" for warning in step.warnings)
    free = shutil.disk_usage(_existing(store)).free
    if made.disk_bytes > free:
        yield f"disk: {made.disk_bytes / 1e9:.1f} GB are needed in {store}, {free / 1e9:.1f} GB are free"
    memory = available_memory()
    if memory and made.peak_bytes > memory:
        yield f"memory: {made.peak_bytes / 1e9:.1f} GB are needed, {memory / 1e9:.1f} GB are available"


def available_memory() -> int:
    """Return how many bytes of memory a process can still take; 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
