"""Match and rewrite places of a graph: a place that does not fit says why, and stays as it was."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes._graph import extents, initializer, lazy, load_graph, save_graph, tidy
from passes.base import Context, GraphPass, Model, PassError, PassResult


class Refusal(Exception):
    """A place does not fit; the message is the reason."""


def made_by(value: ir.Value | None, *kinds: str) -> ir.Node:
    """Return the node that makes `value`, or refuse unless it is one of `kinds`."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in kinds:
        name = "a missing input" if value is None else value.name
        raise Refusal(f"{name} comes from {node.op_type if node else 'outside'}, expected {' or '.join(kinds)}")
    return node


def used_by(value: ir.Value, kind: str) -> ir.Node:
    """Return the one node of op type `kind` that uses `value`, or refuse."""
    users = [use.node for use in value.uses() if use.node.op_type == kind]
    if len(users) != 1:
        raise Refusal(f"{value.name} is used by {len(users)} {kind} nodes, expected one")
    return users[0]


def only_user(value: ir.Value, *kinds: str) -> ir.Node:
    """Return the one node that uses `value`, of one of `kinds`; refuse if anything else uses it."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type not in kinds or value.is_graph_output():
        found = [node.op_type for node in users] + ["the graph's output"] * value.is_graph_output()
        raise Refusal(f"{value.name} goes to {', '.join(found) or 'nothing'}, expected {' or '.join(kinds)} alone")
    return users[0]


def operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return the two inputs of a node, or refuse one that has more or fewer."""
    given = [value for value in node.inputs if value is not None]
    if len(given) != 2:
        raise Refusal(f"{node.name} joins {len(given)} values, expected two")
    return given[0], given[1]


def split_constant(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return the operands of a node of two as (computed, constant), or refuse."""
    first, second = operands(node)
    for computed, fixed in ((first, second), (second, first)):
        if computed.const_value is None and fixed.const_value is not None:
            return computed, fixed
    raise Refusal(f"{node.name} does not join a computed value and a constant")


def is_read_elsewhere(value: ir.Value, readers: Collection[ir.Node]) -> bool:
    """Return whether the graph's outputs or any node but `readers` use a value."""
    return value.is_graph_output() or any(use.node not in readers for use in value.uses())


def split_bias(value: ir.Value, readers: Collection[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """Return what a bias [N] is added to, and the bias; refuse where any node but `readers` uses the sum."""
    addition = made_by(value, "Add")
    require(not is_read_elsewhere(value, readers), f"{value.name} is used elsewhere")
    product, bias = split_constant(addition)
    assert bias.const_value is not None
    shape = extents(bias.const_value)
    require(len(shape) == 1, f"{bias.name} of shape {list(shape)} is no vector")
    width = _width(product)
    require(width == shape[0], f"{bias.name} has {shape[0]} numbers, {product.name} is {width} wide")
    return product, bias


def _width(value: ir.Value) -> int | str | None:
    """Return the last extent of a value; shape inference leaves it out behind products with a known weight."""
    if value.shape is not None:
        last = value.shape[-1]
        return last if isinstance(last, int) else last.value
    node = value.producer()
    weight = node.inputs[1] if node is not None and node.op_type == "MatMul" else None
    return None if weight is None or weight.const_value is None else extents(weight.const_value)[-1]


def axes(value: ir.Value | None, rank: int) -> tuple[int | str | None, ...]:
    """Return the extents of a value of that rank, numbers or symbols, or refuse."""
    shape = None if value is None else value.shape
    if value is None or shape is None or len(shape) != rank:
        raise Refusal(f"{value.name if value else 'a missing input'} has the shape {shape}, expected {rank} axes")
    return tuple(axis if isinstance(axis, int) else axis.value for axis in shape)


def same(first: int | str | None, second: int | str | None) -> bool:
    """Return whether two extents are known to be equal."""
    return first is not None and first == second


def constant(value: ir.Value | None) -> NDArray[Any]:
    """Return the numbers of a constant, or refuse."""
    return _tensor(value).numpy()


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    if value is None or value.const_value is None:
        raise Refusal(f"{value.name if value else 'a missing input'} is no constant")
    return value.const_value


def scalar(value: ir.Value | None) -> float:
    """Return the only number of a constant, or refuse."""
    numbers = constant(value)
    if numbers.size != 1:
        raise Refusal(f"{value.name if value else ''} holds {numbers.size} numbers, expected one")
    return float(numbers.item())


def other(node: ir.Node, value: ir.Value | None) -> ir.Value:
    """Return the other operand of a node of two, or refuse if `value` is none of them."""
    first, second = operands(node)
    if first is value:
        return second
    if second is value:
        return first
    raise Refusal(f"{node.name} does not take {value.name if value else 'its input'}")


def require(condition: bool, reason: str) -> None:
    """Refuse with `reason` unless the condition holds."""
    if not condition:
        raise Refusal(reason)


def insert(graph: ir.Model, before: ir.Node, node: ir.Node) -> None:
    """Put a new node in front of another."""
    graph.graph.insert_before(before, node)


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take the place, name and shape of `old` wherever it is used, the graph's outputs included."""
    name, old.name = old.name, f"{old.name}.unfused"
    new.name, new.shape, new.type = name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def new_constant(graph: ir.Model, name: str, value: NDArray[Any]) -> ir.Value:
    """Return the initializer `name`, added with `value` unless the graph has it."""
    if name not in graph.graph.initializers:
        graph.graph.initializers[name] = initializer(ir.Tensor(value, name=name))
    return graph.graph.initializers[name]


def joined(graph: ir.Model, name: str, parts: Sequence[ir.Value | None], axis: int) -> ir.Value:
    """Return a new initializer of `parts` side by side along `axis`, read part by part when the graph is written."""
    tensors = [_tensor(part) for part in parts]
    shapes = [extents(tensor) for tensor in tensors]
    shape = list(shapes[0])
    shape[axis] = sum(each[axis] for each in shapes)

    def read() -> NDArray[Any]:
        return np.concatenate([tensor.numpy() for tensor in tensors], axis)

    value = initializer(lazy(name, tuple(shape), tensors[0].dtype, read))
    graph.graph.initializers[name] = value
    return value


def run_rewrite(step: GraphPass, model: Model, ctx: Context) -> PassResult:
    """Try every site; write the graph, or refuse with the first reason when no site fits."""
    graph = load_graph(model.folder)
    sites = [node for node in graph.graph if node.op_type in step.begins_at]
    nodes = len(list(graph.graph))
    matched, first_refusal, first_remark = 0, "", ""
    for place, node in enumerate(sites):
        try:
            remark = step.rewrite(node, graph, model)
        except Refusal as refusal:
            first_refusal = first_refusal or f"{node.op_type} {place}: {refusal}"
        else:
            matched += 1
            first_remark = first_remark or (remark and f"{node.op_type} {place}: {remark}")
        ctx.progress(place + 1, len(sites), "sites")
    if not matched:
        reason = f"first refusal: {first_refusal}" if sites else f"the graph has no {' or '.join(step.begins_at)}"
        raise PassError(f"{step.name()}: matched 0 of {len(sites)} places; {reason}")
    tidy(graph)
    save_graph(graph, ctx.workdir)
    changes = {"matched": matched, "refused": len(sites) - matched, "nodes_removed": nodes - len(list(graph.graph))}
    return PassResult(replace(model, folder=ctx.workdir), changes, first_refusal or first_remark)
