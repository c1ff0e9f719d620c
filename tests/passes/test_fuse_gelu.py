"""fuse_gelu: one node for GELU and the bias before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_cases import checked, constant, edited, nodes, refusal, show_as_output
from tiny_models import EXPORT, Workshop, op_counts

from passes._graph import load_graph
from passes._match import Refusal
from passes.fuse_gelu import FuseGelu
from passes.quantize_rtn import QuantizeRtn

FUSE = FuseGelu()


@pytest.mark.parametrize(
    ("name", "kind", "inputs"),
    [
        ("bert-sharp", "BiasGelu", 2),
        pytest.param("phi", "FastGelu", 2, marks=pytest.mark.slow),
        ("gpt2", "FastGelu", 1),
    ],  # gpt2's biases are inside Gemm
)
def test_every_activation_becomes_one_node(
    workshop: Workshop, tmp_path: Path, name: str, kind: str, inputs: int
) -> None:
    before, result = workshop.run(name, EXPORT).model, workshop.run(name, EXPORT, FUSE)
    counts = op_counts(result.model)
    assert (result.changes["matched"], counts[kind], counts["Gelu"], counts["Pow"]) == (2, 2, 0, 0)
    assert all(len(node.inputs) == inputs for node in nodes(load_graph(result.model.folder), kind))
    FUSE.ensures(before, result.model, workshop.context(tmp_path, before))


@pytest.mark.parametrize("name", ["bert-sharp", "phi"])
def test_the_form_of_the_function_stays(workshop: Workshop, name: str) -> None:
    """Erf stays erf and tanh stays tanh: the two differ by up to 5e-4, float32 rounding by 1e-6."""
    fused = nodes(
        load_graph(workshop.run(name, EXPORT, FUSE).model.folder), "BiasGelu" if name != "phi" else "FastGelu"
    )
    x, bias = np.linspace(-4, 4, 64, dtype=np.float32)[None], np.zeros(64, np.float32)
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    by_tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    got = run_node(fused[0], x, bias)
    same, other = (exact, by_tanh) if name == "bert-sharp" else (by_tanh, exact)
    assert np.abs(got - same).max() < 2e-6
    assert np.abs(got - other).max() > 2e-4


def run_node(node: ir.Node, *inputs: np.ndarray) -> np.ndarray:
    values = [
        ir.Value(name=f"x{i}", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for i, x in enumerate(inputs)
    ]
    alone = ir.Node(node.domain, node.op_type, values, node.attributes.values())
    alone.outputs[0].name, alone.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, alone.outputs, nodes=[alone], opset_imports={"": 23, "com.microsoft": 1}, name="alone")
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())
    result: np.ndarray = session.run(None, {f"x{i}": x for i, x in enumerate(inputs)})[0]
    return result


def test_a_bias_that_is_read_elsewhere_is_left_alone(workshop: Workshop, tmp_path: Path) -> None:
    def show_biased(graph: ir.Model) -> None:
        show_as_output(graph, nodes(graph, "Gelu")[0].inputs[0])  # type: ignore[arg-type]

    fused = checked(workshop, FUSE, edited(workshop.run("bert-sharp", EXPORT).model, tmp_path, show_biased), tmp_path)
    assert (op_counts(fused)["Gelu"], op_counts(fused)["BiasGelu"]) == (1, 1)


def test_a_bias_of_the_tanh_form_that_is_read_elsewhere_stays_outside(workshop: Workshop, tmp_path: Path) -> None:
    def show_biased(graph: ir.Model) -> None:
        value = nodes(graph, "Pow")[0].inputs[0]
        assert value is not None
        show_as_output(graph, value)

    fused = checked(workshop, FUSE, edited(workshop.run("phi", EXPORT).model, tmp_path, show_biased), tmp_path)
    assert sorted(len(node.inputs) for node in nodes(load_graph(fused.folder), "FastGelu")) == [1, 2]


def number(name: str, value: float) -> Callable[[ir.Model], None]:
    """Return a change of the first constant that is `name`'s second operand."""

    def change(graph: ir.Model) -> None:
        node = nodes(graph, "Tanh")[0]
        if name == "slope":
            node = node.inputs[0].producer()  # type: ignore[union-attr,assignment]
        elif name == "exponent":
            node = nodes(graph, "Pow")[0]
        elif name == "one":
            node = node.outputs[0].consumers()[0]
        elif name == "cubic":
            node = nodes(graph, "Pow")[0].outputs[0].consumers()[0]
        place = next(i for i, v in enumerate(node.inputs) if v is not None and v.const_value is not None)
        node.replace_input_with(place, constant(graph, "other", ir.Tensor(np.array(value, np.float32))))

    return change


def tanh_as_output(graph: ir.Model) -> None:
    show_as_output(graph, nodes(graph, "Tanh")[0].outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (number("slope", 0.79), "is 0.79.*, expected 0.797885"),
        (number("exponent", 2.0), "does not take its input"),
        (number("one", 2.0), "is 2, expected 1"),
        (number("cubic", 0.05), "does not take its input"),
        (tanh_as_output, "goes to Add, the graph's output, expected Add alone"),
    ],
)
def test_another_function_is_left_alone(
    workshop: Workshop, tmp_path: Path, change: Callable[[ir.Model], None], reason: str
) -> None:
    model = edited(workshop.run("phi", EXPORT).model, tmp_path, change)
    graph = load_graph(model.folder)
    with pytest.raises(Refusal, match=reason):
        FUSE.rewrite(nodes(graph, "Tanh")[0], graph, model)


def test_a_bias_of_another_width_is_left_alone(workshop: Workshop, tmp_path: Path) -> None:
    def one_number_for_all(graph: ir.Model) -> None:
        addition = nodes(graph, "Gelu")[0].inputs[0].producer()  # type: ignore[union-attr]
        addition.replace_input_with(1, constant(graph, "one", ir.Tensor(np.ones(1, np.float32))))  # type: ignore[union-attr]

    model = edited(workshop.run("bert-sharp", EXPORT).model, tmp_path, one_number_for_all)
    graph = load_graph(model.folder)
    with pytest.raises(Refusal, match=r"one has 1 numbers, .* is 64 wide"):
        FUSE.rewrite(nodes(graph, "Gelu")[0], graph, model)


def test_quantized_layers_that_hold_their_bias_are_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    int8 = QuantizeRtn(format="int8", group_size=32)
    reason = refusal(workshop, FUSE, workshop.run("bert-sharp", int8, EXPORT).model, tmp_path)
    assert reason.endswith("comes from MatMulNBits, expected Add")


def test_a_second_run_is_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    reason = refusal(workshop, FUSE, workshop.run("gpt2", EXPORT, FUSE).model, tmp_path)
    assert reason == "fuse_gelu: matched 0 of 0 places; the graph has no Gelu or Tanh"
