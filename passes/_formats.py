"""Number formats: which numbers a weight may be, how they are stored, and what they are worth again.

A format knows its grid, its scales and its packing; how weights are rounded to it is up to a method (`quantize_*`). A
method fits scales to groups of weights, rounds values to codes on the grid, as often as it likes, and stores them.
The packed layout is the one ONNX Runtime's `MatMulNBits` reads, so that lowering copies bytes and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 23
"""Weights that are in float32 at once: 32 MiB, and a few copies of it, whatever the size of a table."""
EXACT_TERMS = 512
"""Products of an integer up to 255 and one up to 128 that float32 sums exactly: 512 * 255 * 128 < 2^24."""
CHANNEL_BLOCK = 128
"""Block that a per-channel scale is repeated over when lowered: MatMulNBits knows blocks of 16 to 256 only."""
SHRINKS = tuple(1 - step / 40 for step in range(25))
"""Of the range of a group of integers, that `search_clip` tries. The best of int2 lies near 0.55, of int4 near 0.9."""
SEARCH_ELEMENTS = 1 << 18
"""Weights that are searched at once: the few copies of them fit the processor's cache."""
_WIDTHS = {"uint8": 1, "int8": 1, "float32": 4}


class Scales(NamedTuple):
    """What a group's codes are multiplied by, and which code stands for zero; both float32 [N, G, 1].

    `scale` is exactly what the stored form gives back.
    """

    scale: torch.Tensor
    zero: torch.Tensor

    def of(self, rows: slice) -> Scales:
        """Return those of some rows."""
        return Scales(self.scale[rows], self.zero[rows])


