"""Integer number formats: how a weight matrix becomes packed integers and scales, and what it is worth again.

A format says which numbers exist; how weights are rounded to them is a pass's business (`quantize_*`).
The packed layout is the one ONNX Runtime's `MatMulNBits` reads, so that lowering copies bytes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 23
"""Weights that are in float32 at once: 32 MiB, and a few copies of it, whatever the size of a table."""
EXACT_TERMS = 512
"""Products of an integer up to 255 and one up to 128 that float32 sums exactly: 512 * 255 * 128 < 2^24."""
CHANNEL_BLOCK = 128
"""Block that a per-channel scale is repeated over when lowered: MatMulNBits knows blocks of 16 to 256 only."""


@dataclass(frozen=True)
class IntegerFormat:
    """Unsigned `bits`-bit integers in groups along the input features, one scale (and zero point) per group.

    A value is `(q - zero_point) * scale`; without zero points `zero_point` is the middle of the range.

    Attributes:
        bits: 2, 4 or 8.
        group_size: input features that share a scale, or "channel" for one scale per output feature.
        symmetric: no zero points are stored.
    """

    bits: Literal[2, 4, 8]
    group_size: int | Literal["channel"]
    symmetric: bool = True

    @property
    def middle(self) -> int:
        """Return the zero point of the symmetric form: half the number of values."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """Return the largest stored integer."""
        return (1 << self.bits) - 1

    @property
    def block(self) -> int:
        """Return the number of input features per stored block."""
        return CHANNEL_BLOCK if self.group_size == "channel" else self.group_size

    def blocks(self, features: int) -> int:
        """Return how many blocks hold `features` input features; the last one is padded."""
        return -(-features // self.block)

    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the stored tensors of a `[rows, features]` weight."""
        groups = self.blocks(features)
        stored = {
            "qweight": ((rows, groups, self.block * self.bits // 8), "uint8"),
            "scales": ((rows, groups), "float32"),
        }
        if not self.symmetric:
            stored["zero_points"] = ((rows, -(-groups * self.bits // 8)), "uint8")
        return stored

    def bytes(self, rows: int, features: int) -> int:
        """Return the bytes of the stored form of a `[rows, features]` weight."""
        width = {"uint8": 1, "float32": 4}
        total = 0
        for shape, dtype in self.shapes(rows, features).values():
            size = width[dtype]
            for extent in shape:
                size *= extent
            total += size
        return total


@dataclass(frozen=True)
class ChannelFormat:
    """Signed integers [N, M], not packed, one scale per output feature: what `MatMulIntegerToFloat` reads.

    Signed, not unsigned: onnxruntime multiplies signed weights 2.2 times as fast (docs/log.md, 2026-11-24).
    """

    bits: Literal[8] = 8

    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the stored tensors of a `[rows, features]` weight."""
        return {"qweight": ((rows, features), "int8"), "scales": ((rows,), "float32")}

    def bytes(self, rows: int, features: int) -> int:
        """Return the bytes of the stored form of a `[rows, features]` weight."""
        return rows * (features + 4)


def round_channels(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize `weight` [N, M] to a `ChannelFormat`: the largest magnitude of each output feature maps to 127.

    Returns:
        `qweight` int8 [N, M] and `scales` float32 [N].
    """
    import torch

    parts = []
    for rows in row_chunks(*weight.shape):
        values = weight[rows].float()
        scales = values.abs().amax(1) / 127
        scales = torch.where(scales == 0, 1.0, scales)  # a feature of zeros: any scale serves
        parts.append({"qweight": (values / scales[:, None]).round().to(torch.int8), "scales": scales})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def quantize_affine(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Return the uint8 integers that `QuantizeLinear` makes of `x`, as float32."""
    return ((x / scale).round() + zero_point).clamp(0, 255)


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., M] times `weight` [N, M] as float32 [..., N], rounded once, as an int32 sum would be.

    `x` holds integers up to 255 in magnitude, `weight` is int8. Float32 holds every sum of EXACT_TERMS such products.
    """
    import torch

    parts = zip(x.split(EXACT_TERMS, -1), weight.split(EXACT_TERMS, 1), strict=True)
    first, *others = (torch.nn.functional.linear(values, part.float()) for values, part in parts)
    return sum(others, first.double()).float() if others else first


def round_to_nearest(weight: torch.Tensor, form: IntegerFormat) -> dict[str, torch.Tensor]:
    """Quantize `weight` [N, M] by rounding each value to the nearest the format has.

    Symmetric: the value of largest magnitude in a group maps to the most negative integer, so that the whole range
    is used (the scale may be negative), as llama.cpp's Q4_0 and onnxruntime's block quantizer do. With zero points:
    the range from the group's least to its greatest value, zero included, so that zero stays exact.

    Returns:
        `qweight` uint8 [N, G, block * bits / 8], `scales` float32 [N, G] and, unless symmetric, packed `zero_points`.
    """
    import torch

    parts = [_round_rows(weight[rows].float(), form) for rows in row_chunks(*weight.shape)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _round_rows(weight: torch.Tensor, form: IntegerFormat) -> dict[str, torch.Tensor]:
    import torch

    grouped = _grouped(weight, form)  # [N, G, block]
    whole = grouped.flatten(1) if form.group_size == "channel" else grouped  # the values that share a scale
    if form.symmetric:
        extreme = whole.gather(-1, whole.abs().argmax(-1, keepdim=True))
        scale = extreme / -form.middle
        zero = torch.full_like(scale, form.middle)
    else:
        low, high = whole.amin(-1, keepdim=True).clamp(max=0), whole.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / form.largest
        zero = (-low / torch.where(scale == 0, 1.0, scale)).round().clamp(0, form.largest)
    scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros: any scale serves, none is stored as zero
    if form.group_size == "channel":
        scale, zero = scale[:, None].expand_as(grouped[..., :1]), zero[:, None].expand_as(grouped[..., :1])
    q = ((grouped / scale).round() + zero).clamp(0, form.largest)
    stored = {"qweight": pack(q.to(torch.uint8), form.bits), "scales": scale[..., 0].contiguous()}
    if not form.symmetric:
        stored["zero_points"] = pack(_even(zero[..., 0].to(torch.uint8), form.bits), form.bits)
    return stored


def row_chunks(rows: int, features: int) -> list[slice]:
    """Return slices of a `[rows, features]` weight of at most CHUNK_ELEMENTS each."""
    step = max(1, CHUNK_ELEMENTS // features)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def dequantize(stored: dict[str, Any], form: IntegerFormat, features: int) -> torch.Tensor:
    """Return the float32 [N, features] weight that `stored` stands for."""
    q = unpack(stored["qweight"], form.bits).float()  # [N, G, block]
    if form.symmetric:
        q -= form.middle
    else:
        zero = unpack(stored["zero_points"], form.bits)[:, : q.shape[1]]
        q -= zero[..., None].float()
    weight: torch.Tensor = (q * stored["scales"][..., None]).flatten(1)[:, :features]
    return weight


def quantize_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return `x` [..., M] as MatMulNBits at accuracy level 4 sees it: int8 per block of `block` features.

    The scale of a block is its largest magnitude over 127. Checked against onnxruntime 1.31: equal to 3e-7 of range
    for 4 and 8 bits at blocks 16 to 256.
    """
    import torch

    features = x.shape[-1]
    blocks: torch.Tensor = torch.nn.functional.pad(x, (0, -features % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return ((blocks / scale).round() * scale).flatten(-2)[..., :features]


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 integers [..., n] below 2^bits into bytes [..., n * bits / 8], the first in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return q.contiguous()
    parts: torch.Tensor = q.unflatten(-1, (-1, per_byte))
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the integers that `pack` packed."""
    import torch

    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    mask = (1 << bits) - 1
    return torch.stack([(packed >> (bits * i)) & mask for i in range(per_byte)], -1).flatten(-2)


def _grouped(weight: torch.Tensor, form: IntegerFormat) -> torch.Tensor:
    """Return [N, M] as [N, G, block], padded with zeros."""
    import torch

    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % form.block))
    return padded.reshape(len(weight), -1, form.block)


def _even(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pad the last axis with zeros to whole bytes."""
    import torch

    return torch.nn.functional.pad(q, (0, -q.shape[-1] % (8 // bits)))
