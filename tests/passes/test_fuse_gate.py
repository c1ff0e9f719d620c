"""fuse_gate: gate and up projections as one product."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import onnx_ir as ir
import pytest
from graph_cases import SMALL, refusal, stored_bytes
from tiny_models import EXPORT, MANY_BITS, MIXED, TABLES_IN_INT8, Workshop, op_counts

from passes._graph import load_graph, save_graph
from passes.base import GraphPass, Pass
from passes.fuse_gate import FuseGate
from passes.fuse_gqa import FuseGqa
from passes.fuse_norm import FuseNorm

FUSE = FuseGate()
DECODERS: list[tuple[str, tuple[Pass, ...]]] = [
    ("llama", (EXPORT,)),
    ("qwen2", (EXPORT,)),
    ("llama", (TABLES_IN_INT8, EXPORT)),
]


@pytest.mark.parametrize(("name", "steps"), DECODERS)
def test_gate_and_up_become_one_product(workshop: Workshop, name: str, steps: tuple[Pass, ...]) -> None:
    before, result = op_counts(workshop.run(name, *steps).model), workshop.run(name, *steps, FUSE)
    after = op_counts(result.model)
    assert (result.changes["matched"], result.changes["refused"], result.note) == (2, 0, "")
    assert sum(before[kind] - after[kind] for kind in ("MatMul", "MatMulNBits")) == 2
    assert after["Split"] == 2


@pytest.mark.parametrize(("name", "steps"), [*DECODERS, ("qwen2", (MIXED, EXPORT)), ("llama", (MANY_BITS, EXPORT))])
def test_the_numbers_are_kept(workshop: Workshop, tmp_path: Path, name: str, steps: tuple[Pass, ...]) -> None:
    before = workshop.run(name, *steps).model
    FUSE.ensures(before, workshop.run(name, *steps, FUSE).model, workshop.context(tmp_path, before))


def test_a_pair_of_different_formats_is_left_alone_and_noted(workshop: Workshop) -> None:
    result = workshop.run("qwen2", MIXED, EXPORT, FUSE)
    assert (result.changes["matched"], result.changes["refused"]) == (1, 1)
    assert result.note.startswith("Sigmoid 1: ") and result.note.endswith("the layers are of different kinds")
    assert op_counts(result.model)["Split"] == 1


def test_a_pair_of_different_bits_is_left_alone_and_noted(workshop: Workshop) -> None:
    result = workshop.run("llama", MANY_BITS, EXPORT, FUSE)
    assert (result.changes["matched"], result.changes["refused"]) == (1, 1)
    assert "the layers are in different formats: bits 4, 8" in result.note


def test_a_pair_that_rounds_its_input_differently_is_left_alone(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.run("llama", TABLES_IN_INT8, EXPORT).model
    graph = load_graph(model.folder)
    gate = next(node for node in graph.graph if node.op_type == "Sigmoid").inputs[0].producer()  # type: ignore[union-attr]
    assert gate is not None and gate.attributes.get_int("accuracy_level") == 4
    gate.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_graph(graph, tmp_path / "in")
    other = replace(model, folder=tmp_path / "in")
    result = FUSE.run(other, workshop.context(tmp_path / "out", other))
    assert (result.changes["matched"], result.changes["refused"]) == (1, 1)
    assert "the layers are in different formats: accuracy_level 0, 4" in result.note


@pytest.mark.parametrize(("name", "steps"), DECODERS)
def test_weights_take_the_same_room(workshop: Workshop, name: str, steps: tuple[Pass, ...]) -> None:
    before, after = workshop.run(name, *steps).model, workshop.run(name, *steps, FUSE).model
    assert abs(stored_bytes(after) - stored_bytes(before)) <= SMALL


def test_a_second_run_is_refused_with_a_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("llama", EXPORT, FUSE).model, tmp_path)
    assert reason.startswith("fuse_gate: matched 0 of 2 places; first refusal: Sigmoid 0: ")


def test_an_encoder_without_gates_is_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("bert", EXPORT).model, tmp_path)
    assert reason.startswith("fuse_gate: matched 0 of 3 places; first refusal: Gelu 0: ")
    assert reason.endswith("is used by 0 Mul nodes, expected one")


@pytest.mark.parametrize("order", permutations([FuseGqa(), FuseNorm(), FuseGate()]))
@pytest.mark.parametrize(("name", "first"), [("llama", TABLES_IN_INT8), ("qwen2", MIXED), ("llama", MANY_BITS)])
def test_the_fusions_go_together_in_any_order(
    workshop: Workshop, tmp_path: Path, name: str, first: Pass, order: tuple[GraphPass, ...]
) -> None:
    before, after = workshop.run(name, first, EXPORT).model, workshop.run(name, first, EXPORT, *order).model
    order[-1].ensures(before, after, workshop.context(tmp_path, before))
    usual = workshop.run(name, first, EXPORT, FuseGqa(), FuseNorm(), FuseGate()).model
    assert op_counts(after) == op_counts(usual)
