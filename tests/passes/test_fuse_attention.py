"""fuse_attention: heads split and joined by the operator itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_cases import checked, constant, edited, nodes, refusal, show_as_output
from tiny_models import EXPORT, Workshop, op_counts

from passes._graph import load_graph
from passes.base import GraphPass, Pass, PassError
from passes.fuse_attention import FuseAttention
from passes.fuse_gelu import FuseGelu
from passes.fuse_norm import FuseNorm
from passes.fuse_rotary import FuseRotary
from passes.quantize_int8 import QuantizeInt8
from passes.quantize_rtn import QuantizeRtn

FUSE = FuseAttention()
INT8 = QuantizeRtn(format="int8", group_size=32)
ROWS_INT8 = QuantizeInt8()
ENCODERS = [
    ("bert-sharp", (ROWS_INT8, EXPORT)),
    ("bert-sharp", (EXPORT,)),
    ("bert-sharp", (INT8, EXPORT)),
    pytest.param("mpnet-sharp", (EXPORT,), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "steps"), ENCODERS)
def test_the_operator_reads_and_writes_the_linear_layers(
    workshop: Workshop, name: str, steps: tuple[Pass, ...]
) -> None:
    result = workshop.run(name, *steps, FUSE)
    assert (result.changes["matched"], result.changes["refused"]) == (2, 0)
    counts = op_counts(result.model)
    assert (counts["Attention"], counts["Softmax"]) == (2, 0)
    assert counts["Transpose"] == (name == "mpnet-sharp")  # its relative bias is transposed
    for node in nodes(load_graph(result.model.folder), "Attention"):
        assert (node.attributes.get_int("q_num_heads"), node.attributes.get_int("kv_num_heads")) == (2, 2)
        assert all(value.producer().op_type in ("Add", "MatMulNBits") for value in node.inputs[:3])  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "steps"), ENCODERS)
def test_the_numbers_are_kept(workshop: Workshop, tmp_path: Path, name: str, steps: tuple[Pass, ...]) -> None:
    before = workshop.run(name, *steps).model
    FUSE.ensures(before, workshop.run(name, *steps, FUSE).model, workshop.context(tmp_path, before))


def test_windows_and_rotations_of_packed_projections_are_kept(workshop: Workshop, tmp_path: Path) -> None:
    """ModernBERT: one product for query, key and value, rotated, and a window in three of four layers."""
    before, result = (workshop.run("modernbert-sharp", EXPORT, FuseRotary(), *last) for last in ((), (FUSE,)))
    assert (result.changes["matched"], op_counts(result.model)["Transpose"]) == (4, 0)
    masks = {node.inputs[3] for node in nodes(load_graph(result.model.folder), "Attention")}
    assert len(masks) == 2
    FUSE.ensures(before.model, result.model, workshop.context(tmp_path, before.model))


def test_bias_and_mask_are_added_once_for_all_layers(workshop: Workshop) -> None:
    first, second = nodes(load_graph(workshop.run("mpnet-sharp", EXPORT, FUSE).model.folder), "Attention")
    assert first.inputs[3] is second.inputs[3]
    assert first.attributes.get_float("scale") == 0.25  # 1 / sqrt(E)


def test_a_scale_of_the_models_own_is_kept(workshop: Workshop, tmp_path: Path) -> None:
    def other_scale(graph: ir.Model) -> None:
        division = next(n for n in nodes(graph, "Div") if n.inputs[0].producer().op_type == "MatMul")  # type: ignore[union-attr]
        division.replace_input_with(1, constant(graph, "two", ir.Tensor(np.array(2, np.float32))))

    model = edited(workshop.run("mpnet-sharp", EXPORT).model, tmp_path, other_scale)
    fused = checked(workshop, FUSE, model, tmp_path)
    scales = [node.attributes.get_float("scale") for node in nodes(load_graph(fused.folder), "Attention")]
    assert sorted(scales) == [0.25, 0.5]


def softmax_of_another_axis(graph: ir.Model) -> None:
    nodes(graph, "Softmax")[0].attributes["axis"] = ir.AttrInt64("axis", 1)


def negative_scale(graph: ir.Model) -> None:
    division = next(n for n in nodes(graph, "Div") if n.inputs[0].producer().op_type == "MatMul")  # type: ignore[union-attr]
    division.replace_input_with(1, constant(graph, "negative", ir.Tensor(np.array(-4, np.float32))))


def scale_per_head(graph: ir.Model) -> None:
    division = next(n for n in nodes(graph, "Div") if n.inputs[0].producer().op_type == "MatMul")  # type: ignore[union-attr]
    division.replace_input_with(1, constant(graph, "heads", ir.Tensor(np.full((1, 2, 1, 1), 4, np.float32))))


def probabilities_as_output(graph: ir.Model) -> None:
    show_as_output(graph, nodes(graph, "Softmax")[0].outputs[0])


def mask_of_another_shape(graph: ir.Model) -> None:
    scores = nodes(graph, "Softmax")[0].inputs[0].producer()  # type: ignore[union-attr]
    row = constant(graph, "row", ir.Tensor(np.zeros((1, 1, 1, 1), np.float32)))
    scores.replace_input_with(1, row)  # type: ignore[union-attr]


def result_used_elsewhere(graph: ir.Model) -> None:
    show_as_output(graph, nodes(graph, "Attention")[0].outputs[0])


def keys_not_transposed(graph: ir.Model) -> None:
    attention = nodes(graph, "Attention")[0]
    attention.inputs[1].producer().attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 3, 1])  # type: ignore[union-attr]


def another_domain(graph: ir.Model) -> None:
    nodes(graph, "Attention")[0].domain = "com.microsoft"


def heads_joined_in_another_order(graph: ir.Model) -> None:
    nodes(graph, "Attention")[0].outputs[0].consumers()[0].outputs[0].consumers()[0].attributes["perm"] = ir.AttrInt64s(
        "perm", [0, 1, 3, 2]
    )


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mpnet-sharp", softmax_of_another_axis, "the softmax is not over the last axis"),
        ("mpnet-sharp", negative_scale, "the scores are scaled by -4, expected a positive number"),
        ("mpnet-sharp", scale_per_head, "heads holds 2 numbers, expected one"),
        ("mpnet-sharp", probabilities_as_output, "goes to MatMul, the graph's output, expected MatMul alone"),
        ("mpnet-sharp", mask_of_another_shape, "is added to scores of shape"),
        (
            "bert-sharp",
            result_used_elsewhere,
            "goes to Reshape, the graph's output, expected Transpose or Reshape alone",
        ),
        ("bert-sharp", keys_not_transposed, "is transposed by (0, 2, 3, 1), expected (0, 2, 1, 3)"),
        ("bert-sharp", another_domain, "com.microsoft::Attention is another operator"),
        ("bert-sharp", heads_joined_in_another_order, "is transposed otherwise"),
    ],
)
def test_a_place_of_another_form_is_left_as_it_was_and_noted(
    workshop: Workshop, tmp_path: Path, name: str, change: Callable[[ir.Model], None], reason: str
) -> None:
    model = edited(workshop.run(name, EXPORT).model, tmp_path, change)
    (tmp_path / "out").mkdir()
    result = FUSE.run(model, workshop.context(tmp_path / "out", model))
    assert (result.changes["matched"], result.changes["refused"]) == (1, 1)
    assert reason in result.note


def test_fewer_key_heads_than_query_heads_are_kept_apart(workshop: Workshop, tmp_path: Path) -> None:
    """Two query heads share one key head: the key's projection is narrower, as grouped-query encoders have it."""

    def one_key_head(graph: ir.Model) -> None:
        attention = nodes(graph, "Attention")[0]
        for place in (1, 2):
            transpose = attention.inputs[place].producer()  # type: ignore[union-attr]
            reshape = transpose.inputs[0].producer()  # type: ignore[union-attr]
            linear = reshape.inputs[0]  # type: ignore[union-attr]
            addition = linear.producer()  # type: ignore[union-attr]
            product = addition.inputs[0].producer()  # type: ignore[union-attr]
            for node, side in ((product, 1), (addition, 1)):
                old = node.inputs[side].const_value.numpy()  # type: ignore[union-attr]
                half = ir.Tensor(np.ascontiguousarray(old[..., :16]))
                node.replace_input_with(side, constant(graph, f"half.{place}.{node.op_type}", half))  # type: ignore[union-attr]
            split = ir.Tensor(np.array([0, 0, 1, 16]))
            reshape.replace_input_with(1, constant(graph, f"split.{place}", split))  # type: ignore[union-attr]
            reshape.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)  # type: ignore[union-attr]
            batch, tokens = linear.shape[0], linear.shape[1]  # type: ignore[union-attr,index]
            linear.shape = ir.Shape([batch, tokens, 16])  # type: ignore[union-attr]
            reshape.outputs[0].shape = ir.Shape([batch, tokens, 1, 16])  # type: ignore[union-attr]
            transpose.outputs[0].shape = ir.Shape([batch, 1, tokens, 16])  # type: ignore[union-attr]

    model = edited(workshop.run("bert-sharp", EXPORT).model, tmp_path, one_key_head)
    fused = checked(workshop, FUSE, model, tmp_path)
    heads = [node.attributes.get_int("kv_num_heads") for node in nodes(load_graph(fused.folder), "Attention")]
    assert heads == [1, 2]


