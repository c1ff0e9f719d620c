"""Weights in small floats: what kernels read is what is stored, in a graph that keeps it packed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_models import EXPORT, Workshop, op_counts
from torch import nn

from passes import _expand
from passes._float_formats import Fp4, Fp8, Mxfp4, Nvfp4
from passes._formats import WeightFormat, round_to_nearest
from passes._graph import DATA, GRAPH, load_graph, save_graph, tidy
from passes._match import Refusal
from passes._pack import pack_linears
from passes._parity import Probe, range_error
from passes._prefill import _products
from passes._quantized import LayerSpec, quantized, read_specs
from passes._skeleton import Skeleton, build_module
from passes._trace import trace_module
from passes.base import GraphPass
from passes.fuse_gate import FuseGate
from passes.fuse_gqa import FuseGqa
from passes.quantize_rtn import QuantizeRtn

RANGE = 1e-5
"""Of the outputs: what float32 sums in another order may differ by, and no rounding of a weight."""
OUTPUTS, FEATURES = 24, 200
FORMS = (Nvfp4(), Nvfp4(), Mxfp4(), Mxfp4(), Fp8(32))
PAIRS = {"nvfp4": (0, 1), "mxfp4": (2, 3)}


@dataclass
class Traced:
    """Layers of one input, in torch and as a graph."""

    layers: nn.ModuleList
    graph: Path

    def torch(self, x: torch.Tensor) -> list[np.ndarray]:
        return [layer(x).numpy() for layer in self.layers]


class Beside(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    layers = nn.ModuleList([layer_in(form, seed) for seed, form in enumerate(FORMS)])
    names = [f"y.{number}" for number in range(len(layers))]
    example, rows = torch.zeros(3, FEATURES), ({0: torch.export.Dim.DYNAMIC},)
    graph = trace_module(Beside(layers), (example,), rows, ["x"], names)
    tidy(graph)
    save_graph(graph, folder := tmp_path_factory.mktemp("traced"))
    return Traced(layers, folder)


def layer_in(form: WeightFormat, seed: int) -> nn.Module:
    """Return a layer whose weights are far from those of another seed in range."""
    torch.manual_seed(seed)
    layer = nn.Linear(FEATURES, OUTPUTS, bias=False).requires_grad_(False)
    twin = quantized(layer, LayerSpec(form, "float"))
    for name, tensor in round_to_nearest(layer.weight * 10.0**seed, form).items():
        setattr(twin, name, tensor)
    return twin.eval()


def answers(graph: Path, x: torch.Tensor, optimized: Path | None = None) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(graph / GRAPH, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x.numpy()}))


@pytest.mark.parametrize("form", [Nvfp4(), Mxfp4()], ids=lambda form: form.name)
def test_integers_and_half_scales_are_the_same_weight_bit_for_bit(form: Fp4) -> None:
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)) ** 3
    stored = round_to_nearest(weight, form)
    integers, scales = _expand.integers(form, stored)
    assert integers.dtype == torch.uint8
    same = ((integers.float() - 128) * scales[..., None]).flatten(1)[:, :100]
    assert torch.equal(same, form.load(stored, 100))


@pytest.mark.parametrize("form", [Fp8("channel"), Fp8(32)], ids=["channel", "32"])
def test_fp8_weights_become_the_float32_ones_that_they_stand_for(form: Fp8) -> None:
    stored = round_to_nearest(torch.randn(4, 70, generator=torch.Generator().manual_seed(0)), form)
    assert torch.equal(_expand.floats(stored, 70), form.load(stored, 70))


def test_graphs_compute_what_torch_computes(traced: Traced) -> None:
    x = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(0))
    for got, want in zip(answers(traced.graph, x), traced.torch(x), strict=True):
        assert range_error(got, want) <= RANGE


def test_on_disk_lies_what_the_format_says_and_three_tables(traced: Traced) -> None:
    values = load_graph(traced.graph).graph.initializers.values()
    room = sum(value.const_value.nbytes for value in values if value.dtype != ir.DataType.INT64)  # type: ignore[union-attr]
    tables = 512 + 3 * 1024  # pairs of integers; scales in E4M3, in E8M0; E4M3
    assert room == sum(form.bytes(OUTPUTS, FEATURES) for form in FORMS) + tables


def test_nothing_is_left_to_expand_once_the_graph_is_loaded(traced: Traced, tmp_path: Path) -> None:
    answers(traced.graph, torch.zeros(1, FEATURES), tmp_path / GRAPH)
    graph = onnx.load(tmp_path / GRAPH, load_external_data=False).graph
    assert sorted(node.op_type for node in graph.node) == ["Gemm", *["MatMulNBits"] * 4]


@pytest.mark.parametrize("name", PAIRS)
def test_layers_with_scales_of_their_own_become_one_product(traced: Traced, tmp_path: Path, name: str) -> None:
    graph, (first, second) = load_graph(traced.graph), PAIRS[name]
    packed = pack_linears(graph, [graph.graph.outputs[each] for each in (first, second)], "pair")
    packed.type, packed.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", 2 * OUTPUTS])
    graph.graph.outputs[:] = [packed]
    tidy(graph)
    save_graph(graph, tmp_path)
    assert (tmp_path / DATA).stat().st_size < 1.2 * 2 * FORMS[first].bytes(OUTPUTS, FEATURES)  # 8 bits would be 1.8
    x = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(0))
    (got,), want = answers(tmp_path, x), traced.torch(x)
    for part, each in zip(np.split(got, 2, 1), (first, second), strict=True):
        assert range_error(part, want[each]) <= RANGE


def test_layers_in_different_floats_are_not_joined(traced: Traced) -> None:
    graph = load_graph(traced.graph)
    with pytest.raises(Refusal, match="different formats: block_size 16, 32"):
        pack_linears(graph, [graph.graph.outputs[1], graph.graph.outputs[2]], "pair")


def test_prompts_have_no_integers_to_make_of_small_floats(traced: Traced) -> None:
    assert not list(_products(load_graph(traced.graph).graph))


NVFP4, MXFP4 = (QuantizeRtn(format=name, embedding="int8", lm_head="int8") for name in ("nvfp4", "mxfp4"))
FUSIONS: tuple[GraphPass, ...] = (FuseGqa(), FuseGate())


def error(workshop: Workshop, step: QuantizeRtn, *fusions: GraphPass) -> float:
    """Return how far the graph of a small Llama is off what torch computes with the numbers that are stored."""
    before = workshop.run("llama", step).model
    probe = Probe.random(before.config, 0)
    graph = probe.graph(workshop.run("llama", step, EXPORT, *fusions).model.folder, 1)
    return probe.error(graph, probe.walked(Skeleton(before)))


@pytest.mark.slow
@pytest.mark.parametrize("step", [NVFP4, MXFP4, QuantizeRtn(format="fp8", activations="float")], ids=lambda x: x.format)
def test_a_graph_of_a_model_computes_what_torch_computes(workshop: Workshop, step: QuantizeRtn) -> None:
    assert error(workshop, step) <= RANGE


@pytest.mark.slow
@pytest.mark.parametrize("step", [NVFP4, MXFP4], ids=lambda x: x.format)
def test_joined_projections_of_a_model_compute_the_same(workshop: Workshop, step: QuantizeRtn) -> None:
    before = op_counts(workshop.run("llama", step, EXPORT).model)["MatMulNBits"]
    after = op_counts(workshop.run("llama", step, EXPORT, *FUSIONS).model)["MatMulNBits"]
    assert before - after == 6  # in each of two layers q, k and v are one product, gate and up another
    assert error(workshop, step, *FUSIONS) <= RANGE


@pytest.mark.slow
@pytest.mark.parametrize("step", [NVFP4, MXFP4], ids=lambda x: x.format)
@pytest.mark.parametrize("fusions", [(), FUSIONS], ids=["plain", "joined"])
def test_four_bits_and_a_byte_for_each_block_of_a_model_lie_on_disk(
    workshop: Workshop, step: QuantizeRtn, fusions: tuple[GraphPass, ...]
) -> None:
    before = workshop.run("llama", step).model
    module = build_module(before.config, "sdpa")
    layers = {name: spec.format for name, spec in read_specs(before.folder).items() if "layers." in name}
    theory = sum(form.bytes(*module.get_parameter(f"{name}.weight").shape) for name, form in layers.items())
    graph = load_graph(workshop.run("llama", step, EXPORT, *fusions).model.folder).graph
    stored = [
        value.const_value
        for name, value in graph.initializers.items()
        if re.search("qweight|scale", name) and "embed_tokens" not in name
    ]
    assert sum(tensor.nbytes for tensor in stored if tensor is not None) == theory
