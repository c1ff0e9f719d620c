"""Fuse GELU, and the bias added before it, into one node.

Effect: a bias and Gelu become com.microsoft::BiasGelu; Gelu by tanh with a bias, and tanh written out as products and
    sums, become com.microsoft::FastGelu. Each form stays what it was: erf is never replaced by tanh.
Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2; operators as in onnxruntime's ContribOperators.md.
Changes: nodes.   Keeps: weights, the form of the function, numbers to 1e-5 of range.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir

_SLOPE = 0.7978845608028654
"""sqrt(2 / pi)"""
_CUBIC = 0.044715


@dataclass(frozen=True, kw_only=True)
class FuseGelu(GraphPass):
    """Fuse GELU, and the bias added before it, into one node."""

    begins_at: ClassVar[tuple[str, ...]] = ("Gelu", "Tanh")

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one activation."""
        import onnx_ir as ir

        from passes._graph import MICROSOFT
        from passes._match import Refusal, insert, split_bias, substitute

        site = _operator(node) if node.op_type == "Gelu" else _written_out(node)
        inputs = [site.x]
        try:
            inputs = list(split_bias(site.x, site.readers))
        except Refusal:
            if node.op_type == "Gelu":
                raise
        fused = ir.node("FastGelu" if site.by_tanh else "BiasGelu", inputs, domain=MICROSOFT)
        insert(graph, site.last, fused)
        substitute(site.last.outputs[0], fused.outputs[0])
        return ""


class _Site(NamedTuple):
    """One activation: its input, the nodes that read it, the node that makes its output, and its form."""

    x: ir.Value
    readers: tuple[ir.Node, ...]
    last: ir.Node
    by_tanh: bool


def _operator(node: ir.Node) -> _Site:
    """Match Gelu itself."""
    x = node.inputs[0]
    assert x is not None
    return _Site(x, (node,), node, node.attributes.get_string("approximate", "none") == "tanh")


def _written_out(tanh: ir.Node) -> _Site:
    """Match 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    from passes._match import made_by, only_user, other, require

    total = made_by(_times(tanh.inputs[0], _SLOPE), "Add")
    cubic = next((value for value in total.inputs if value is not None and _is_cubic(value)), None)
    x = other(total, cubic)
    power = made_by(_times(cubic, _CUBIC), "Pow")
    require(power.inputs[0] is x, "what is cubed is not what it is added to")
    shifted = only_user(tanh.outputs[0], "Add")
    _constant_is(other(shifted, tanh.outputs[0]), 1)
    last = only_user(shifted.outputs[0], "Mul")
    half = other(last, shifted.outputs[0])
    require(_times(half, 0.5) is x, "what is halved is not what is cubed")
    return _Site(x, (total, power, made_by(half, "Mul")), last, by_tanh=True)


def _is_cubic(value: ir.Value) -> bool:
    """Return whether a value is 0.044715 times a cube."""
    from passes._match import Refusal, made_by

    try:
        power = made_by(_times(value, _CUBIC), "Pow")
        _constant_is(power.inputs[1], 3)
    except Refusal:
        return False
    return True


def _times(value: ir.Value | None, number: float) -> ir.Value:
    """Return the other factor of a product with this constant."""
    from passes._match import made_by, split_constant

    factor, fixed = split_constant(made_by(value, "Mul"))
    _constant_is(fixed, number)
    return factor


def _constant_is(value: ir.Value | None, number: float) -> None:
    """Refuse a constant other than this number, as float32 rounds it."""
    from math import isclose

    from passes._match import require, scalar

    got = scalar(value)
    require(isclose(got, number, rel_tol=1e-6), f"{value.name if value else ''} is {got:g}, expected {number:g}")
