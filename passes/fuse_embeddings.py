"""Fuse the sum of embeddings and its layer norm into one operator.

Effect: the look-ups of words, positions and, where there are, token types, their additions and LayerNormalization
    become com.microsoft::EmbedLayerNormalization.
Source: Devlin et al. 2018, arXiv:1810.04805, figure 2; onnxruntime's ContribOperators.md, EmbedLayerNormalization.
Changes: nodes.   Keeps: tables, numbers to 1e-5 of range.
Cost: one read and write of the graph's data. On CPU the operator is slower than what it replaces (docs/log.md,
    2026-11-24): the pass is for runtimes that look for it, and in no default chain. It goes before
    `fuse_norm`, which may take the same addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class FuseEmbeddings(GraphPass):
    """Fuse the sum of embeddings and its layer norm into one operator."""

    begins_at: ClassVar[tuple[str, ...]] = ("LayerNormalization",)

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one sum of embeddings."""
        import onnx_ir as ir

        from passes._graph import MICROSOFT
        from passes._match import insert, is_read_elsewhere, require, substitute

        require(node.attributes.get_int("axis", -1) in (-1, 2), "the normalization is not over the last axis")
        require(not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]), "its mean is used")
        require(len(node.inputs) == 3, "the normalization has no bias")
        total = node.inputs[0]
        assert total is not None
        require(not is_read_elsewhere(total, (node,)), f"{total.name} is used elsewhere")
        words, types, positions = _roles(_lookups(total), total)
        ids, type_ids, position_ids = (_as_int32(graph, x, node) for x in (words, types, positions))
        tables = (None if lookup is None else lookup.inputs[0] for lookup in (words, positions, types))
        fused = ir.node(
            "EmbedLayerNormalization",
            [ids, type_ids, *tables, *node.inputs[1:], None, position_ids],
            {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
            domain=MICROSOFT,
            num_outputs=2,  # the second, a summary of a mask, is not optional
        )
        insert(graph, node, fused)
        substitute(node.outputs[0], fused.outputs[0])
        return ""


def _lookups(value: ir.Value) -> list[ir.Node]:
    """Return the look-ups whose sum ends in `value`, in the order they are added."""
    from passes._match import made_by, require

    node = made_by(value, "Add", "Gather")
    if node.op_type == "Add":
        return [lookup for term in node.inputs if term is not None for lookup in _lookups(term)]
    table = node.inputs[0]
    require(node.attributes.get_int("axis", 0) == 0, f"{value.name} is not looked up by row")
    require(table is not None and table.const_value is not None, f"{value.name} is looked up in no constant")
    require(table is not None and len(table.shape or ()) == 2, f"{value.name} is looked up in no matrix")
    return [node]


def _roles(lookups: list[ir.Node], total: ir.Value) -> tuple[ir.Node, ir.Node | None, ir.Node]:
    """Return which look-up goes where: one row of indices for all sequences is possible for positions alone."""
    from passes._match import axes, require

    require(len(lookups) in (2, 3), f"{len(lookups)} look-ups are added, expected two or three")
    shape = axes(total, 3)
    own = [lookup for lookup in lookups if axes(lookup.outputs[0], 3) == shape]
    shared = [lookup for lookup in lookups if axes(lookup.outputs[0], 3)[0] == 1]
    fits = len(shared) <= 1 and len(shared) + len(own) == len(lookups)
    require(fits, f"look-ups of shapes {[lookup.outputs[0].shape for lookup in lookups]} make {total.shape}")
    require(all(axes(lookup.inputs[1], 2)[1] != 1 for lookup in shared), "one position stands for all tokens")
    words, *types, positions = own + shared
    return words, types[0] if types else None, positions


def _as_int32(graph: ir.Model, lookup: ir.Node | None, before: ir.Node) -> ir.Value | None:
    """Return a look-up's indices as the operator reads them."""
    import onnx_ir as ir

    from passes._match import insert

    if lookup is None:
        return None
    cast = ir.node("Cast", [lookup.inputs[1]], {"to": ir.DataType.INT32})
    insert(graph, before, cast)
    return cast.outputs[0]
