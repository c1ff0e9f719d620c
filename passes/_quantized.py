"""Quantized layers: modules that compute in torch as the kernel will, and know the ONNX nodes they lower to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from passes import _expand
from passes._float_formats import FLOATS, Fp4, Fp8
from passes._formats import (
    ChannelFormat,
    IntegerFormat,
    WeightFormat,
    integer_product,
    quantize_activations,
    quantize_affine,
    row_chunks,
    rows_of,
)

if TYPE_CHECKING:
    from passes._errors import LayerError

FILE = "quantization.json"
OPSET = 23
"""Of the standard operators that layers lower to, and of the whole graph."""
SMALLEST_RANGE = 1e-30
"""Stands for the range of a row of zeros, which divides that row."""


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is stored and computed.

    Attributes:
        format: the numbers and scales of its weight.
        activations: how the layer's input is rounded. With a `WeightFormat`: "int8" as MatMulNBits at accuracy level
            4 does, "float" not at all. With a `ChannelFormat`, to uint8: "row" by the largest magnitude of each row,
            "static" by one stored scale and zero point.
    """

    format: WeightFormat | ChannelFormat
    activations: Literal["float", "int8", "row", "static"]

    @property
    def weight_format(self) -> WeightFormat:
        """Return the format, whose groups a method rounds."""
        assert isinstance(self.format, WeightFormat)
        return self.format

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> LayerSpec:
        """Return the spec that `dataclasses.asdict` wrote."""
        form, activations = content["format"], content["activations"]
        whole = ChannelFormat if activations in ("row", "static") else IntegerFormat
        return cls(FLOATS.get(form.get("name"), whole)(**form), activations)

    def shapes(self, rows: int, features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of all that is stored in the place of a `[rows, features]` weight."""
        static = {"input_scale": ((), "float32"), "input_zero_point": ((), "uint8")}
        return self.format.shapes(rows, features) | (static if self.activations == "static" else {})


@dataclass(frozen=True)
class QuantizedLayer:
    """What a quantizer makes of one layer.

    Attributes:
        stored: the tensors that hold its weight.
        rows, columns: what was folded into the weight before it was rounded: float32 [N] that the layer's outputs are
            multiplied by, and [M] that its inputs are divided by.
        error: how far the layer is off.
    """

    spec: LayerSpec
    stored: dict[str, torch.Tensor]
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    error: LayerError | None = None


@dataclass(frozen=True)
class CacheSpec:
    """How one layer keeps its keys and values: int8, symmetric, a scale for each channel of each head.

    Attributes:
        heads: of keys and values, K.
        width: of a head, E.
    """

    heads: int
    width: int

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of what is stored."""
        return dict.fromkeys(("key_scale", "value_scale"), ((self.heads, 1, self.width), "float32"))


@dataclass(frozen=True)
class QuantizedCache:
    """What a cache becomes: its spec and its scales."""

    spec: CacheSpec
    stored: dict[str, torch.Tensor]


def parse_spec(content: Mapping[str, Any]) -> LayerSpec | CacheSpec:
    """Return what `dataclasses.asdict` wrote."""
    return LayerSpec.parse(content) if "format" in content else CacheSpec(**content)


def read_specs(folder: Path) -> dict[str, LayerSpec]:
    """Return module name -> spec of a torch stage's layers; empty for a model that was never quantized."""
    return {name: spec for name, spec in _read(folder).items() if isinstance(spec, LayerSpec)}


def read_caches(folder: Path) -> dict[str, CacheSpec]:
    """Return module name -> spec of a torch stage's caches; empty for a model whose cache is in float."""
    return {name: spec for name, spec in _read(folder).items() if isinstance(spec, CacheSpec)}


def _read(folder: Path) -> dict[str, LayerSpec | CacheSpec]:
    path = folder / FILE
    if not path.exists():
        return {}
    return {name: parse_spec(spec) for name, spec in json.loads(path.read_text()).items()}


def write_specs(folder: Path, specs: Mapping[str, LayerSpec | CacheSpec]) -> None:
    """Write `quantization.json` into a torch stage."""
    content = {name: asdict(spec) for name, spec in sorted(specs.items())}
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")


class _Quantized(nn.Module):
    """A weight [N, M] as integers. `exact_activations` switches the simulation of rounded activations off."""

    def __init__(self, rows: int, features: int, spec: LayerSpec) -> None:
        super().__init__()
        self.rows, self.features, self.spec = rows, features, spec
        self.exact_activations = False
        for name, (shape, dtype) in spec.shapes(rows, features).items():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors that hold the weight."""
        return {name: getattr(self, name) for name in self.spec.format.shapes(self.rows, self.features)}


class _Grouped(_Quantized):
    """A weight in a `WeightFormat`."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor

    def dequantized(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return rows of the weight, float32 [R, M]."""
        return self.spec.weight_format.load(rows_of(self.stored(), rows), self.features)

    def integers(self) -> _Integers:
        """Return the weight as onnxruntime's kernels read it."""
        form = self.spec.format
        if isinstance(form, Fp4):
            return _Integers(_expand.BITS, form.block, *_expand.integers(form, self.stored()), None)
        assert isinstance(form, IntegerFormat)
        zero_points = None if form.symmetric else self.zero_points
        return _Integers(form.bits, form.block, self.qweight, self.scales, zero_points)


class _Integers(NamedTuple):
    """A weight as integers of `bits` in blocks of so many features; without zero points the middle stands for zero."""

    bits: int
    block: int
    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


class QuantizedLinear(_Grouped):
    """`nn.Linear` over a quantized weight; lowers to `com.microsoft::MatMulNBits`, in fp8 to MatMul."""

    def __init__(self, rows: int, features: int, spec: LayerSpec, bias: nn.Parameter | None) -> None:
        super().__init__(rows, features, spec)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [..., M] -> [..., N]."""
        if torch.onnx.is_in_onnx_export():
            return self._lower(x)
        if self.spec.activations == "int8" and not self.exact_activations:
            x = quantize_activations(x, self.spec.weight_format.block)
        parts = [nn.functional.linear(x, self.dequantized(rows)) for rows in row_chunks(self.rows, self.features)]
        out = torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias

    def _lower(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.spec.format, Fp8):
            return nn.functional.linear(x, _expand.floats(self.stored(), self.features), self.bias)
        form = self.integers()
        inputs: list[torch.Tensor | None] = [x, form.qweight, form.scales, form.zero_points]
        if self.bias is not None:
            inputs += [None, self.bias]  # the fourth optional input is g_idx
        while inputs[-1] is None:
            inputs.pop()
        attributes: dict[str, Any] = {
            "K": self.features,
            "N": self.rows,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": 4 if self.spec.activations == "int8" else 0,
        }
        shape = (*x.shape[:-1], self.rows)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", inputs, attributes, dtype=torch.float32, shape=shape, version=1
        )


class IntegerLinear(_Quantized):
    """`nn.Linear` over int8 weights and uint8 inputs; lowers to QuantizeLinear and MatMulIntegerToFloat.

    Per row, x / r with r = max|x| is rounded, and the product multiplied by r: no row's result depends on its
    neighbours, which `DynamicQuantizeMatMul` with its one scale for all rows cannot say.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor

    def __init__(self, rows: int, features: int, spec: LayerSpec, bias: nn.Parameter | None) -> None:
        super().__init__(rows, features, spec)
        self.bias = bias

    def dequantized(self) -> torch.Tensor:
        """Return the weight, float32 [N, M]."""
        return self.qweight.float() * self.scales[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [..., M] -> [..., N]."""
        if self.exact_activations and not torch.onnx.is_in_onnx_export():
            return nn.functional.linear(x, self.dequantized(), self.bias)
        if self.spec.activations == "static":
            return self._multiply(x, self.input_scale, self.input_zero_point, self.bias)
        ranges = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_RANGE)
        step, middle = torch.tensor(1 / 127), torch.tensor(128, dtype=torch.uint8)
        out = self._multiply(x / ranges, step, middle, None) * ranges
        return out if self.bias is None else out + self.bias

    def _multiply(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Round x to integers, multiply, and give the product its scale and bias."""
        if torch.onnx.is_in_onnx_export():
            return self._lower(x, scale, zero_point, bias)
        q = quantize_affine(x, scale, zero_point) - zero_point
        parts = [integer_product(q, self.qweight[rows]) for rows in row_chunks(self.rows, self.features)]
        out = torch.cat(parts, -1) * (scale * self.scales)
        return out if bias is None else out + bias

    def _lower(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        q = torch.onnx.ops.symbolic(
            "QuantizeLinear", [x, scale, zero_point], {}, dtype=torch.uint8, shape=x.shape, version=OPSET
        )
        inputs = [q, self.qweight.t(), scale, self.scales, zero_point, None, bias]  # the weight's zero point is 0
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            inputs if bias is not None else inputs[:-2],
            {},
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )


class QuantizedEmbedding(_Grouped):
    """`nn.Embedding` over a quantized table; lowers to `com.microsoft::GatherBlockQuantized`.

    `features` must be a multiple of the block: the kernel reads rows of whole blocks.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [...] -> float32 [..., M]."""
        if torch.onnx.is_in_onnx_export():
            return self._lower(ids)
        return self.dequantized(ids.flatten()).reshape(*ids.shape, self.features)

    def _lower(self, ids: torch.Tensor) -> torch.Tensor:
        form = self.integers()
        inputs = [form.qweight, ids, form.scales] + ([] if form.zero_points is None else [form.zero_points])
        attributes: dict[str, Any] = {
            "bits": form.bits,
            "block_size": form.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        return torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            inputs,
            attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.features),
            version=1,
        )


def quantized(layer: nn.Module, spec: LayerSpec) -> _Quantized:
    """Return the quantized twin of an `nn.Linear` or `nn.Embedding`, its weight on the meta device."""
    if isinstance(layer, nn.Linear):
        kind = IntegerLinear if isinstance(spec.format, ChannelFormat) else QuantizedLinear
        return kind(layer.out_features, layer.in_features, spec, layer.bias)
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding(layer.num_embeddings, layer.embedding_dim, spec)
    raise TypeError(f"{type(layer).__name__} has no quantized form")
