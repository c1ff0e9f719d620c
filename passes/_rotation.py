"""Match the rotary embedding as transformers writes it out: x * cos + [-x2, x1] * sin."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes._match import constant, made_by, new_constant, operands, other, require, scalar, split_constant


class Rotation(NamedTuple):
    """One rotated tensor: what goes in, and by which angles per position it turns.

    Attributes:
        unrotated: what goes in [B, heads, T, E].
        frequencies: angle per position, float32 [E/2].
        scale: what cosine and sine are multiplied by.
        positions: what the frequencies are multiplied by, one axis longer than the positions.
        angles: the angles of both halves [B or 1, T, E].
    """

    unrotated: ir.Value
    frequencies: NDArray[np.float32]
    scale: float
    positions: ir.Value
    angles: ir.Value

    def tables(self, graph: ir.Model, context: int) -> list[ir.Value]:
        """Return cosines and sines [context, E/2] of every position; layers that turn alike share them."""
        angles = np.arange(context, dtype=np.float32)[:, None] * self.frequencies[None]
        cosines, sines = np.cos(angles) * np.float32(self.scale), np.sin(angles) * np.float32(self.scale)
        turns = f"rotary.{zlib.crc32(cosines.tobytes()):08x}"
        return [new_constant(graph, f"{turns}.cosines", cosines), new_constant(graph, f"{turns}.sines", sines)]


def match_rotation(rotated: ir.Value | None) -> Rotation:
    """Match the nodes that end in `rotated` [B, heads, T, E], or refuse."""
    products = [made_by(value, "Mul") for value in operands(made_by(rotated, "Add"))]
    turned = [_half_turned(product) for product in products]
    require(sum(half is not None for half in turned) == 1, "not one of the products holds the half that is turned")
    if turned[0] is not None:
        products, turned = products[::-1], turned[::-1]
    (straight, crossed), half_turned = products, turned[1]
    negated, kept = operands(made_by(half_turned, "Concat"))
    upper, lower = made_by(made_by(negated, "Neg").inputs[0], "Slice"), made_by(kept, "Slice")
    x = upper.inputs[0]
    require(x is not None and lower.inputs[0] is x, "the two halves are of different tensors")
    at, begin, end = (int(scalar(value)) for value in (upper.inputs[1], *lower.inputs[1:3]))
    require((begin, end) == (0, at), f"the first half is {begin} to {end}, the second begins at {at}")
    cosine, cosine_scale = _angles(other(straight, x), "Cos")
    sine, sine_scale = _angles(other(crossed, half_turned), "Sin")
    require(cosine is sine and cosine_scale == sine_scale, "cosine and sine are of different angles")
    first, second = operands(made_by(cosine, "Concat"))
    require(first is second, "the two halves turn by different angles")
    positions, frequencies = split_constant(made_by(first, "Mul"))
    numbers = constant(frequencies).reshape(-1)
    require(numbers.size == at, f"{numbers.size} angles turn halves of {at} features")
    assert x is not None
    return Rotation(x, numbers, cosine_scale, positions, cosine)


def _angles(value: ir.Value, function: str) -> tuple[ir.Value, float]:
    """Return the angles behind a cosine or sine, and the constant it is multiplied by."""
    node, scale = made_by(value, "Unsqueeze", "Mul", function), 1.0
    while node.op_type != function:
        if node.op_type == "Mul":
            scaled, factor = split_constant(node)
            scale *= scalar(factor)
            node = made_by(scaled, "Unsqueeze", "Mul", function)
        else:
            node = made_by(node.inputs[0], "Unsqueeze", "Mul", function)
    angles = node.inputs[0]
    assert angles is not None
    return angles, scale


def _half_turned(product: ir.Node) -> ir.Value | None:
    """Return the factor that joins two halves, if there is one."""
    makers = {value: value.producer() for value in product.inputs if value is not None}
    return next((value for value, node in makers.items() if node is not None and node.op_type == "Concat"), None)