def test_a_second_run_and_a_decoder_are_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("bert-sharp", EXPORT, FUSE).model, tmp_path)
    assert reason.endswith("Attention 0: it reads [B, T, heads * E] already")
    reason = refusal(workshop, FUSE, workshop.run("llama", EXPORT).model, tmp_path)
    assert reason == "fuse_attention: matched 0 of 0 places; the graph has no Attention or Softmax"


@pytest.mark.parametrize("order", permutations([FUSE, FuseNorm(), FuseGelu()]))
@pytest.mark.parametrize("first", [(), (ROWS_INT8,)])
def test_the_fusions_go_together_in_any_order(
    workshop: Workshop, tmp_path: Path, first: tuple[Pass, ...], order: tuple[GraphPass, ...]
) -> None:
    before, after = (workshop.run("bert-sharp", *first, EXPORT, *last).model for last in ((), order))
    order[-1].ensures(before, after, workshop.context(tmp_path, before))
    usual = workshop.run("bert-sharp", *first, EXPORT, FUSE, FuseNorm(), FuseGelu()).model
    assert op_counts(after) == op_counts(usual)


def test_ensures_finds_numbers_that_moved(workshop: Workshop, tmp_path: Path) -> None:
    def slightly_other_scale(graph: ir.Model) -> None:
        for node in nodes(graph, "Attention"):
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.251)

    before = workshop.run("bert-sharp", EXPORT).model
    moved = edited(workshop.run("bert-sharp", EXPORT, FUSE).model, tmp_path, slightly_other_scale)
    with pytest.raises(PassError, match=r"^fuse_attention: numbers moved by "):
        FUSE.ensures(before, moved, workshop.context(tmp_path, before))
