"""fuse_norm: one node for each RMS norm and the addition before it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from graph_cases import refusal
from tiny_models import EXPORT, MIXED, TABLES_IN_INT8, Workshop, op_counts

from passes._graph import DATA, load_graph, save_graph
from passes.base import Model, Pass, PassError
from passes.fuse_norm import FuseNorm

FUSE = FuseNorm()
DECODERS: list[tuple[str, tuple[Pass, ...]]] = [
    ("llama", (EXPORT,)),
    ("llama", (TABLES_IN_INT8, EXPORT)),
    ("qwen2", (MIXED, EXPORT)),
]


@pytest.mark.parametrize(("name", "steps"), DECODERS)
def test_every_norm_becomes_one_node(workshop: Workshop, name: str, steps: tuple[Pass, ...]) -> None:
    before, result = workshop.run(name, *steps).model, workshop.run(name, *steps, FUSE)
    assert (result.changes["matched"], result.changes["refused"]) == (5, 0)
    counts = op_counts(result.model)
    # The first norm follows the embedding; the others follow a residual addition.
    assert (counts["SimplifiedLayerNormalization"], counts["SkipSimplifiedLayerNormalization"]) == (1, 4)
    assert not counts.keys() & {"Pow", "ReduceMean", "Sqrt", "Reciprocal"}
    assert result.changes["nodes_removed"] == 5 * 7 + 4 - 5  # five norms of 7 nodes, 4 additions, 5 fused nodes
    assert op_counts(before)["Add"] - counts["Add"] == 5 + 4  # epsilons and residuals


@pytest.mark.parametrize(("name", "steps"), DECODERS)
def test_the_numbers_are_kept(workshop: Workshop, tmp_path: Path, name: str, steps: tuple[Pass, ...]) -> None:
    before = workshop.run(name, *steps).model
    FUSE.ensures(before, workshop.run(name, *steps, FUSE).model, workshop.context(tmp_path, before))


def test_epsilon_is_the_models(workshop: Workshop) -> None:
    model = workshop.run("llama", EXPORT, FUSE).model
    nodes = [node for node in load_graph(model.folder).graph if node.op_type.endswith("SimplifiedLayerNormalization")]
    assert [node.attributes.get_float("epsilon") for node in nodes] == [pytest.approx(model.config["rms_norm_eps"])] * 5


def test_weights_take_the_same_room(workshop: Workshop) -> None:
    before, after = workshop.run("llama", EXPORT).model, workshop.run("llama", EXPORT, FUSE).model
    assert (after.folder / DATA).stat().st_size == (before.folder / DATA).stat().st_size


def test_a_second_run_and_an_encoder_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    for model in (workshop.run("llama", EXPORT, FUSE).model, workshop.run("bert", EXPORT).model):
        reason = refusal(workshop, FUSE, model, tmp_path)
        assert reason == "fuse_norm: matched 0 of 0 places; the graph has no Pow"


def test_a_power_that_is_no_square_is_left_alone_and_noted(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.run("llama", EXPORT).model
    graph = load_graph(model.folder)
    cubed = next(node for node in graph.graph if node.op_type == "Pow")
    three = ir.Tensor(cubed.inputs[1].const_value.numpy() + 1, name="three")  # type: ignore[union-attr]
    graph.graph.initializers["three"] = ir.Value(name="three", const_value=three)
    cubed.replace_input_with(1, graph.graph.initializers["three"])
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_graph(graph, tmp_path / "in")
    other = Model(model.stage, tmp_path / "in", model.assets, model.config)
    result = FUSE.run(other, workshop.context(tmp_path / "out", other))
    assert (result.changes["matched"], result.changes["refused"]) == (4, 1)
    assert result.note == "Pow 0: the exponent is not 2"
    assert op_counts(result.model)["Pow"] == 1


def test_ensures_finds_numbers_that_moved(workshop: Workshop, tmp_path: Path) -> None:
    before, after = workshop.run("llama", EXPORT).model, workshop.run("llama", EXPORT, FUSE).model
    graph = load_graph(after.folder)
    node = next(node for node in graph.graph if node.op_type == "SimplifiedLayerNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    save_graph(graph, tmp_path)
    moved = Model(after.stage, tmp_path, after.assets, after.config)
    with pytest.raises(PassError, match=r"^fuse_norm: numbers moved by \d.* of their range, expected at most 1e-05"):
        FUSE.ensures(before, moved, workshop.context(tmp_path, before))
