"""The onnx stage on disk: `model.onnx`, and `model.onnx.data` with the tensors of a kilobyte and more.

Tensors are read when they are looked at and never kept: a pass over a graph needs the memory of its largest tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes._files import atomic_file, atomic_write
from passes._safetensors import LARGEST_IN_OUTLINE

GRAPH, DATA = "model.onnx", "model.onnx.data"
PREFILL = "prefill.onnx"
"""The graph of prompts where they have one of their own, over the same tensors; the runtime takes it if it is there."""
_INLINE_BYTES = 1024
_SHARED = "shares_bytes_with"
_ALIGNMENT = 64
_IN_OUTLINE = ContextVar("in_outline", default=False)
MICROSOFT = "com.microsoft"


def lazy(
    name: str, shape: tuple[int, ...], dtype: ir.DataType, read: Callable[[], NDArray[np.generic]]
) -> ir.LazyTensor:
    """Return a tensor that calls `read` each time it is looked at."""
    return ir.LazyTensor(lambda: ir.Tensor(read(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)


def load_graph(folder: Path) -> ir.Model:
    """Read the graph of an onnx stage; its tensors stay on disk."""
    model = ir.load(folder / GRAPH)
    places: dict[int, str] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = lazy(name, extents(tensor), tensor.dtype, _external_reader(folder, tensor))
            original = places.setdefault(tensor.offset or 0, name)
            if original != name:
                value.const_value.metadata_props[_SHARED] = original
    return model


def save_graph(model: ir.Model, folder: Path) -> None:
    """Write the graph and its tensors; the same graph gives the same bytes.

    Tensors that `share_bytes` joined are written once, under whichever name comes first.
    """
    written: dict[str, tuple[int, int]] = {}
    external: dict[str, ir.ExternalTensor] = {}
    with atomic_file(folder / DATA) as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None, name
            if tensor.nbytes < _INLINE_BYTES:
                continue
            key = tensor.metadata_props.get(_SHARED, name)
            if key not in written:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                written[key] = (file.tell(), _write_tensor(file, tensor))
            offset, length = written[key]
            external[name] = ir.ExternalTensor(
                DATA, offset, length, tensor.dtype, shape=ir.Shape(extents(tensor)), name=name, base_dir=folder
            )
    inline = {name: value.const_value for name, value in model.graph.initializers.items()}
    try:
        for name, reference in external.items():
            model.graph.initializers[name].const_value = reference
        atomic_write(folder / GRAPH, ir.to_proto(model).SerializeToString(deterministic=True))
    finally:
        for name, tensor in inline.items():
            model.graph.initializers[name].const_value = tensor


@contextmanager
def in_outline() -> Iterator[None]:
    """Let `save_graph` leave holes, which read as zeros and take no room, in the place of all but small tensors."""
    token = _IN_OUTLINE.set(True)
    try:
        yield
    finally:
        _IN_OUTLINE.reset(token)


def _write_tensor(file: BinaryIO, tensor: ir.TensorProtocol) -> int:
    if _IN_OUTLINE.get() and tensor.nbytes > LARGEST_IN_OUTLINE:
        file.truncate(file.seek(tensor.nbytes, os.SEEK_CUR))
        return tensor.nbytes
    return file.write(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data)


def weight_bytes(folder: Path) -> int:
    """Return the size of an onnx stage on disk."""
    return sum((folder / name).stat().st_size for name in graph_files(folder))


def graph_files(folder: Path) -> list[str]:
    """Return the names of the files of an onnx stage."""
    return [name for name in (GRAPH, DATA, PREFILL) if (folder / name).exists()]


def share_bytes(model: ir.Model, name: str, original: str, shape: tuple[int, ...]) -> ir.Value:
    """Return an initializer that is `original` with another shape, both over one piece of the data file."""
    initializers = model.graph.initializers
    if name not in initializers:
        tensor = initializers[original].const_value
        assert tensor is not None
        view = lazy(name, shape, tensor.dtype, lambda: tensor.numpy().reshape(shape))
        view.metadata_props[_SHARED] = original
        initializers[name] = initializer(view)
    return initializers[name]


def initializer(tensor: ir.TensorProtocol) -> ir.Value:
    """Return the graph value of a constant tensor."""
    return ir.Value(
        name=tensor.name, shape=ir.Shape(extents(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def tidy(model: ir.Model) -> None:
    """Fold small constants, drop what nothing uses and every trace of where the graph was made; in place."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
    from onnxscript import optimizer

    RemoveUnusedNodesPass()(model)  # first: the optimizer leaves alone what a node without use still reads
    optimizer.optimize_ir(
        model,
        onnx_shape_inference=False,
        input_size_limit=1024,
        output_size_limit=1024,
        should_fold=lambda node: False if _is_left(node) else None,
    )
    RemoveUnusedOpsetsPass()(model)
    model.opset_imports.setdefault(MICROSOFT, 1)
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "optimize", None, None
    model.graph.metadata_props.clear()
    model.graph.name = "model"
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _is_left(node: ir.Node) -> bool:
    """Return whether a node is not to be folded: it would be, of any size and in memory, or become larger on disk."""
    source = node.inputs[0] if node.inputs else None
    expands = node.op_type == "Cast" and source is not None and source.dtype == ir.DataType.UINT8
    return expands or node.op_type == "Transpose"


def extents(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return a tensor's shape as integers."""
    return tuple(tensor.shape.numpy())


def _external_reader(folder: Path, tensor: ir.ExternalTensor) -> Callable[[], NDArray[np.generic]]:
    path, offset, length = folder / os.fspath(tensor.location), tensor.offset or 0, tensor.length
    dtype, shape = tensor.dtype.numpy(), extents(tensor)

    def read() -> NDArray[np.generic]:
        with path.open("rb") as file:
            file.seek(offset)
            return np.frombuffer(file.read(length or -1), dtype).reshape(shape)

    return read
