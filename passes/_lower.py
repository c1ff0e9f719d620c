"""From a traced graph to the artifact's graph: shared tensors once, weights in the layout the kernels read."""

from __future__ import annotations

import onnx_ir as ir

from passes._graph import extents, initializer, lazy, share_bytes, tidy
from passes._kind import kind_of
from passes._skeleton import Skeleton
from passes._trace import trace_decoder, trace_encoder


def lower(skeleton: Skeleton, route: str = "fused", takes_batches: bool = True) -> ir.Model:
    """Return the artifact's graph of a torch-stage model, its weights still on disk.

    Args:
        skeleton: the model.
        route: by which a decoder's attention is traced, one of `_attention.ROUTES`.
        takes_batches: of a decoder; else its inputs are declared to have one row.
    """
    if kind_of(skeleton.config) == "decoder":
        model = trace_decoder(skeleton, route, takes_batches)
    else:
        model = trace_encoder(skeleton)
    tidy(model)
    _merge_tied(model, skeleton)
    _flatten_tables(model)
    transpose_weights(model)
    return model


def _merge_tied(model: ir.Model, skeleton: Skeleton) -> None:
    """Let every name of a tied tensor be one initializer."""
    initializers = model.graph.initializers
    for name in list(initializers):
        owner = skeleton.aliases(name)[0]
        if owner != name and owner in initializers:
            initializers[name].replace_all_uses_with(initializers[owner])
            del initializers[name]


def _flatten_tables(model: ir.Model) -> None:
    """Give GatherBlockQuantized its table as [V, bytes]: what a tied MatMulNBits reads as [V, blocks, bytes]."""
    for node in list(model.graph):
        if node.op_type != "GatherBlockQuantized":
            continue
        table = node.inputs[0]
        assert table is not None and table.name is not None and table.const_value is not None
        rows, blocks, width = extents(table.const_value)
        name = f"{table.name}.rows"
        view = share_bytes(model, name, table.name, (rows, blocks * width))
        node.replace_input_with(0, view)
        if not table.uses() and view.const_value is not None:
            view.const_value.metadata_props.clear()
            del model.graph.initializers[table.name]


def transpose_weights(model: ir.Model) -> None:
    """Store what the graph would transpose at every load the way it is used."""
    initializers = model.graph.initializers
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or source is None or source.name not in initializers:
            continue
        if len(source.uses()) > 1:
            continue  # a tied table: stored once, transposed at load
        tensor, order = source.const_value, tuple(node.attributes.get_ints("perm"))
        assert tensor is not None and source.name is not None
        name = f"{source.name}.transposed"
        initializers[name] = initializer(_transposed(name, tensor, order))
        node.outputs[0].replace_all_uses_with(initializers[name])
        model.graph.remove(node, safe=True)
        del initializers[source.name]


def _transposed(name: str, tensor: ir.TensorProtocol, order: tuple[int, ...]) -> ir.TensorProtocol:
    shape = tuple(extents(tensor)[axis] for axis in order)
    return lazy(name, shape, tensor.dtype, lambda: tensor.numpy().transpose(order))
