"""fuse_norm: one node for each RMS norm and the addition before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_cases import checked, constant, edited, nodes, refusal, show_as_output
from tiny_models import EXPORT, MIXED, TABLES_IN_INT8, Workshop, op_counts

from passes._graph import DATA, load_graph, save_graph
from passes._match import Refusal
from passes.base import Model, Pass, PassError
from passes.fuse_norm import FuseNorm
from passes.quantize_int8 import QuantizeInt8
from passes.quantize_rtn import QuantizeRtn

FUSE = FuseNorm()
INT8 = QuantizeRtn(format="int8", group_size=32)
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


def test_a_second_run_is_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("llama", EXPORT, FUSE).model, tmp_path)
    assert reason == "fuse_norm: matched 0 of 0 places; the graph has no Pow or LayerNormalization"
    reason = refusal(workshop, FUSE, workshop.run("bert-sharp", EXPORT, FUSE).model, tmp_path)
    assert "matched 0 of 1 places; first refusal: LayerNormalization 0: " in reason


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


LAYER_NORMS = [
    # normalizations fused; those left alone; biases folded in
    ("bert-sharp", (EXPORT,), (4, 1, 4)),
    ("bert-sharp", (INT8, EXPORT), (4, 1, 0)),  # the biases are inside MatMulNBits
    ("bert-sharp", (QuantizeInt8(), EXPORT), (4, 1, 4)),
    ("gpt2", (EXPORT,), (5, 0, 0)),  # and inside Gemm
    pytest.param("phi", (EXPORT,), (2, 1, 0), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "steps", "expected"), LAYER_NORMS)
def test_a_layer_norm_takes_the_residual_and_the_bias_before_it(
    workshop: Workshop, tmp_path: Path, name: str, steps: tuple[Pass, ...], expected: tuple[int, int, int]
) -> None:
    before, after = workshop.run(name, *steps).model, workshop.run(name, *steps, FUSE).model
    graph = load_graph(after.folder)
    fused = nodes(graph, "SkipLayerNormalization")
    biases = sum(len(node.inputs) > 4 and node.inputs[4] is not None for node in fused)
    assert (len(fused), len(nodes(graph, "LayerNormalization")), biases) == expected
    assert op_counts(before)["Add"] - op_counts(after)["Add"] == len(fused) + biases
    FUSE.ensures(before, after, workshop.context(tmp_path, before))


def test_the_sum_is_returned_only_where_it_is_read(workshop: Workshop) -> None:
    """A pre-norm block adds to the sum again; after a post-norm, and before the last norm, nothing does."""
    for name, expected in (("bert-sharp", [1, 1, 1, 1]), ("gpt2", [4, 4, 4, 4, 1])):
        fused = nodes(load_graph(workshop.run(name, EXPORT, FUSE).model.folder), "SkipLayerNormalization")
        assert [len(node.outputs) for node in fused] == expected


def test_a_bias_that_is_read_elsewhere_is_not_folded_in(workshop: Workshop, tmp_path: Path) -> None:
    def show_biased(graph: ir.Model) -> None:
        show_as_output(graph, nodes(graph, "LayerNormalization")[1].inputs[0].producer().inputs[0])  # type: ignore[union-attr,arg-type]

    fused = checked(workshop, FUSE, edited(workshop.run("bert-sharp", EXPORT).model, tmp_path, show_biased), tmp_path)
    first = nodes(load_graph(fused.folder), "SkipLayerNormalization")[0]
    assert len(first.inputs) <= 4 or first.inputs[4] is None


def test_the_normalized_value_may_be_the_graphs_output(workshop: Workshop, tmp_path: Path) -> None:
    before, after = workshop.run("bert-embedder", EXPORT).model, workshop.run("bert-embedder", EXPORT, FUSE).model
    assert [v.name for v in load_graph(after.folder).graph.outputs] == ["last_hidden_state"]
    FUSE.ensures(before, after, workshop.context(tmp_path, before))


def stretched_term(graph: ir.Model) -> None:
    addition = nodes(graph, "LayerNormalization")[1].inputs[0].producer()  # type: ignore[union-attr]
    row = ir.node("ReduceMean", [addition.inputs[1], constant(graph, "one", ir.Tensor(np.array([1])))])  # type: ignore[union-attr]
    row.outputs[0].shape = ir.Shape([addition.inputs[1].shape[0], 1, 32])  # type: ignore[union-attr,index]
    row.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.graph.insert_before(addition, row)  # type: ignore[arg-type]
    addition.replace_input_with(1, row.outputs[0])  # type: ignore[union-attr]


def mean_as_output(graph: ir.Model) -> None:
    old = nodes(graph, "LayerNormalization")[1]
    new = ir.node("LayerNormalization", old.inputs, old.attributes, num_outputs=2)
    graph.graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0])
    new.outputs[1].name, new.outputs[1].shape = "mean", ir.Shape(["batch", "tokens", 1])
    new.outputs[1].type = ir.TensorType(ir.DataType.FLOAT)
    show_as_output(graph, new.outputs[1])
    graph.graph.remove(old, safe=True)


def two_axes(graph: ir.Model) -> None:
    nodes(graph, "LayerNormalization")[1].attributes["axis"] = ir.AttrInt64("axis", 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (stretched_term, "is stretched to"),
        (mean_as_output, "its mean is used"),
        (two_axes, "the normalization is not over the last axis"),
    ],
)
def test_a_layer_norm_of_another_form_is_left_alone(
    workshop: Workshop, tmp_path: Path, change: Callable[[ir.Model], None], reason: str
) -> None:
    model = edited(workshop.run("bert-sharp", EXPORT).model, tmp_path, change)
    graph = load_graph(model.folder)
    with pytest.raises(Refusal, match=reason):
        FUSE.rewrite(nodes(graph, "LayerNormalization")[1], graph, model)


def test_ensures_finds_numbers_that_moved(workshop: Workshop, tmp_path: Path) -> None:
    before, after = workshop.run("llama", EXPORT).model, workshop.run("llama", EXPORT, FUSE).model
    graph = load_graph(after.folder)
    node = next(node for node in graph.graph if node.op_type == "SimplifiedLayerNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    save_graph(graph, tmp_path)
    moved = Model(after.stage, tmp_path, after.assets, after.config)
    with pytest.raises(PassError, match=r"^fuse_norm: numbers moved by \d.* of their range, expected at most 1e-05"):
        FUSE.ensures(before, moved, workshop.context(tmp_path, before))
