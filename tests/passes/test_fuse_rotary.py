"""fuse_rotary: the rotary embedding of encoders as one operator."""

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
from passes.fuse_rotary import FuseRotary

FUSE = FuseRotary()


def test_queries_and_keys_are_turned_by_one_operator_each(workshop: Workshop, tmp_path: Path) -> None:
    before, result = workshop.run("modernbert-sharp", EXPORT).model, workshop.run("modernbert-sharp", EXPORT, FUSE)
    counts = op_counts(result.model)
    assert (result.changes["matched"], counts["RotaryEmbedding"]) == (8, 8)
    assert not counts.keys() & {"Cos", "Sin", "Neg"}
    FUSE.ensures(before, result.model, workshop.context(tmp_path, before))


def test_layers_that_turn_alike_share_their_tables(workshop: Workshop) -> None:
    """Layers with a window turn by other angles than those without."""
    graph = load_graph(workshop.run("modernbert-sharp", EXPORT, FUSE).model.folder)
    tables = [tuple(value.name for value in node.inputs[2:]) for node in nodes(graph, "RotaryEmbedding")]
    assert len(set(tables)) == 2
    assert tables[0] == tables[1] != tables[2] == tables[3]
    cosines = graph.graph.initializers[str(tables[2][0])].const_value
    assert cosines is not None
    angles = np.arange(32)[:, None] * 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(cosines.numpy(), np.cos(angles), atol=1e-5)  # an angle of 31 has 2e-6 in float32


def test_ensures_finds_numbers_that_moved(workshop: Workshop, tmp_path: Path) -> None:
    def begin_one_later(graph: ir.Model) -> None:
        for node in nodes(graph, "RotaryEmbedding")[::2]:  # queries alone: both together would turn by the same
            node.replace_input_with(1, constant(graph, f"later.{node.name}", ir.Tensor(np.array([1]))))

    before = workshop.run("modernbert-sharp", EXPORT).model
    moved = edited(workshop.run("modernbert-sharp", EXPORT, FUSE).model, tmp_path, begin_one_later)
    with pytest.raises(PassError, match=r"^fuse_rotary: numbers moved by "):
        FUSE.ensures(before, moved, workshop.context(tmp_path, before))


def counting_from_one(graph: ir.Model) -> None:
    count = next(n for n in nodes(graph, "Range") if n.outputs[0].uses() and n.outputs[0].name == "arange")
    count.replace_input_with(0, constant(graph, "first", ir.Tensor(np.array(1))))


def halves_of_another_width(graph: ir.Model) -> None:
    half = nodes(graph, "Neg")[0].inputs[0].producer()  # type: ignore[union-attr]
    half.replace_input_with(1, constant(graph, "six", ir.Tensor(np.array([6]))))  # type: ignore[union-attr]


def rotation_as_output(graph: ir.Model) -> None:
    show_as_output(graph, nodes(graph, "Neg")[0].outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (counting_from_one, "positions begin at 1 and go by 1"),
        (halves_of_another_width, "the first half is 0 to 8, the second begins at 6"),
        (rotation_as_output, "goes to Concat, the graph's output, expected Concat alone"),
    ],
)
def test_a_rotation_of_another_form_is_left_alone(
    workshop: Workshop, tmp_path: Path, change: Callable[[ir.Model], None], reason: str
) -> None:
    model = edited(workshop.run("modernbert-sharp", EXPORT).model, tmp_path, change)
    graph = load_graph(model.folder)
    with pytest.raises(Refusal, match=reason):
        FUSE.rewrite(nodes(graph, "Neg")[0], graph, model)


def test_decoders_and_encoders_without_rotation_are_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("llama", EXPORT).model, tmp_path)
    assert reason.startswith("fuse_rotary: matched 0 of 4 places; first refusal: Neg 0: ")
    reason = refusal(workshop, FUSE, workshop.run("bert-sharp", EXPORT).model, tmp_path)
    assert reason == "fuse_rotary: matched 0 of 0 places; the graph has no Neg"
