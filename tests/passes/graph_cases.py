"""What the tests of graph rewrites share: the text of a refusal, and the room that weights take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from tiny_models import Workshop

from passes._graph import DATA, load_graph, save_graph
from passes.base import GraphPass, Model, PassError

SMALL = 256
"""Bytes by which stored weights may differ: constants of shapes and axes, and padding to multiples of 64."""


def refusal(workshop: Workshop, step: GraphPass, model: Model, folder: Path) -> str:
    """Return why a pass refuses a model; it must not have written anything."""
    with pytest.raises(PassError) as raised:
        step.run(model, workshop.context(folder, model))
    assert list(folder.iterdir()) == []
    return str(raised.value)


def stored_bytes(model: Model) -> int:
    """Return the size of the data file and of the constants inside the graph, which are those below a kilobyte."""
    constants = [value.const_value for value in load_graph(model.folder).graph.initializers.values()]
    inline = sum(tensor.nbytes for tensor in constants if tensor is not None and tensor.nbytes < 1024)
    return inline + (model.folder / DATA).stat().st_size


def edited(model: Model, folder: Path, change: Callable[[ir.Model], None]) -> Model:
    """Return a model at stage onnx whose graph is another's, changed."""
    graph = load_graph(model.folder)
    change(graph)
    target = folder / "edited"
    target.mkdir()
    save_graph(graph, target)
    return replace(model, folder=target)


def nodes(graph: ir.Model, kind: str) -> list[ir.Node]:
    """Return the nodes of an op type, in order."""
    return [node for node in graph.graph if node.op_type == kind]


def constant(graph: ir.Model, name: str, tensor: ir.Tensor) -> ir.Value:
    """Return a new constant of a graph."""
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
    graph.graph.initializers[name] = value
    return value


def show_as_output(graph: ir.Model, value: ir.Value) -> None:
    """Make a value an output of the graph too."""
    graph.graph.outputs.append(value)


def checked(workshop: Workshop, step: GraphPass, model: Model, folder: Path) -> Model:
    """Run a pass on a model, and its own check of the numbers; return what it made."""
    (folder / "out").mkdir()
    result = step.run(model, workshop.context(folder / "out", model)).model
    step.ensures(model, result, workshop.context(folder, model))
    return result
