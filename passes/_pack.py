"""Join linear layers that share their input into one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from passes._at_load import joined_at_load
from passes._match import insert, joined, made_by, operands, other, require, split_constant


def pack_linears(graph: ir.Model, outputs: Sequence[ir.Value], name: str) -> ir.Value:
    """Return one value that holds the given linear outputs side by side on the last axis.

    Each output is made by MatMulNBits, MatMulIntegerToFloat or MatMul; by one of them and a multiplication by the range
    of each row; or by one of those and an addition of a bias. Nothing is removed: the old nodes lose their use.

    Raises:
        Refusal: the layers differ in input, kind, format or bias.
    """
    nodes = [made_by(value, *_PACKERS) for value in outputs]
    require(len({node.op_type for node in nodes}) == 1, f"{name}: the layers are of different kinds")
    return _PACKERS[nodes[0].op_type](graph, nodes, name)


def _pack_biased(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> ir.Value:
    products, biases = [], []
    for node in nodes:
        product, bias = split_constant(node)
        made_by(product, "MatMul", "Mul")
        products.append(product)
        biases.append(bias)
    packed = pack_linears(graph, products, name)
    return _insert_after(graph, packed, ir.node("Add", [packed, joined(graph, f"{name}.bias", biases, 0)]))


def _pack_ranged(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> ir.Value:
    products = []
    for node in nodes:
        found = [value for value in operands(node) if _makes_integer_product(value)]
        require(len(found) == 1, f"{name}: a multiplication follows no MatMulIntegerToFloat")
        products += found
    ranges = [other(node, product) for node, product in zip(nodes, products, strict=True)]
    require(all(each is ranges[0] for each in ranges), f"{name}: the layers do not share the ranges of their rows")
    packed = pack_linears(graph, products, name)
    return _insert_after(graph, packed, ir.node("Mul", [packed, ranges[0]]))


def _pack_products(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> ir.Value:
    _require_same(nodes, (0,), f"{name}: the layers do not share their input")
    weights = [node.inputs[1] for node in nodes]
    inputs = [nodes[0].inputs[0], joined(graph, f"{name}.weight", weights, 1)]
    return _insert(graph, nodes, ir.node("MatMul", inputs))


def _pack_nbits(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> ir.Value:
    _require_same(nodes, (0,), f"{name}: the layers do not share their input")
    leaves = ("input", "qweight", "scales", "zero_points", "g_idx", "bias")
    attributes = _nbits_attributes(nodes, name)
    inputs = _joined_inputs(graph, nodes, name, leaves, {1: 0, 2: 0, 3: 0, 4: 0, 5: 0})
    return _insert(graph, nodes, ir.node("MatMulNBits", inputs, attributes, domain=nodes[0].domain))


def _pack_integers(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> ir.Value:
    _require_same(nodes, (0, 2, 4), f"{name}: the layers do not share their input's integers, scale and zero point")
    leaves = ("input", "weight", "input_scale", "scales", "input_zero_point", "zero_point", "bias")
    inputs = _joined_inputs(graph, nodes, name, leaves, {1: 1, 3: 0, 6: 0})
    return _insert(graph, nodes, ir.node("MatMulIntegerToFloat", inputs, domain=nodes[0].domain))


_PACKERS = {
    "MatMulNBits": _pack_nbits,
    "MatMulIntegerToFloat": _pack_integers,
    "MatMul": _pack_products,
    "Mul": _pack_ranged,
    "Add": _pack_biased,
}


def _joined_inputs(
    graph: ir.Model, nodes: Sequence[ir.Node], name: str, leaves: Sequence[str], axes: dict[int, int]
) -> list[ir.Value | None]:
    """Return the inputs of the joined node: those at the places of `axes` side by side, the others as they are."""
    present = {tuple(value is not None for value in node.inputs) for node in nodes}
    require(len(present) == 1, f"{name}: some layers have zero points or biases and some have none")
    inputs, first = list(nodes[0].inputs), _first(graph, nodes)
    for place, axis in axes.items():
        if place < len(inputs) and inputs[place] is not None:
            parts, leaf = [part for node in nodes if (part := node.inputs[place])], f"{name}.{leaves[place]}"
            is_rows = axis == 0
            inputs[place] = joined_at_load(graph, first, leaf, parts) if is_rows else joined(graph, leaf, parts, axis)
    return inputs


def _nbits_attributes(nodes: Sequence[ir.Node], name: str) -> dict[str, int]:
    keys = ("K", "bits", "block_size", "accuracy_level")
    values = {key: [node.attributes.get_int(key) for node in nodes] for key in keys}
    differing = [f"{key} {', '.join(map(str, each))}" for key, each in values.items() if len(set(each)) > 1]
    require(not differing, f"{name}: the layers are in different formats: {'; '.join(differing)}")
    return {**{key: each[0] for key, each in values.items()}, "N": sum(node.attributes.get_int("N") for node in nodes)}


def _require_same(nodes: Sequence[ir.Node], places: Sequence[int], reason: str) -> None:
    require(all(len({id(node.inputs[place]) for node in nodes}) == 1 for place in places), reason)


def _makes_integer_product(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "MatMulIntegerToFloat"


def _insert(graph: ir.Model, nodes: Sequence[ir.Node], packed: ir.Node) -> ir.Value:
    insert(graph, _first(graph, nodes), packed)
    return packed.outputs[0]


def _first(graph: ir.Model, nodes: Sequence[ir.Node]) -> ir.Node:
    return min(nodes, key=list(graph.graph).index)


def _insert_after(graph: ir.Model, value: ir.Value, node: ir.Node) -> ir.Value:
    producer = value.producer()
    assert producer is not None
    graph.graph.insert_after(producer, node)
    return node.outputs[0]
