"""Gather the attention of encoders into one operator that reads and writes [B, T, heads * E].

Effect: the reshapes and transposes that split the heads before the operator and join them after it go; where attention
    is written out as products and a softmax, these become the operator too, with every bias and mask as its mask.
Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; the 3-D form of ONNX Attention, opset 23.
    We differ from onnxruntime's own operators: com.microsoft::MultiHeadAttention was no faster on CPU and takes masks
    of some shapes only; com.microsoft::Attention swallows the projections, which then cannot be quantized.
Changes: nodes.   Keeps: weights, masks of any kind, projections of any kind; numbers to 1e-5 of range.
Cost: one read and write of the graph's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from passes.base import GraphPass, Model

if TYPE_CHECKING:
    import onnx_ir as ir

    from passes._heads import Heads


@dataclass(frozen=True, kw_only=True)
class FuseAttention(GraphPass):
    """Gather the attention of encoders into one operator that reads and writes [B, T, heads * E]."""

    begins_at: ClassVar[tuple[str, ...]] = ("Attention", "Softmax")

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        """Replace one attention."""
        import onnx_ir as ir

        from passes._match import insert, require, same, substitute

        site = _operator(node) if node.op_type == "Attention" else _written_out(node)
        query, key, value = site.tensors
        require(same(query.width, key.width), f"query heads are {query.width} wide, key heads {key.width}")
        require(key.heads == value.heads, f"there are {key.heads} key heads and {value.heads} value heads")
        joined = _joined(site.output, query.heads * value.width)
        mask = _sum(graph, node, site.terms)
        fused = ir.node(
            "Attention",
            [*(tensor.flat(graph, node) for tensor in site.tensors), mask],
            {**site.attributes, "q_num_heads": query.heads, "kv_num_heads": key.heads},
        )
        insert(graph, node, fused)
        substitute(joined, fused.outputs[0])
        return ""


class _Site(NamedTuple):
    """One attention: query, key and value, what is added to the scores, and the result [B, H, T, E]."""

    tensors: tuple[Heads, Heads, Heads]
    terms: tuple[ir.Value, ...]
    attributes: dict[str, ir.Attr | float]
    output: ir.Value


def _operator(node: ir.Node) -> _Site:
    """Match the operator itself, in its 4-D form."""
    from passes._heads import heads_of
    from passes._match import require

    require(node.domain == "", f"{node.domain}::Attention is another operator")
    require("q_num_heads" not in node.attributes, "it reads [B, T, heads * E] already")
    require(not any(node.inputs[4:]), "it has a past")
    require(not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]), "its scores are used")
    query, key, value = (heads_of(x, (0, 2, 1, 3)) for x in node.inputs[:3])
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    return _Site((query, key, value), () if mask is None else (mask,), dict(node.attributes), node.outputs[0])


def _written_out(node: ir.Node) -> _Site:
    """Match Softmax(q k^T * scale + terms) v."""
    from passes._heads import heads_of
    from passes._match import axes, made_by, only_user, require, same

    require(node.attributes.get_int("axis", -1) in (-1, 3), "the softmax is not over the last axis")
    product = only_user(node.outputs[0], "MatMul")
    require(product.inputs[0] is node.outputs[0], "the softmax is no left factor")
    terms, scores = [], made_by(node.inputs[0], *_SCORES)
    while scores.op_type == "Add":
        scores, term = _added(scores)
        terms.append(term)
    scores, scale = _scaled(scores)
    only_user(scores.outputs[0], *_SCORES, "Softmax")
    query, key = heads_of(scores.inputs[0], (0, 2, 1, 3)), heads_of(scores.inputs[1], (0, 2, 3, 1))
    value = heads_of(product.inputs[1], (0, 2, 1, 3))
    require(query.heads == key.heads, f"there are {query.heads} query heads and {key.heads} key heads")
    batch, _, queries, keys = axes(node.outputs[0], 4)
    for term in terms:
        a, b, c, d = axes(term, 4)
        fits = (a == 1 or same(a, batch)) and b in (1, query.heads) and same(c, queries) and same(d, keys)
        require(fits, f"{term.name} of shape {term.shape} is added to scores of shape {node.outputs[0].shape}")
    return _Site((query, key, value), tuple(terms), {"scale": scale}, product.outputs[0])


_SCORES = ("Add", "Mul", "Div", "MatMul")


def _added(addition: ir.Node) -> tuple[ir.Node, ir.Value]:
    """Return the node that makes the scores, and what is added to them."""
    from passes._match import Refusal, operands

    first, second = operands(addition)
    for scores, term in ((first, second), (second, first)):
        maker = scores.producer()
        if maker is not None and _holds_product(maker):
            return maker, term
    raise Refusal(f"{addition.outputs[0].name} adds nothing to a matrix product")


def _holds_product(node: ir.Node) -> bool:
    """Return whether a node is a matrix product, a scaled one, or a sum with one of these."""
    makers = [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    if node.op_type in ("Mul", "Div"):
        return any(maker.op_type == "MatMul" for maker in makers)
    return node.op_type == "MatMul" or (node.op_type == "Add" and any(map(_holds_product, makers)))


def _scaled(node: ir.Node) -> tuple[ir.Node, float]:
    """Return the matrix product behind the scores, and the constant it is multiplied by."""
    from passes._match import made_by, require, scalar, split_constant

    if node.op_type == "MatMul":
        return node, 1.0
    product, fixed = split_constant(node)
    require(node.op_type == "Mul" or fixed is node.inputs[1], "the scores divide a constant")
    scale = scalar(fixed)
    require(scale > 0, f"the scores are scaled by {scale:g}, expected a positive number")
    return made_by(product, "MatMul"), scale if node.op_type == "Mul" else 1 / scale


def _joined(output: ir.Value, width: int) -> ir.Value:
    """Match Reshape(Transpose(y)), which joins the heads of y [B, H, T, E]; a reshape to the same shape may precede."""
    from passes._match import axes, only_user, require, same

    batch, _, tokens, _ = axes(output, 4)
    node = only_user(output, "Transpose", "Reshape")
    while node.op_type == "Reshape":
        require(axes(node.outputs[0], 4) == axes(output, 4), f"{output.name} is reshaped to {node.outputs[0].shape}")
        node = only_user(node.outputs[0], "Transpose", "Reshape")
    require(tuple(node.attributes.get_ints("perm", ())) == (0, 2, 1, 3), f"{output.name} is transposed otherwise")
    joined = only_user(node.outputs[0], "Reshape").outputs[0]
    outer, inner, features = axes(joined, 3)
    fits = same(outer, batch) and same(inner, tokens) and features == width
    require(fits, f"{output.name} of shape {output.shape} is joined to {joined.shape}")
    return joined


def _sum(graph: ir.Model, before: ir.Node, terms: tuple[ir.Value, ...]) -> ir.Value | None:
    """Return the sum of what is added to the scores, made once for all layers that add the same."""
    import onnx_ir as ir

    from passes._match import insert

    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        made = [use.node for use in total.uses() if use.node.op_type == "Add" and term in use.node.inputs]
        addition = made[0] if made else ir.node("Add", [total, term])
        if not made:
            insert(graph, before, addition)
            addition.outputs[0].type = total.type
        total = addition.outputs[0]
    return total
