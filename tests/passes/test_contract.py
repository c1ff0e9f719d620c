"""What every pass of the catalogue keeps to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from tiny_models import CALIBRATION, EXPORT, Workshop, file_hashes

from optimizer.catalogue import installed
from optimizer.document import compose
from optimizer.reader import Reader, is_required, recipe_fields
from passes._override import Override
from passes.base import ONNX, TORCH, BlockPass, Model, Pass
from passes.quantize_prefill import QuantizePrefill
from passes.quantize_rtn import QuantizeRtn

PASSES = installed().passes
LIBRARIES = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "datasets",
    "scipy",
    "safetensors",
)
EXAMPLES = {
    "fuse_attention": "bert-sharp",
    "fuse_embeddings": "bert-sharp",
    "fuse_gelu": "bert-sharp",
    "fuse_rotary": "modernbert-sharp",
}
"""What a pass is tried on where it finds nothing to do in a Llama."""
QUICK: dict[str, dict[str, Any]] = {"quantize_autoround": {"steps": 2}}
"""What need not take as long as it does by default."""
every_pass = pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)


def input_of(workshop: Workshop, kind: type[Pass]) -> Model:
    """Return a small model at the stage a pass reads."""
    return workshop.run(example(kind), *steps_before(kind)).model


def steps_before(kind: type[Pass]) -> tuple[Pass, ...]:
    """Return what is done before a pass to a model at stage torch."""
    if kind.reads == TORCH:
        return ()
    return (QuantizeRtn(), EXPORT) if kind is QuantizePrefill else (EXPORT,)


def example(kind: type[Pass]) -> str:
    """Return the name of a small model that the pass changes."""
    return EXAMPLES.get(kind.name(), "llama")


def plain(kind: type[Pass]) -> Pass:
    """Return the pass with its defaults; what it requires is an entry of `data`."""
    required = {name: CALIBRATION for name, option in recipe_fields(kind).items() if is_required(option)}
    return kind(**required, **QUICK.get(kind.name(), {}))


def variants(kind: type[Pass]) -> Iterator[Pass]:
    """Yield the pass with its defaults, and with each field at each of its other values that may stand alone."""
    yield plain(kind)
    hints = get_type_hints(kind)
    for option in fields(kind):
        for value in other_values(hints[option.name], option.default):
            with suppress(ValueError):
                yield replace(plain(kind), **{option.name: value})


def other_values(hint: Any, default: Any) -> list[Any]:
    if hint is bool:
        return [not default]
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if value != default]
    if hint == tuple[str, ...]:
        return [("*.down_proj", "model.layers.0.*")]
    if hint == tuple[Override, ...]:
        return [(Override(layers="*.down_proj", format="int8"), Override(layers=("a", "b"), format="float"))]
    return []


def as_recipe(step: Pass) -> str:
    """Return a pass as a recipe says it; JSON is YAML."""
    return json.dumps(asdict(step))


@every_pass
def test_a_pass_leaves_its_input_alone_and_returns_the_stage_it_declares(
    workshop: Workshop, tmp_path: Path, kind: type[Pass]
) -> None:
    model, step = input_of(workshop, kind), plain(kind)
    files = file_hashes(model.folder)
    ctx = workshop.context(tmp_path, model)
    step.requires(model)
    result = step.run(model, ctx)
    made = file_hashes(tmp_path)
    step.ensures(model, result.model, ctx)
    assert result.model.stage == kind.writes
    assert (result.model.folder, result.model.assets) == (tmp_path, model.assets)
    assert file_hashes(model.folder) == files
    assert file_hashes(tmp_path) == made  # what `ensures` needed is gone again


@every_pass
def test_a_pass_makes_the_same_bytes_each_time(workshop: Workshop, tmp_path: Path, kind: type[Pass]) -> None:
    model, step = input_of(workshop, kind), plain(kind)
    step.run(model, workshop.context(tmp_path, model))
    assert file_hashes(tmp_path) == file_hashes(run_once(workshop, model, step).folder)


def run_once(workshop: Workshop, model: Model, step: Pass) -> Model:
    return workshop.run(example(type(step)), *steps_before(type(step)), step).model


@every_pass
def test_a_pass_changes_something_and_says_what(workshop: Workshop, kind: type[Pass]) -> None:
    model = input_of(workshop, kind)
    result = workshop.run(example(kind), *steps_before(kind), plain(kind))
    assert max(result.changes.values()) > 0
    assert file_hashes(result.model.folder) != file_hashes(model.folder)


@every_pass
def test_an_estimate_agrees_with_what_is_done(workshop: Workshop, kind: type[Pass]) -> None:
    estimate = workshop.estimate(example(kind), *steps_before(kind), plain(kind))[-1]
    result = workshop.run(example(kind), *steps_before(kind), plain(kind))
    pattern = "*.onnx*" if kind.writes == ONNX else "*.safetensors"
    assert estimate.bytes == pytest.approx(
        sum(path.stat().st_size for path in result.model.folder.glob(pattern)), rel=0.02
    )
    assert estimate.matches == result.changes.get("matched", estimate.matches) > 0
    assert (estimate.model.stage, estimate.model.assets) == (kind.writes, result.model.assets)


@every_pass
def test_a_recipe_rebuilds_the_pass_from_its_fields(kind: type[Pass]) -> None:
    for step in variants(kind):
        reader = Reader()
        assert reader.record(compose(as_recipe(step), "recipe.yaml"), kind, kind.name()) == step
        assert reader.mistakes == []


@every_pass
def test_a_pass_is_a_value(kind: type[Pass]) -> None:
    assert len({*variants(kind), *variants(kind)}) == len(list(variants(kind)))
    with pytest.raises(AttributeError):
        plain(kind).optional = True  # type: ignore[misc]


@pytest.mark.parametrize("module", ["passes.base", *(f"passes.{name}" for name in PASSES)])
def test_importing_a_pass_imports_no_library(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {LIBRARIES!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_block_pass_reads_and_writes_torch() -> None:
    assert all((kind.reads, kind.writes) == (TORCH, TORCH) for kind in PASSES.values() if issubclass(kind, BlockPass))
