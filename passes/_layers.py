"""Linear layers alone: which ones a model has, and the graph that each of them becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from passes._graph import save_graph, tidy
from passes._lower import transpose_weights
from passes._quantized import LayerSpec, quantized, read_specs
from passes._skeleton import build_module
from passes._trace import trace_module
from passes.base import Model


@dataclass(frozen=True)
class Linear:
    """A linear layer [N, M], its weight in float32 where it has no spec."""

    outputs: int
    inputs: int
    spec: LayerSpec | None


def quantized_linears(before: Model, after: Model) -> list[Linear]:
    """Return, for each way in which a pass quantized linear layers, one of the shape most weights are in."""
    module, known = build_module(after.config, "sdpa"), read_specs(before.folder)
    weights: Counter[Linear] = Counter()
    for name, spec in read_specs(after.folder).items():
        layer = module.get_submodule(name)
        if name not in known and isinstance(layer, nn.Linear):
            weights[Linear(layer.out_features, layer.in_features, spec)] += layer.weight.numel()
    typical: dict[LayerSpec | None, Linear] = {}
    for linear, _ in weights.most_common():
        typical.setdefault(linear.spec, linear)
    return list(typical.values())


def write_linears(linears: Sequence[Linear], folder: Path) -> list[Path]:
    """Write each layer as an onnx stage of its own, random numbers for weights; return their folders.

    A graph reads `x` float32 [1, T, M]. All are traced at once, for that takes as long as one.
    """
    torch.manual_seed(0)
    inputs = [f"x.{number}" for number in range(len(linears))]
    outputs = [f"y.{number}" for number in range(len(linears))]
    traced = trace_module(
        _Beside([_filled(each) for each in linears]),
        ([torch.zeros(1, 5, each.inputs) for each in linears],),
        ([{1: torch.export.Dim.DYNAMIC}] * len(linears),),
        inputs,
        outputs,
    )
    content, folders = ir.to_proto(traced), [folder / str(number) for number in range(len(linears))]
    for number, each in enumerate(folders):
        each.mkdir()
        model = ir.from_proto(content)
        model.graph.inputs[:] = [value for value in model.graph.inputs if value.name == inputs[number]]
        model.graph.outputs[:] = [value for value in model.graph.outputs if value.name == outputs[number]]
        RemoveUnusedNodesPass()(model)
        tidy(model)
        transpose_weights(model)
        save_graph(model, each)
    return folders


class _Beside(nn.Module):
    """Layers that have nothing to do with each other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def _filled(linear: Linear) -> nn.Module:
    layer = nn.Linear(linear.inputs, linear.outputs, bias=False).requires_grad_(False)
    if linear.spec is None:
        return layer.eval()
    twin = quantized(layer, linear.spec)
    for name, (shape, dtype) in linear.spec.shapes(linear.outputs, linear.inputs).items():
        setattr(twin, name, _random(shape, getattr(torch, dtype)))
    return twin.eval()


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.rand(shape, dtype=dtype) + 0.5
    return torch.randint(0, 127, shape, dtype=dtype)  # 127 is no number as a scale in E4M3
