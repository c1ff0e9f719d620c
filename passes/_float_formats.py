"""Float number formats: weights of 4 or 8 bits with an exponent of their own, and scales of a byte.

Codes are the numbers on the grid themselves, as float32; `store` turns them into bits, in the order in which ONNX and
the hardware read them. No kernel on CPU multiplies such floats, but twice an E2M1 number is an integer: MatMulNBits
takes it as an 8-bit one and half the scale, and nothing is rounded on the way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from passes._formats import IntegerFormat, Scales, WeightFormat, pack, unpack

if TYPE_CHECKING:
    import torch

_EXPONENT = 0x7F800000
"""Bits of a float32 that hold its exponent; those of a number alone are the power of two not above it."""
SMALLEST_POWER, LARGEST_POWER = 2.0**-126, 2.0**127
"""Of the scales that E8M0 holds and float32 does not have as a subnormal."""


@dataclass(frozen=True)
class Minifloat:
    """Floats of a sign, some bits of exponent and of mantissa, without infinity.

    Attributes:
        bits: of a number.
        mantissa: bits of it.
        least_exponent: of the numbers that are not subnormal.
        largest: number; bits above its own stand for no number.
    """

    bits: int
    mantissa: int
    least_exponent: int
    largest: float

    @property
    def smallest(self) -> float:
        """Return the smallest number above zero."""
        return 2.0 ** (self.least_exponent - self.mantissa)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Round float32 values to the nearest number, ties to an even mantissa; beyond the largest, to it."""
        import torch

        size = values.abs().clamp_(max=self.largest)
        power = _power_of_two(size).clamp_(min=2.0**self.least_exponent)
        step = power * 2.0**-self.mantissa
        return torch.copysign((size / step).round_().mul_(step), values)

    def encoded(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the bits of numbers of the grid, uint8; the sign is the highest."""
        import torch

        positive = self.table()[: 1 << (self.bits - 1)].nan_to_num(nan=torch.inf)
        size = torch.bucketize(numbers.abs(), positive, out_int32=True).to(torch.uint8)
        return size | (torch.signbit(numbers).to(torch.uint8) << (self.bits - 1))

    def table(self) -> torch.Tensor:
        """Return what all bits stand for, float32 [2^bits]; NaN where they stand for no number."""
        import torch

        bits = torch.arange(1 << (self.bits - 1))
        exponent, fraction = bits >> self.mantissa, bits & ((1 << self.mantissa) - 1)
        is_normal = exponent > 0
        whole = fraction + (is_normal.long() << self.mantissa)
        power = exponent.clamp(min=1) - 1 + self.least_exponent - self.mantissa
        positive = torch.ldexp(whole.float(), power)
        positive = torch.where(positive > self.largest, torch.nan, positive)
        return torch.cat([positive, -positive])


E2M1 = Minifloat(bits=4, mantissa=1, least_exponent=0, largest=6.0)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
E4M3 = Minifloat(bits=8, mantissa=3, least_exponent=-6, largest=448.0)


class FloatFormat(WeightFormat):
    """Small floats in groups along the input features; a value is its number times the scale of its group."""

    grid: ClassVar[Minifloat]

    @property
    @abstractmethod
    def name(self) -> str:
        """Return what recipes call it."""

    @abstractmethod
    def scale_for(self, reach: torch.Tensor) -> torch.Tensor:
        """Return the scale by which the grid covers magnitudes up to `reach` [N, G, 1], as it can be stored."""

    @abstractmethod
    def encoded_scales(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is stored of the scales [N, G]."""

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0) -> Scales:
        """Return the scales by which the grid covers `shrink` [N, G, 1] of the range of `groups` [N, G, B]."""
        import torch

        scale = self.scale_for(groups.abs().amax(-1, keepdim=True) * shrink)
        return Scales(scale, torch.zeros_like(scale))

    def round(self, values: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Return the numbers nearest to `values`; ties go to an even mantissa."""
        return self.grid.nearest(values / scales.scale)

    def value(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Return what numbers of the grid are worth, float32."""
        return codes * scales.scale

    def store(self, codes: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """Pack numbers [N, G, B] and their scales, as `shapes` says."""
        return {"qweight": pack(self.grid.encoded(codes), self.grid.bits), **self.encoded_scales(scales.scale[..., 0])}

    def load(self, stored: Mapping[str, torch.Tensor], features: int) -> torch.Tensor:
        """Return the float32 [N, features] weight that `stored` stands for."""
        numbers = self.grid.table()[unpack(stored["qweight"], self.grid.bits).int()]
        return (numbers * self.scales(stored)[..., None]).flatten(1)[:, :features]


class Fp4(FloatFormat):
    """E2M1 numbers in blocks, two to a byte, the first in the low bits; a byte for each scale."""

    grid = E2M1

    @property
    def group_size(self) -> int:
        """Return the number of input features that share a scale."""
        return self.block

    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the stored tensors of a `[rows, features]` weight."""
        groups = self.blocks(features)
        return {"qweight": ((rows, groups, self.block // 2), "uint8"), "scales": ((rows, groups), "uint8")}

    @abstractmethod
    def scale_table(self) -> torch.Tensor:
        """Return what the byte of a scale stands for, float32 [256]."""

    def scales(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales that are stored, float32 [N, G]."""
        return self.scale_table()[stored["scales"].int()]


@dataclass(frozen=True)
class Nvfp4(Fp4):
    """NVFP4: E2M1 in blocks of 16, E4M3 scales, and one float32 scale for the whole weight.

    The scale of the whole is its largest magnitude over 448 * 6, so that the scale of every block fits E4M3.

    Source: NVIDIA, Pretraining Large Language Models with NVFP4, 2025, arXiv:2509.25149, appendix C.

    Attributes:
        tensor_scale: of the weight that is rounded; None until `for_weight` was asked.
    """

    name: Literal["nvfp4"] = "nvfp4"
    tensor_scale: float | None = None

    @property
    def block(self) -> int:
        """Return the number of input features per stored block."""
        return 16

    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the stored tensors of a `[rows, features]` weight."""
        return {**super().shapes(rows, features), "tensor_scale": ((), "float32")}

    def for_weight(self, weight: torch.Tensor) -> Nvfp4:
        """Return the format with the scale that all blocks of `weight` share; once it has one, it keeps it."""
        if self.tensor_scale is not None:
            return self
        scale = weight.abs().amax().float() / (E4M3.largest * E2M1.largest)
        return replace(self, tensor_scale=float(scale) or 1.0)

    def scale_for(self, reach: torch.Tensor) -> torch.Tensor:
        """Return the scale by which E2M1 covers magnitudes up to `reach`: an E4M3 number above 0, times the whole's."""
        return E4M3.nearest(reach / E2M1.largest / self._whole).clamp_(min=E4M3.smallest) * self._whole

    def encoded_scales(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the bits of the blocks' scales [N, G], and the scale of the whole."""
        import torch

        bits = E4M3.encoded(E4M3.nearest(scale / self._whole))
        return {"scales": bits, "tensor_scale": torch.tensor(self._whole, dtype=torch.float32)}

    def scale_table(self) -> torch.Tensor:
        """Return what the byte of a block's scale stands for, float32 [256]."""
        return E4M3.table()

    def scales(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales that are stored, float32 [N, G]."""
        return super().scales(stored) * stored["tensor_scale"]

    @property
    def _whole(self) -> float:
        assert self.tensor_scale is not None, "nvfp4 has a scale for each weight: ask for_weight first"
        return self.tensor_scale


@dataclass(frozen=True)
class Mxfp4(Fp4):
    """MXFP4: E2M1 in blocks of 32, whose scales are powers of two (E8M0).

    A block's exponent is that of its largest magnitude less 2, the exponent of E2M1's largest number; what is beyond 6
    then becomes 6.

    Source: Open Compute Project, OCP Microscaling Formats (MX) Specification 1.0, 2023, section 6.3.
    """

    name: Literal["mxfp4"] = "mxfp4"
    shrinks = (1.0, 2.0, 0.5)

    @property
    def block(self) -> int:
        """Return the number of input features per stored block."""
        return 32

    def scale_for(self, reach: torch.Tensor) -> torch.Tensor:
        """Return the power of two by which E2M1 covers magnitudes up to `reach`, or nearly; 1 for zeros."""
        import torch

        power = _power_of_two(reach / 4).clamp_(SMALLEST_POWER, LARGEST_POWER)
        return torch.where(reach == 0, 1.0, torch.where(reach < torch.inf, power, torch.nan))

    def encoded_scales(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the exponents of the scales [N, G], E8M0."""
        import torch

        return {"scales": (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)}

    def scale_table(self) -> torch.Tensor:
        """Return what the byte of a scale stands for, float32 [256]."""
        import torch

        return torch.cat([torch.ldexp(torch.ones(255), torch.arange(-127, 128)), torch.tensor([torch.nan])])


@dataclass(frozen=True)
class Fp8(FloatFormat):
    """E4M3 with a float32 scale per group, or per output feature.

    Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433, section 3.
    """

    group_size: int | Literal["channel"]
    name: Literal["fp8"] = "fp8"
    grid = E4M3

    @property
    def block(self) -> int:
        """Return the number of input features per stored block; of whole channels there is none."""
        return 0 if self.group_size == "channel" else self.group_size

    def blocks(self, features: int) -> int:
        """Return how many blocks hold `features` input features; the last one is padded."""
        return super().blocks(features) if self.block else 1

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [N, M] as [N, G, B], padded with zeros; G is 1 where an output feature has one scale."""
        return super().grouped(weight) if self.block else weight[:, None]

    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the stored tensors of a `[rows, features]` weight."""
        groups = self.blocks(features)
        return {"qweight": ((rows, groups, self.block or features), "uint8"), "scales": ((rows, groups), "float32")}

    def scale_for(self, reach: torch.Tensor) -> torch.Tensor:
        """Return the scale by which E4M3 covers magnitudes up to `reach`; 1 for zeros."""
        import torch

        return torch.where(reach == 0, 1.0, reach / E4M3.largest)

    def encoded_scales(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the scales [N, G] as they are."""
        return {"scales": scale.contiguous()}


FLOATS: Mapping[str | None, type[FloatFormat]] = {each.name: each for each in (Nvfp4, Mxfp4, Fp8)}


def format_named(name: str, group_size: int | Literal["channel"], symmetric: bool) -> WeightFormat:
    """Return the format that recipes call so; blocks of 4-bit floats have a size of their own, and no zero points."""
    integers: Mapping[str, Literal[2, 4, 8]] = {"int2": 2, "int4": 4, "int8": 8}
    if name in integers:
        return IntegerFormat(integers[name], group_size, symmetric)
    return Fp8(group_size) if name == "fp8" else FLOATS[name]()


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Return the largest power of two not above each float32 value, none of which is negative; 0 for subnormals."""
    import torch

    return (values.view(torch.int32) & _EXPONENT).view(torch.float32)
