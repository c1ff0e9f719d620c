"""Fold the rotary embedding into GroupQueryAttention, and query, key and value into one matrix product.

Effect: the nodes that rotate queries and keys go; the operator rotates from a table of cosines and sines. The three
    projections become one, unless they are in different formats.
Source: Su et al. 2021, arXiv:2104.09864, equation 34, in the half-split form that Llama uses; onnxruntime's
    ContribOperators.md, GroupQueryAttention.
Changes: nodes; q, k, v weights are joined; two tables of [context, E/2] float32 are added.   Keeps: numbers to 1e-5.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class FuseGqa(GraphPass):
    """Fold the rotary embedding into GroupQueryAttention, and query, key and value into one matrix product."""

    begins_at: ClassVar[tuple[str, ...]] = ("GroupQueryAttention",)

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one attention node."""
        import numpy as np
        import onnx_ir as ir

        from passes._match import Refusal, new_constant, require
        from passes._pack import pack_linears

        require(node.attributes.get_int("do_rotary", 0) == 0, "the rotary embedding is inside already")
        query, key = _rotation(node.inputs[0]), _rotation(node.inputs[1])
        same = np.array_equal(query.frequencies, key.frequencies) and query.scale == key.scale
        require(same, "query and key turn by different angles")
        width = int(node.inputs[3].shape[3])  # type: ignore[union-attr,index,arg-type]
        require(2 * query.frequencies.size == width, f"{2 * query.frequencies.size} of {width} features are rotated")
        cosines, sines = _tables(query, int(model.config["max_position_embeddings"]))
        layer = str(node.inputs[3].name).split(".")[1]  # type: ignore[union-attr]
        for rotation in (query, key):
            rotation.layout.replace_input_with(0, rotation.unrotated)
        projections, remark = list(node.inputs[:3]), ""
        try:
            linears = [_linear(value) for value in projections]
            projections = [pack_linears(graph, linears, f"layers.{layer}.qkv"), None, None]
        except Refusal as refusal:
            remark = f"not packed: {refusal}"
        turns = f"rotary.{zlib.crc32(cosines.tobytes()):08x}"  # layers that turn alike share their tables
        tables = [new_constant(graph, f"{turns}.cosines", cosines), new_constant(graph, f"{turns}.sines", sines)]
        attributes = [*node.attributes.values(), ir.AttrInt64("do_rotary", 1)]
        fused = ir.Node(
            node.domain, node.op_type, [*projections, *node.inputs[3:7], *tables], attributes, num_outputs=3
        )
        graph.graph.insert_before(node, fused)
        for old, new in zip(node.outputs, fused.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.graph.remove(node, safe=True)
        _skip_reshapes(fused)
        return remark


class _Rotation(NamedTuple):
    """One rotated tensor: where the rotation ends, what goes in, and by which angles per position it turns."""

    layout: ir.Node
    unrotated: ir.Value
    frequencies: np.ndarray
    scale: float


def _rotation(flat: ir.Value | None) -> _Rotation:
    """Match x * cos + [-x2, x1] * sin above the layout change that ends in `flat` [B, T, heads * E]."""
    from passes._match import Refusal, made_by

    layout = made_by(made_by(flat, "Reshape").inputs[0], "Transpose")
    addition = made_by(layout.inputs[0], "Add")
    for straight, crossed in (addition.inputs, reversed(addition.inputs)):
        try:
            return _match_rotation(layout, made_by(straight, "Mul"), made_by(crossed, "Mul"))
        except Refusal as refusal:
            reason = refusal
    raise reason


def _match_rotation(layout: ir.Node, straight: ir.Node, crossed: ir.Node) -> _Rotation:
    from passes._match import Refusal, constant, made_by, other, require

    makers = {value: value.producer() for value in crossed.inputs if value is not None}
    half_turned = next((value for value, node in makers.items() if node and node.op_type == "Concat"), None)
    if half_turned is None:
        raise Refusal("no half of the features is turned")
    negated, kept = made_by(half_turned, "Concat").inputs
    upper, lower = made_by(made_by(negated, "Neg").inputs[0], "Slice"), made_by(kept, "Slice")
    x = upper.inputs[0]
    require(x is not None and lower.inputs[0] is x, "the two halves are of different tensors")
    require(int(constant(lower.inputs[1]).item()) == 0, "the first half does not begin at 0")
    cosine, cosine_scale = _angles(other(straight, x), "Cos")
    sine, sine_scale = _angles(other(crossed, half_turned), "Sin")
    require(cosine is sine and cosine_scale == sine_scale, "cosine and sine are of different angles")
    first, second = made_by(cosine, "Concat").inputs
    require(first is second, "the two halves turn by different angles")
    product = made_by(first, "Mul")
    frequencies = next((v for v in product.inputs if v is not None and v.const_value is not None), None)
    assert x is not None
    return _Rotation(layout, x, constant(frequencies).reshape(-1), cosine_scale)


def _angles(value: ir.Value, function: str) -> tuple[ir.Value, float]:
    """Return the angles behind a cosine or sine, and the constant it is multiplied by."""
    from passes._match import constant, made_by

    node, scale = made_by(value, "Unsqueeze", "Mul", function), 1.0
    while node.op_type != function:
        if node.op_type == "Mul":
            number = next(v for v in node.inputs if v is not None and v.const_value is not None)
            scale *= float(constant(number))
            node = made_by(next(v for v in node.inputs if v is not number), "Unsqueeze", "Mul", function)
        else:
            node = made_by(node.inputs[0], "Unsqueeze", "Mul", function)
    angles = node.inputs[0]
    assert angles is not None
    return angles, scale


def _linear(value: ir.Value | None) -> ir.Value:
    """Return the linear layer's output behind the layout changes that end in `value`."""
    from passes._match import made_by

    node = made_by(value, "Reshape")
    while True:
        value = node.inputs[0]
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type not in ("Reshape", "Transpose"):
            assert value is not None
            return value
        node = producer


def _skip_reshapes(attention: ir.Node) -> None:
    """Use the operator's output [B, T, H * E] directly where it is split into heads and joined again."""
    split = [use.node for use in attention.outputs[0].uses()]
    if len(split) != 1 or split[0].op_type != "Reshape":
        return
    joined = [use.node for use in split[0].outputs[0].uses()]
    if len(joined) == 1 and joined[0].op_type == "Reshape" and len(joined[0].outputs[0].shape or ()) == 3:
        joined[0].outputs[0].replace_all_uses_with(attention.outputs[0])


def _tables(rotation: _Rotation, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines float32 [context, E/2] of every position's angles."""
    import numpy as np

    angles = np.arange(context, dtype=np.float32)[:, None] * rotation.frequencies[None]
    return np.cos(angles) * np.float32(rotation.scale), np.sin(angles) * np.float32(rotation.scale)
