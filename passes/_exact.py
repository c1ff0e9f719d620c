"""A graph without the rounding of its activations: what it computes then can be compared to 1e-6.

Scales, zero points, weights and biases take part as they do in the graph itself: one that is wrong shows. Scales of an
int8 cache do not, for they are inside the operator; where its rounding is left in, they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from passes._graph import GRAPH

CACHE_SCALES = 12
"""Place of the first of two inputs of GroupQueryAttention, after which it has no others here."""
_CACHE_ATTRIBUTES = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")


def exact_graph(folder: Path, name: str = GRAPH, *, rounds_cache: bool = False) -> onnx.ModelProto:
    """Return a graph of an onnx stage, its weights still on disk, such that no activation is rounded.

    Its int8 caches hold float32 then, unless `rounds_cache`.
    """
    model = onnx.load(folder / name, load_external_data=False)
    if not rounds_cache:
        _keep_floats(model.graph)
    integers = {node.input[0] for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in integers:
            nodes += _unrounded(node)
        elif node.op_type == "MatMulIntegerToFloat":
            nodes += _float_product(node)
        else:
            nodes.append(_without_accuracy_level(node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _keep_floats(graph: onnx.GraphProto) -> None:
    """Let attention keep keys and values as they are."""
    for node in graph.node:
        if node.op_type == "GroupQueryAttention" and len(node.input) > CACHE_SCALES:
            del node.input[CACHE_SCALES:]
            kept = [each for each in node.attribute if each.name not in _CACHE_ATTRIBUTES]
            del node.attribute[:]
            node.attribute.extend(kept)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _without_accuracy_level(node: onnx.NodeProto) -> onnx.NodeProto:
    """Let a MatMulNBits leave its activations alone."""
    for attribute in node.attribute:
        if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
            attribute.i = 0
    return node


def _unrounded(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Divide and shift as QuantizeLinear does, and neither round nor clip."""
    x, scale, zero_point = node.input
    out = node.output[0]
    yield helper.make_node("Div", [x, scale], [f"{out}.divided"])
    yield from _as_float(zero_point, f"{out}.zero")
    yield helper.make_node("Add", [f"{out}.divided", f"{out}.zero"], [out])


def _float_product(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Multiply what both factors stand for."""
    a, b, a_scale, b_scale, a_zero, *rest = node.input
    bias = rest[1:]  # after the weight's zero point, which is 0
    out = node.output[0]
    product = f"{out}.product" if bias else out
    yield from _as_float(a_zero, f"{out}.a_zero")
    yield helper.make_node("Sub", [a, f"{out}.a_zero"], [f"{out}.a_centred"])
    yield helper.make_node("Mul", [f"{out}.a_centred", a_scale], [f"{out}.a"])
    yield from _as_float(b, f"{out}.b_float")
    yield helper.make_node("Mul", [f"{out}.b_float", b_scale], [f"{out}.b"])
    yield helper.make_node("MatMul", [f"{out}.a", f"{out}.b"], [product])
    if bias:
        yield helper.make_node("Add", [product, bias[0]], [out])


def _as_float(value: str, name: str) -> Iterator[onnx.NodeProto]:
    yield helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT)
