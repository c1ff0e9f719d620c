"""Fuse RMS normalization, and the residual addition before it, into one node each.

Effect: Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul become SimplifiedLayerNormalization; with the addition that
    feeds it, com.microsoft::SkipSimplifiedLayerNormalization, which also returns the sum.
Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; operators as in onnxruntime's ContribOperators.md.
Changes: nodes.   Keeps: weights, numbers to 1e-5 of range.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class FuseNorm(GraphPass):
    """Fuse RMS normalization, and the residual addition before it, into one node each."""

    begins_at: ClassVar[tuple[str, ...]] = ("Pow",)

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one normalization."""
        import onnx_ir as ir

        from passes._graph import MICROSOFT
        from passes._match import Refusal, constant, insert, made_by, other, require, used_by

        x = node.inputs[0]
        assert x is not None
        require(float(constant(node.inputs[1])) == 2, "the exponent is not 2")
        mean = used_by(node.outputs[0], "ReduceMean")
        require(constant(mean.inputs[1]).tolist() == [-1], "the mean is not over the last axis")
        shifted = used_by(mean.outputs[0], "Add")
        epsilon = float(constant(other(shifted, mean.outputs[0])))
        inverse = used_by(used_by(shifted.outputs[0], "Sqrt").outputs[0], "Reciprocal")
        scaled = used_by(inverse.outputs[0], "Mul")
        require(other(scaled, inverse.outputs[0]) is x, "what is scaled is not what was squared")
        last = used_by(scaled.outputs[0], "Mul")
        weight = other(last, scaled.outputs[0])
        require(len(scaled.outputs[0].uses()) == 1, "the unweighted value is used elsewhere")
        require(weight.const_value is not None and len(weight.const_value.shape) == 1, "the weight is no vector")
        try:
            addition = made_by(x, "Add")
            terms = _residual_terms(addition)
        except Refusal:
            fused = ir.node(
                "SimplifiedLayerNormalization",
                [x, weight],
                {"axis": -1, "epsilon": epsilon, "stash_type": 1},
                num_outputs=1,
            )
            insert(graph, last, fused)
        else:
            fused = ir.node(
                "SkipSimplifiedLayerNormalization",
                [*terms, weight],
                {"epsilon": epsilon},
                domain=MICROSOFT,
                num_outputs=4,
            )
            insert(graph, addition, fused)
            x.replace_all_uses_with(fused.outputs[3])
        last.outputs[0].replace_all_uses_with(fused.outputs[0])
        return ""


def _residual_terms(addition: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return the two terms of a residual addition, or refuse: neither may be a constant such as a bias."""
    from passes._match import Refusal

    first, second = addition.inputs
    if first is None or second is None or first.const_value is not None or second.const_value is not None:
        raise Refusal("the addition is no residual")
    return first, second
