"""Fold the rotary embedding into GroupQueryAttention, and query, key and value into one matrix product.

Effect: the nodes that rotate queries and keys go; the operator rotates from a table of cosines and sines. The three
    projections become one, unless they are in different formats.
Source: Su et al. 2021, arXiv:2104.09864, equation 34, in the half-split form that Llama uses; onnxruntime's
    ContribOperators.md, GroupQueryAttention.
Changes: nodes; q, k, v weights are joined; two tables of [context, E/2] float32 are added.   Keeps: numbers to 1e-5.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir

ROTARY_MULTIPLE = 16
"""What the width of a head must be a multiple of for onnxruntime 1.31's operator to rotate it."""


@dataclass(frozen=True, kw_only=True)
class FuseGqa(GraphPass):
    """Fold the rotary embedding into GroupQueryAttention, and query, key and value into one matrix product."""

    begins_at: ClassVar[tuple[str, ...]] = ("GroupQueryAttention",)

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one attention node."""
        import numpy as np
        import onnx_ir as ir

        from passes._kind import position_limit
        from passes._match import Refusal, axes, made_by, require
        from passes._pack import pack_linears
        from passes._rotation import match_rotation

        require(node.attributes.get_int("do_rotary", 0) == 0, "the rotary embedding is inside already")
        past = node.inputs[3]
        width = axes(past, 4)[3]
        fits = isinstance(width, int) and width % ROTARY_MULTIPLE == 0
        require(fits, f"heads are {width} wide, the operator rotates multiples of {ROTARY_MULTIPLE}")
        assert past is not None and past.name is not None
        layouts = [made_by(made_by(value, "Reshape").inputs[0], "Transpose") for value in node.inputs[:2]]
        query, key = (match_rotation(layout.inputs[0]) for layout in layouts)
        same = np.array_equal(query.frequencies, key.frequencies) and query.scale == key.scale
        require(same, "query and key turn by different angles")
        require(2 * query.frequencies.size == width, f"{2 * query.frequencies.size} of {width} features are rotated")
        tables = query.tables(graph, position_limit(model.config)[0])
        layer = past.name.split(".")[1]  # of past.LAYER.key
        for layout, rotation in zip(layouts, (query, key), strict=True):
            layout.replace_input_with(0, rotation.unrotated)
        projections, remark = list(node.inputs[:3]), ""
        try:
            linears = [_linear(value) for value in projections]
            projections = [pack_linears(graph, linears, f"layers.{layer}.qkv"), None, None]
        except Refusal as refusal:
            remark = f"not packed: {refusal}"
        attributes = [*node.attributes.values(), ir.AttrInt64("do_rotary", 1)]
        fused = ir.Node(
            node.domain,
            node.op_type,
            [*projections, *node.inputs[3:7], *tables, *node.inputs[9:]],  # sinks, scales of the cache
            attributes,
            num_outputs=3,
        )
        graph.graph.insert_before(node, fused)
        for old, new in zip(node.outputs, fused.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.graph.remove(node, safe=True)
        _skip_reshapes(fused)
        return remark


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
