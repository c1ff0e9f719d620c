"""Join values that onnxruntime makes of constants while it loads a graph: those constants are joined instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from passes._match import constant, insert, joined, made_by, new_constant, require


def joined_at_load(graph: ir.Model, before: ir.Node, name: str, parts: Sequence[ir.Value]) -> ir.Value:
    """Return `parts` [N, ...] one below the other, made in front of node `before` as they are made.

    Args:
        graph: that has them.
        before: a node that none of what is made may come after.
        name: of the initializer that holds them, or what they are made of.
        parts: constants, or what `passes/_expand.py` makes of some.

    Raises:
        Refusal: they are made in another way, or each in its own.
    """
    if all(part.const_value is not None for part in parts):
        return parts[0] if len(parts) == 1 else joined(graph, name, parts, 0)
    nodes = [made_by(part, *_MAKERS) for part in parts]
    require(len({node.op_type for node in nodes}) == 1, f"{name}: the parts are made in different ways")
    made = _MAKERS[nodes[0].op_type](graph, before, name, nodes)
    insert(graph, before, made)
    return made.outputs[0]


def _cast(graph: ir.Model, before: ir.Node, name: str, nodes: Sequence[ir.Node]) -> ir.Node:
    return ir.node("Cast", [_input(graph, before, name, nodes, 0)], nodes[0].attributes)


def _gather(graph: ir.Model, before: ir.Node, name: str, nodes: Sequence[ir.Node]) -> ir.Node:
    table = nodes[0].inputs[0]
    require(all(node.inputs[0] is table for node in nodes), f"{name}: the parts are looked up in different tables")
    return ir.node("Gather", [table, _input(graph, before, name, nodes, 1)], nodes[0].attributes)


def _reshape(graph: ir.Model, before: ir.Node, name: str, nodes: Sequence[ir.Node]) -> ir.Node:
    shapes = {tuple(constant(node.inputs[1])[1:].tolist()) for node in nodes}
    require(len(shapes) == 1, f"{name}: the parts have different blocks")
    shape = np.array([-1, *shapes.pop()])
    rows = new_constant(graph, f"rows.{'.'.join(map(str, shape[1:]))}", shape)
    return ir.node("Reshape", [_input(graph, before, name, nodes, 0), rows])


def _scale(graph: ir.Model, before: ir.Node, name: str, nodes: Sequence[ir.Node]) -> ir.Node:
    """Multiply each part by its own number, then join."""
    products = []
    for number, node in enumerate(nodes):
        product = ir.node("Mul", [_input(graph, before, f"{name}.{number}", [node], 0), node.inputs[1]])
        insert(graph, before, product)
        products.append(product.outputs[0])
    return ir.node("Concat", products, {"axis": 0})


_MAKERS: dict[str, Callable[[ir.Model, ir.Node, str, Sequence[ir.Node]], ir.Node]] = {
    "Cast": _cast,
    "Gather": _gather,
    "Reshape": _reshape,
    "Mul": _scale,
}


def _input(graph: ir.Model, before: ir.Node, name: str, nodes: Sequence[ir.Node], place: int) -> ir.Value:
    """Return that input of all nodes, joined."""
    values = [value for node in nodes if (value := node.inputs[place]) is not None]
    return joined_at_load(graph, before, name, values)
