"""fuse_embeddings: one operator for the sum of embeddings and its norm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_cases import constant, edited, nodes, refusal, show_as_output
from tiny_models import EXPORT, Workshop, op_counts

from passes._graph import load_graph
from passes._match import Refusal
from passes.base import PassError
from passes.fuse_embeddings import FuseEmbeddings
from passes.quantize_rtn import QuantizeRtn

FUSE = FuseEmbeddings()


@pytest.mark.parametrize(
    ("name", "word", "position", "types"),
    [
        ("bert-sharp", "word_embeddings", "position_embeddings", "token_type_embeddings"),
        pytest.param(  # its positions differ by sequence
            "mpnet-sharp", "word_embeddings", "position_embeddings", None, marks=pytest.mark.slow
        ),
    ],
)
def test_look_ups_and_norm_become_one_operator(
    workshop: Workshop, tmp_path: Path, name: str, word: str, position: str, types: str | None
) -> None:
    before, result = workshop.run(name, EXPORT).model, workshop.run(name, EXPORT, FUSE)
    assert result.changes["matched"] == 1
    (fused,) = nodes(load_graph(result.model.folder), "EmbedLayerNormalization")
    tables = [value and str(value.name).split(".")[-2] for value in fused.inputs[2:5]]
    assert tables == [word, position, types]
    FUSE.ensures(before, result.model, workshop.context(tmp_path, before))


def test_epsilon_is_the_models(workshop: Workshop) -> None:
    model = workshop.run("bert-sharp", EXPORT, FUSE).model
    (fused,) = nodes(load_graph(model.folder), "EmbedLayerNormalization")
    assert fused.attributes.get_float("epsilon") == pytest.approx(model.config["layer_norm_eps"])


def test_a_quantized_table_is_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    int8 = QuantizeRtn(format="int8", group_size=32, embedding="int8")
    reason = refusal(workshop, FUSE, workshop.run("bert-sharp", int8, EXPORT).model, tmp_path)
    assert "comes from GatherBlockQuantized, expected Add or Gather" in reason


def test_decoders_and_a_second_run_are_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("phi", EXPORT).model, tmp_path)
    assert "embedding is used elsewhere" in reason
    reason = refusal(workshop, FUSE, workshop.run("bert-sharp", EXPORT, FUSE).model, tmp_path)
    assert "expected Add or Gather" in reason
    assert op_counts(workshop.run("bert-sharp", EXPORT, FUSE).model)["EmbedLayerNormalization"] == 1


def sum_as_output(graph: ir.Model) -> None:
    show_as_output(graph, nodes(graph, "LayerNormalization")[0].inputs[0])  # type: ignore[arg-type]


def no_bias(graph: ir.Model) -> None:
    norm = nodes(graph, "LayerNormalization")[0]
    norm.resize_inputs(2)


def one_position(graph: ir.Model) -> None:
    lookup = next(n for n in nodes(graph, "Gather") if n.inputs[1].name == "slice_1")  # type: ignore[union-attr]
    lookup.replace_input_with(1, constant(graph, "first", ir.Tensor(np.zeros((1, 1), np.int64))))


def by_column(graph: ir.Model) -> None:
    nodes(graph, "Gather")[0].attributes["axis"] = ir.AttrInt64("axis", 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sum_as_output, "is used elsewhere"),
        (no_bias, "the normalization has no bias"),
        (one_position, "one position stands for all tokens"),
        (by_column, "is not looked up by row"),
    ],
)
def test_a_sum_of_another_form_is_left_alone(
    workshop: Workshop, tmp_path: Path, change: Callable[[ir.Model], None], reason: str
) -> None:
    model = edited(workshop.run("bert-sharp", EXPORT).model, tmp_path, change)
    graph = load_graph(model.folder)
    with pytest.raises(Refusal, match=reason):
        FUSE.rewrite(nodes(graph, "LayerNormalization")[0], graph, model)


def test_ensures_finds_numbers_that_moved(workshop: Workshop, tmp_path: Path) -> None:
    def types_for_positions(graph: ir.Model) -> None:
        node = nodes(graph, "EmbedLayerNormalization")[0]
        node.replace_input_with(8, node.inputs[1])

    before = workshop.run("bert-sharp", EXPORT).model
    moved = edited(workshop.run("bert-sharp", EXPORT, FUSE).model, tmp_path, types_for_positions)
    with pytest.raises(PassError, match=r"^fuse_embeddings: numbers moved by "):
        FUSE.ensures(before, moved, workshop.context(tmp_path, before))
