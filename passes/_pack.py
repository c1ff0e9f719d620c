"""Join linear layers that share their input into one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from passes._match import insert, joined, made_by, require


def pack_linears(graph: ir.Model, outputs: Sequence[ir.Value], name: str) -> ir.Value:
    """Return one value that holds the given linear outputs side by side on the last axis.

    Each output is made by MatMulNBits, by MatMul, or by MatMul and an addition of a bias. Nothing is removed: the old
    nodes lose their use.

    Raises:
        Refusal: the layers differ in input, kind, format or bias.
    """
    nodes = [made_by(value, "MatMulNBits", "MatMul", "Add") for value in outputs]
    require(len({node.op_type for node in nodes}) == 1, f"{name}: the layers are of different kinds")
    if nodes[0].op_type == "Add":
        return _pack_biased(graph, nodes, name)
    return _pack_products(graph, nodes, name)


def _pack_biased(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> ir.Value:
    products, biases = [], []
    for node in nodes:
        first, second = node.inputs
        require(first is not None and second is not None, f"{name}: an addition lacks a term")
        assert first is not None and second is not None
        product, bias = (second, first) if first.const_value is not None else (first, second)
        require(bias.const_value is not None, f"{name}: a bias is no constant")
        products.append(made_by(product, "MatMul"))
        biases.append(bias)
    packed = _pack_products(graph, products, name)
    addition = ir.node("Add", [packed, joined(graph, f"{name}.bias", biases, 0)])
    graph.graph.insert_after(packed.producer(), addition)  # type: ignore[arg-type]
    return addition.outputs[0]


def _pack_products(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> ir.Value:
    require(len({id(node.inputs[0]) for node in nodes}) == 1, f"{name}: the layers do not share their input")
    first = nodes[0]
    if first.op_type == "MatMul":
        weights = [node.inputs[1] for node in nodes]
        inputs = [first.inputs[0], joined(graph, f"{name}.weight", weights, 1)]  # type: ignore[arg-type]
        packed = ir.node("MatMul", inputs)
    else:
        packed = ir.node(
            "MatMulNBits", _joined_nbits(graph, nodes, name), _nbits_attributes(nodes, name), domain=first.domain
        )
    earliest = min(nodes, key=list(graph.graph).index)
    insert(graph, earliest, packed)
    return packed.outputs[0]


def _joined_nbits(graph: ir.Model, nodes: Sequence[ir.Node], name: str) -> list[ir.Value | None]:
    present = {tuple(value is not None for value in node.inputs) for node in nodes}
    require(len(present) == 1, f"{name}: some layers have zero points or biases and some have none")
    leaves = ("input", "qweight", "scales", "zero_points", "g_idx", "bias")
    inputs: list[ir.Value | None] = [nodes[0].inputs[0]]
    for place in range(1, len(nodes[0].inputs)):
        parts = [node.inputs[place] for node in nodes]
        joins = None if parts[0] is None else joined(graph, f"{name}.{leaves[place]}", parts, 0)  # type: ignore[arg-type]
        inputs.append(joins)
    return inputs


def _nbits_attributes(nodes: Sequence[ir.Node], name: str) -> dict[str, int]:
    formats = [
        {key: node.attributes.get_int(key) for key in ("K", "bits", "block_size", "accuracy_level")} for node in nodes
    ]
    require(all(form == formats[0] for form in formats), f"{name}: the layers are in different formats: {formats}")
    return {**formats[0], "N": sum(node.attributes.get_int("N") for node in nodes)}
