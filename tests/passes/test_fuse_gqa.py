"""fuse_gqa: rotary inside the operator, one product for query, key and value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_cases import SMALL, refusal, stored_bytes
from tiny_models import EXPORT, MANY_BITS, MIXED, TABLES_IN_INT8, Workshop, op_counts

from passes._graph import load_graph, save_graph
from passes.base import Model, Pass, PassError
from passes.fuse_gqa import FuseGqa

FUSE = FuseGqa()
ROTARY_BYTES = 2 * 64 * 8 * 4  # two tables of [context, E/2] float32
DECODERS: list[tuple[str, tuple[Pass, ...]]] = [
    ("llama", (EXPORT,)),
    ("qwen2", (EXPORT,)),
    ("llama", (TABLES_IN_INT8, EXPORT)),
    ("qwen2", (MIXED, EXPORT)),
    ("llama", (MANY_BITS, EXPORT)),
]


def attention(model: Model) -> list[ir.Node]:
    return [node for node in load_graph(model.folder).graph if node.op_type == "GroupQueryAttention"]


def behind_reshapes(value: ir.Value | None) -> str:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Reshape":
        node = node.inputs[0].producer()  # type: ignore[union-attr]
    assert node is not None
    return node.op_type


@pytest.mark.parametrize(("name", "steps"), DECODERS)
def test_every_attention_turns_its_queries_itself(workshop: Workshop, name: str, steps: tuple[Pass, ...]) -> None:
    result = workshop.run(name, *steps, FUSE)
    assert (result.changes["matched"], result.changes["refused"]) == (2, 0)
    counts = op_counts(result.model)
    assert not counts.keys() & {"Cos", "Sin", "Neg", "Slice"}
    assert counts["Transpose"] == op_counts(workshop.run(name, *steps).model)["Transpose"] - 8  # four of each layer
    assert [node.attributes.get_int("do_rotary") for node in attention(result.model)] == [1, 1]
    assert result.changes["nodes_removed"] == op_counts(workshop.run(name, *steps).model).total() - counts.total() > 40


@pytest.mark.parametrize(("name", "steps"), DECODERS)
def test_the_numbers_are_kept(workshop: Workshop, tmp_path: Path, name: str, steps: tuple[Pass, ...]) -> None:
    before = workshop.run(name, *steps).model
    FUSE.ensures(before, workshop.run(name, *steps, FUSE).model, workshop.context(tmp_path, before))


@pytest.mark.parametrize(("name", "steps"), DECODERS[:3])
def test_query_key_and_value_become_one_product(workshop: Workshop, name: str, steps: tuple[Pass, ...]) -> None:
    before, after = workshop.run(name, *steps).model, workshop.run(name, *steps, FUSE).model
    products = [op_counts(model)["MatMul"] + op_counts(model)["MatMulNBits"] for model in (before, after)]
    assert products[0] - products[1] == 2 * 2  # three become one in each of two layers
    for node in attention(after):
        assert [node.inputs[1], node.inputs[2]] == [None, None]


def test_projections_of_different_formats_stay_three_with_the_rotary_inside(workshop: Workshop) -> None:
    packed, unpacked = attention(workshop.run("qwen2", MIXED, EXPORT, FUSE).model)
    assert [packed.inputs[1], packed.inputs[2]] == [None, None]
    # float with a bias, and two quantized ones
    assert [behind_reshapes(value) for value in unpacked.inputs[:3]] == ["Add", "MatMulNBits", "MatMulNBits"]
    assert unpacked.attributes.get_int("do_rotary") == 1


def test_projections_of_different_bits_stay_three(workshop: Workshop) -> None:
    result = workshop.run("llama", MANY_BITS, EXPORT, FUSE)
    assert "not packed: layers.0.qkv: the layers are in different formats: bits 4, 4, 8" in result.note
    quantized, partly = attention(result.model)
    assert [behind_reshapes(value) for value in quantized.inputs[:3]] == ["MatMulNBits"] * 3
    assert [behind_reshapes(value) for value in partly.inputs[:3]] == ["MatMulNBits", "MatMul", "MatMulNBits"]


def test_the_tables_hold_the_angles_of_every_position(workshop: Workshop) -> None:
    node = attention(workshop.run("llama", EXPORT, FUSE).model)[1]
    cosines, sines = (value.const_value.numpy() for value in node.inputs[7:9])  # type: ignore[union-attr]
    angles = np.arange(64)[:, None] * 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(cosines, np.cos(angles), atol=1e-5)  # an angle of 63 has 4e-6 in float32
    np.testing.assert_allclose(sines, np.sin(angles), atol=1e-5)


@pytest.mark.parametrize(("name", "steps"), DECODERS)
def test_the_weights_take_no_more_room(workshop: Workshop, name: str, steps: tuple[Pass, ...]) -> None:
    before, after = workshop.run(name, *steps).model, workshop.run(name, *steps, FUSE).model
    assert abs(stored_bytes(after) - stored_bytes(before) - ROTARY_BYTES) <= SMALL


def test_a_second_run_is_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("llama", EXPORT, FUSE).model, tmp_path)
    assert reason.startswith("fuse_gqa: matched 0 of 2 places; first refusal: GroupQueryAttention 0: ")
    assert reason.endswith("the rotary embedding is inside already")


def test_heads_of_a_width_that_the_operator_cannot_rotate_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("llama-odd-heads", EXPORT).model, tmp_path)
    assert reason.endswith("GroupQueryAttention 0: heads are 24 wide, the operator rotates multiples of 16")


def test_an_encoder_has_nothing_to_fuse(workshop: Workshop, tmp_path: Path) -> None:
    assert refusal(workshop, FUSE, workshop.run("bert", EXPORT).model, tmp_path).startswith(
        "fuse_gqa: matched 0 of 0 places; the graph has no GroupQueryAttention"
    )


def test_a_rotation_of_another_form_is_left_alone_and_noted(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.run("llama", EXPORT).model
    graph = load_graph(model.folder)
    negation = next(node for node in graph.graph if node.op_type == "Neg")
    negation.outputs[0].replace_all_uses_with(negation.inputs[0])  # type: ignore[arg-type]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_graph(graph, tmp_path / "in")
    other = Model(model.stage, tmp_path / "in", model.assets, model.config)
    result = FUSE.run(other, workshop.context(tmp_path / "out", other))
    assert (result.changes["matched"], result.changes["refused"]) == (1, 1)
    assert result.note.startswith("GroupQueryAttention 0: ") and "expected Neg" in result.note
    FUSE.ensures(other, result.model, workshop.context(tmp_path, other))


def test_ensures_finds_numbers_that_moved(workshop: Workshop, tmp_path: Path) -> None:
    before, after = workshop.run("llama", EXPORT).model, workshop.run("llama", EXPORT, FUSE).model
    graph = load_graph(after.folder)
    for node in graph.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 1.01 * node.attributes.get_float("scale"))
    save_graph(graph, tmp_path)
    moved = Model(after.stage, tmp_path, after.assets, after.config)
    with pytest.raises(PassError, match=r"^fuse_gqa: numbers moved by \d.* of their range, expected at most 1e-05"):
        FUSE.ensures(before, moved, workshop.context(tmp_path, before))
