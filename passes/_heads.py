"""Tensors split into attention heads: [B, heads, T, E], which is [B, T, heads * E] in another layout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from passes._match import Refusal, axes, insert, made_by, new_constant, require, same


class Heads(NamedTuple):
    """A tensor that is split into heads.

    Attributes:
        split: the tensor [B, T, heads, E], before its axes are exchanged.
        heads: number of heads.
        width: features of a head.
    """

    split: ir.Value
    heads: int
    width: int

    def flat(self, graph: ir.Model, before: ir.Node) -> ir.Value:
        """Return the tensor [B, T, heads * E]: what was split, or a view of it put in front of a node."""
        try:
            return self._unsplit()
        except Refusal:
            features = self.heads * self.width
            shape = new_constant(graph, f"joined.{features}", np.array([0, 0, features]))
            join = ir.node("Reshape", [self.split, shape])
            batch, tokens, _, _ = axes(self.split, 4)
            join.outputs[0].shape = ir.Shape([batch, tokens, features])
            join.outputs[0].type = self.split.type
            insert(graph, before, join)
            return join.outputs[0]

    def _unsplit(self) -> ir.Value:
        flat = made_by(self.split, "Reshape").inputs[0]
        batch, tokens, features = axes(flat, 3)
        outer, inner, _, _ = axes(self.split, 4)
        fits = same(batch, outer) and same(tokens, inner) and features == self.heads * self.width
        require(fits, f"{self.split.name} of shape {self.split.shape} is split otherwise")
        assert flat is not None
        return flat


def heads_of(value: ir.Value | None, order: tuple[int, ...]) -> Heads:
    """Match the transpose by `order` that ends in a tensor split into heads, or refuse."""
    transpose = made_by(value, "Transpose")
    got = tuple(transpose.attributes.get_ints("perm", ()))
    require(got == order, f"{value.name if value else ''} is transposed by {got}, expected {order}")
    split = transpose.inputs[0]
    _, _, heads, width = axes(split, 4)
    assert split is not None
    if not isinstance(heads, int) or not isinstance(width, int):
        raise Refusal(f"{split.name} has the shape {split.shape}, heads and their width are not known")
    return Heads(split, heads, width)