class WeightFormat(ABC):
    """Numbers in groups along the input features: `[N, M]` is `[N, G, B]`, padded with zeros.

    Codes are float32, of any shape that the scales fit: a method may round one column at a time.

    Attributes:
        shrinks: of a group's range, that `search_clip` tries.
    """

    shrinks: ClassVar[tuple[float, ...]] = SHRINKS

    @property
    @abstractmethod
    def name(self) -> str:
        """Return what recipes call it."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Return the number of input features per stored block."""

    @abstractmethod
    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the stored tensors of a `[rows, features]` weight."""

    @abstractmethod
    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0) -> Scales:
        """Return the scales by which the grid covers `shrink` [N, G, 1] of the range of `groups` [N, G, B]."""

    @abstractmethod
    def round(self, values: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Return the codes nearest to `values`."""

    @abstractmethod
    def value(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Return what codes are worth, float32."""

    @abstractmethod
    def store(self, codes: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """Pack codes [N, G, B] and their scales, as `shapes` says."""

    @abstractmethod
    def load(self, stored: Mapping[str, torch.Tensor], features: int) -> torch.Tensor:
        """Return the float32 [N, features] weight that `stored` stands for."""

    def for_weight(self, weight: torch.Tensor) -> WeightFormat:
        """Return the format that rounds this weight: itself, unless it has a scale for the whole of one."""
        return self

    def scales(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales that are stored, float32 [N, G]."""
        return stored["scales"]

    def blocks(self, features: int) -> int:
        """Return how many blocks hold `features` input features; the last one is padded."""
        return -(-features // self.block)

    def bytes(self, rows: int, features: int) -> int:
        """Return the bytes of the stored form of a `[rows, features]` weight."""
        return sum(prod(shape) * _WIDTHS[dtype] for shape, dtype in self.shapes(rows, features).values())

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [N, M] as [N, G, B], padded with zeros."""
        return _blocks(weight, self.block)


@dataclass(frozen=True)
class IntegerFormat(WeightFormat):
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
    def name(self) -> str:
        """Return what recipes call it."""
        return f"int{self.bits}"

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

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [N, M] as [N, G, B], padded with zeros; G is 1 where an output feature has one scale."""
        blocks = _blocks(weight, self.block)
        return blocks.flatten(1)[:, None] if self.group_size == "channel" else blocks

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0) -> Scales:
        """Return the scales by which the grid covers `shrink` [N, G, 1] of the range of `groups` [N, G, B].

        Symmetric: the value of largest magnitude maps to the most negative integer, so that the whole range is used
        (the scale may be negative), as llama.cpp's Q4_0 and onnxruntime's block quantizer do. With zero points: the
        range from the least to the greatest value, zero included, so that zero stays exact.
        """
        import torch

        if self.symmetric:
            extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
            scale = extreme * shrink / -self.middle
            return Scales(_divisor(scale), torch.full_like(scale, self.middle))
        low = groups.amin(-1, keepdim=True).clamp(max=0) * shrink
        high = groups.amax(-1, keepdim=True).clamp(min=0) * shrink
        scale = _divisor((high - low) / self.largest)
        return Scales(scale, (-low / scale).round().clamp(0, self.largest))

    def round(self, values: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Return the integers nearest to `values`."""
        return (values / scales.scale).round_().add_(scales.zero).clamp_(0, self.largest)

    def value(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Return what codes are worth, float32."""
        return (codes - scales.zero) * scales.scale

    def store(self, codes: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """Pack codes [N, G, B] and their scales; a channel's are repeated over its blocks.

        Returns:
            `qweight` uint8 [N, G, block * bits / 8], `scales` float32 [N, G] and, unless symmetric, packed
            `zero_points`.
        """
        import torch

        codes = codes.to(torch.uint8).flatten(1).unflatten(1, (-1, self.block))
        scale, zero = (each[..., 0].expand(codes.shape[:2]) for each in scales)
        stored = {"qweight": pack(codes, self.bits), "scales": scale.contiguous()}
        if not self.symmetric:
            stored["zero_points"] = pack(_even(zero.to(torch.uint8), self.bits), self.bits)
        return stored

    def load(self, stored: Mapping[str, torch.Tensor], features: int) -> torch.Tensor:
        """Return the float32 [N, features] weight that `stored` stands for."""
        q = unpack(stored["qweight"], self.bits).float()  # [N, G, block]
        if self.symmetric:
            q -= self.middle
        else:
            q -= unpack(stored["zero_points"], self.bits)[:, : q.shape[1], None].float()
        weight: torch.Tensor = (q * stored["scales"][..., None]).flatten(1)[:, :features]
        return weight


@dataclass(frozen=True)
class ChannelFormat:
    """Signed integers [N, M], not packed, one scale per output feature: what `MatMulIntegerToFloat` reads.

    Signed, not unsigned: onnxruntime multiplies signed weights 2.2 times as fast (docs/log.md, 2026-11-24).
    """

    bits: Literal[8] = 8
    name: ClassVar[str] = "int8"

    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the stored tensors of a `[rows, features]` weight."""
        return {"qweight": ((rows, features), "int8"), "scales": ((rows,), "float32")}

    def bytes(self, rows: int, features: int) -> int:
        """Return the bytes of the stored form of a `[rows, features]` weight."""
        return rows * (features + 4)

    def scales(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales that are stored, float32 [N]."""
        return stored["scales"]


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


def round_to_nearest(weight: torch.Tensor, form: WeightFormat, scales: Scales | None = None) -> dict[str, torch.Tensor]:
    """Quantize `weight` [N, M] by rounding each value to the nearest the format has; return what is stored.

    `scales` are those that cover each group's range if not given.
    """
    import torch

    form = form.for_weight(weight)
    parts = []
    for rows in row_chunks(*weight.shape):
        groups = form.grouped(weight[rows].float())
        own = form.fit(groups) if scales is None else scales.of(rows)
        parts.append(form.store(form.round(groups, own), own))
    return {name: torch.cat([part[name] for part in parts]) if each.ndim else each for name, each in parts[0].items()}


def rows_of(stored: Mapping[str, torch.Tensor], rows: slice | torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is stored of some rows of a weight; what all of them share stays."""
    return {name: each[rows] if each.ndim else each for name, each in stored.items()}


def rounded(weight: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Return what `weight` [N, M] is worth when each value is rounded to the nearest the format has, float32."""
    form = form.for_weight(weight)
    groups = form.grouped(weight.float())
    scales = form.fit(groups)
    return form.value(form.round(groups, scales), scales).flatten(1)[:, : weight.shape[1]]


def search_clip(weight: torch.Tensor, form: WeightFormat, importance: torch.Tensor | None = None) -> Scales:
    """Return the scales that lose least of `weight` [N, M] when it is rounded to nearest, of those the format offers.

    A group's loss is its squared error, that of input feature j times `importance` [M], such as the mean square of what
    the feature is multiplied by.
    """
    import torch

    form = form.for_weight(weight)
    weights = None if importance is None else form.grouped(importance[None].float())
    chunks = row_chunks(len(weight), weight.shape[1], SEARCH_ELEMENTS)
    parts = [_search(form.grouped(weight[rows].float()), form, weights) for rows in chunks]
    return Scales(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _search(groups: torch.Tensor, form: WeightFormat, importance: torch.Tensor | None) -> Scales:
    import torch

    least = torch.full_like(groups[..., :1], torch.inf)
    best = torch.ones_like(least)
    for shrink in form.shrinks:
        scales = form.fit(groups, shrink)
        error = (form.value(form.round(groups, scales), scales) - groups).square_()
        loss = (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True)
        best[loss < least] = shrink
        least = torch.minimum(least, loss)
    return form.fit(groups, best)


def row_chunks(rows: int, features: int, elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """Return slices of a `[rows, features]` weight of at most `elements` each, or a row."""
    step = max(1, elements // features)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


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


def _blocks(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Return [N, M] as [N, G, block], padded with zeros."""
    import torch

    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block))
    return padded.reshape(len(weight), -1, block)


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """Return scales none of which is zero: a group of zeros is served by any."""
    import torch

    return torch.where(scale == 0, 1.0, scale)


def _even(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pad the last axis with zeros to whole bytes."""
    import torch

    return torch.nn.functional.pad(q, (0, -q.shape[-1] % (8 // bits)))
