"""Fuse normalization, and the residual addition before it, into one node each.

Effect: Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul become SimplifiedLayerNormalization; with the addition that
    feeds it, com.microsoft::SkipSimplifiedLayerNormalization, which also returns the sum. LayerNormalization and the
    addition that feeds it become com.microsoft::SkipLayerNormalization, with the bias of the linear layer before it.
Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; Ba et al. 2016, arXiv:1607.06450, equation 4;
    onnxruntime's ContribOperators.md.
Changes: nodes.   Keeps: weights, numbers to 1e-5 of range.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class FuseNorm(GraphPass):
    """Fuse normalization, and the residual addition before it, into one node each."""

    begins_at: ClassVar[tuple[str, ...]] = ("Pow", "LayerNormalization")

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one normalization."""
        if node.op_type == "Pow":
            _fuse_rms(node, graph)
        else:
            _fuse_layer_norm(node, graph)
        return ""


def _fuse_rms(node: ir.Node, graph: ir.Model) -> None:
    """Replace the RMS normalization whose square is `node`."""
    import onnx_ir as ir

    from passes._match import Refusal, constant, insert, made_by, other, require, scalar, substitute, used_by

    x = node.inputs[0]
    assert x is not None
    require(scalar(node.inputs[1]) == 2, "the exponent is not 2")
    mean = used_by(node.outputs[0], "ReduceMean")
    require(constant(mean.inputs[1]).tolist() == [-1], "the mean is not over the last axis")
    shifted = used_by(mean.outputs[0], "Add")
    epsilon = scalar(other(shifted, mean.outputs[0]))
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
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        fused = ir.node("SimplifiedLayerNormalization", [x, weight], attributes)
        insert(graph, last, fused)
        substitute(last.outputs[0], fused.outputs[0])
    else:
        kind = "SkipSimplifiedLayerNormalization"
        _put_skip_norm(graph, kind, [*terms, weight], epsilon, addition, (node, scaled), last.outputs[0])


def _fuse_layer_norm(node: ir.Node, graph: ir.Model) -> None:
    """Replace a layer normalization and the residual addition before it."""
    from passes._match import Refusal, axes, made_by, require, split_bias

    x = node.inputs[0]
    addition = made_by(x, "Add")
    first, second = _residual_terms(addition)
    shape = axes(x, 3)
    require(node.attributes.get_int("axis", -1) in (-1, 2), "the normalization is not over the last axis")
    require(not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]), "its mean is used")
    for term in (first, second):
        require(axes(term, 3) == shape, f"{term.name} of shape {term.shape} is stretched to {x.shape if x else ''}")
    bias = None
    for term in (first, second):
        try:
            product, bias = split_bias(term, (addition,))
        except Refusal:
            continue
        first, second = product, second if term is first else first
        break
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    inputs = [first, second, node.inputs[1], shift, bias]
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    _put_skip_norm(graph, "SkipLayerNormalization", inputs, epsilon, addition, (node,), node.outputs[0])


def _put_skip_norm(
    graph: ir.Model,
    kind: str,
    inputs: Sequence[ir.Value | None],
    epsilon: float,
    addition: ir.Node,
    readers: tuple[ir.Node, ...],
    normed: ir.Value,
) -> None:
    """Put one node in the place of an addition and its normalization, whose nodes `readers` read the sum."""
    import onnx_ir as ir

    from passes._graph import MICROSOFT
    from passes._match import insert, is_read_elsewhere, substitute

    total = addition.outputs[0]
    is_read = is_read_elsewhere(total, readers)
    fused = ir.node(kind, inputs, {"epsilon": epsilon}, domain=MICROSOFT, num_outputs=4 if is_read else 1)
    insert(graph, addition, fused)
    if is_read:
        substitute(total, fused.outputs[3])
    substitute(normed, fused.outputs[0])


def _residual_terms(addition: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return the two terms of a residual addition, or refuse: neither may be a constant such as a bias."""
    from passes._match import operands, require

    first, second = operands(addition)
    require(first.const_value is None and second.const_value is None, "the addition is no residual")
    return first, second
