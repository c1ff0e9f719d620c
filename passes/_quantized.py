"""Quantized layers: modules that compute in torch as the kernel will, and know the ONNX node they lower to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from passes._formats import IntegerFormat, dequantize, quantize_activations, row_chunks

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = "quantization.json"


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is stored and computed.

    Attributes:
        format: the integers and scales of its weight.
        activations: "int8" rounds the layer's input as MatMulNBits at accuracy level 4 does; "float" leaves it.
    """

    format: IntegerFormat
    activations: Literal["float", "int8"]

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> LayerSpec:
        """Return the spec that `dataclasses.asdict` wrote."""
        return cls(IntegerFormat(**content["format"]), content["activations"])


@dataclass(frozen=True)
class QuantizedLayer:
    """What a quantizer makes of one layer: its spec and the tensors that hold its weight."""

    spec: LayerSpec
    stored: dict[str, torch.Tensor]


def read_specs(folder: Path) -> dict[str, LayerSpec]:
    """Return module name -> spec of a torch stage; empty for a model that was never quantized."""
    path = folder / FILE
    if not path.exists():
        return {}
    return {name: LayerSpec.parse(spec) for name, spec in json.loads(path.read_text()).items()}


def write_specs(folder: Path, specs: Mapping[str, LayerSpec]) -> None:
    """Write `quantization.json` into a torch stage."""
    content = {name: asdict(spec) for name, spec in sorted(specs.items())}
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")


class _Quantized(nn.Module):
    """A weight [N, M] as packed integers. `exact_activations` switches the simulation of int8 activations off."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor

    def __init__(self, rows: int, features: int, spec: LayerSpec) -> None:
        super().__init__()
        self.rows, self.features, self.spec = rows, features, spec
        self.exact_activations = False
        for name, (shape, dtype) in spec.format.shapes(rows, features).items():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors that hold the weight."""
        return {name: getattr(self, name) for name in self.spec.format.shapes(self.rows, self.features)}

    def dequantized(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return rows of the weight, float32 [R, M]."""
        return dequantize(
            {name: tensor[rows] for name, tensor in self.stored().items()}, self.spec.format, self.features
        )


class QuantizedLinear(_Quantized):
    """`nn.Linear` over a quantized weight; lowers to `com.microsoft::MatMulNBits`."""

    def __init__(self, rows: int, features: int, spec: LayerSpec, bias: nn.Parameter | None) -> None:
        super().__init__(rows, features, spec)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [..., M] -> [..., N]."""
        if torch.onnx.is_in_onnx_export():
            return self._lower(x)
        if self.spec.activations == "int8" and not self.exact_activations:
            x = quantize_activations(x, self.spec.format.block)
        parts = [nn.functional.linear(x, self.dequantized(rows)) for rows in row_chunks(self.rows, self.features)]
        out = torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias

    def _lower(self, x: torch.Tensor) -> torch.Tensor:
        form = self.spec.format
        inputs: list[torch.Tensor | None] = [x, self.qweight, self.scales]
        inputs.append(None if form.symmetric else self.zero_points)
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


class QuantizedEmbedding(_Quantized):
    """`nn.Embedding` over a quantized table; lowers to `com.microsoft::GatherBlockQuantized`.

    `features` must be a multiple of the block: the kernel reads rows of whole blocks.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [...] -> float32 [..., M]."""
        if torch.onnx.is_in_onnx_export():
            return self._lower(ids)
        return self.dequantized(ids.flatten()).reshape(*ids.shape, self.features)

    def _lower(self, ids: torch.Tensor) -> torch.Tensor:
        form = self.spec.format
        inputs = [self.qweight, ids, self.scales] + ([] if form.symmetric else [self.zero_points])
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
        return QuantizedLinear(layer.out_features, layer.in_features, spec, layer.bias)
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding(layer.num_embeddings, layer.embedding_dim, spec)
    raise TypeError(f"{type(layer).__name__} has no quantized form")
