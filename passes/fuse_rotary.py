"""Fuse the rotary embedding of encoders into one operator.

Effect: the nodes that rotate queries or keys become com.microsoft::RotaryEmbedding over [B, T, heads * E], with a table
    of cosines and sines. In decoders `fuse_gqa` does more: there the attention operator rotates by itself.
Source: Su et al. 2021, arXiv:2104.09864, equation 34, in the half-split form that Llama uses; onnxruntime's
    ContribOperators.md, RotaryEmbedding.
Changes: nodes; two tables of [context, E/2] float32 are added per set of angles: a longer input is refused at run time.
Keeps: weights, numbers to 1e-5 of range.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class FuseRotary(GraphPass):
    """Fuse the rotary embedding of encoders into one operator."""

    begins_at: ClassVar[tuple[str, ...]] = ("Neg",)

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one rotation."""
        import numpy as np
        import onnx_ir as ir

        from passes._graph import MICROSOFT
        from passes._heads import heads_of
        from passes._kind import position_limit
        from passes._match import axes, insert, new_constant, only_user, require, same, substitute
        from passes._rotation import match_rotation

        crossed = only_user(only_user(node.outputs[0], "Concat").outputs[0], "Mul")
        addition = only_user(crossed.outputs[0], "Add")
        rotation = match_rotation(addition.outputs[0])
        heads = heads_of(rotation.unrotated, (0, 2, 1, 3))
        turned = 2 * rotation.frequencies.size
        require(turned == heads.width, f"{turned} of {heads.width} features are rotated")
        _, tokens, _, _ = axes(heads.split, 4)
        rows, positions, _ = axes(rotation.angles, 3)
        require(rows == 1 and same(positions, tokens), f"{positions} angles turn {tokens} tokens")
        _require_counted(rotation.positions)
        tables = rotation.tables(graph, position_limit(model.config)[0])
        start = new_constant(graph, "rotary.start", np.zeros(1, np.int64))
        inputs = [heads.flat(graph, addition), start, *tables]
        rotate = ir.node("RotaryEmbedding", inputs, {"num_heads": heads.heads}, domain=MICROSOFT)
        shape = new_constant(graph, f"split.{heads.heads}.{heads.width}", np.array([0, 0, heads.heads, heads.width]))
        split = ir.node("Reshape", [rotate.outputs[0], shape])
        split.outputs[0].shape, split.outputs[0].type = heads.split.shape, heads.split.type
        exchange = ir.node("Transpose", [split.outputs[0]], {"perm": (0, 2, 1, 3)})
        rotate.outputs[0].shape, rotate.outputs[0].type = inputs[0].shape, heads.split.type
        for new in (rotate, split, exchange):
            insert(graph, addition, new)
        substitute(addition.outputs[0], exchange.outputs[0])
        return ""


def _require_counted(positions: ir.Value) -> None:
    """Refuse positions other than 0, 1, 2, ... in a row of their own."""
    from passes._match import made_by, require, scalar

    node = made_by(positions, "Cast", "Unsqueeze", "Range")
    while node.op_type != "Range":
        node = made_by(node.inputs[0], "Cast", "Unsqueeze", "Range")
    start, step = scalar(node.inputs[0]), scalar(node.inputs[2])
    require((start, step) == (0, 1), f"positions begin at {start:g} and go by {step:g}")
