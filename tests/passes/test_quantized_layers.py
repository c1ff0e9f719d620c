"""Quantized layers against the kernels of onnxruntime that they lower to, and their state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from passes._formats import IntegerFormat, round_to_nearest
from passes._parity import range_error
from passes._quantized import LayerSpec, quantized, read_specs, write_specs

KERNEL = 1e-6
"""Float32 sums of 200 products in another order differ by up to 4e-7 of the range of the result."""
GROUPS = (16, 32, 64, 128, 256, "channel")
ROWS, FEATURES = 6, 200  # no multiple of any group


def run_node(
    op: str, inputs: list[str], attributes: dict[str, int], tensors: dict[str, np.ndarray], x: np.ndarray
) -> Any:
    """Return what onnxruntime computes for one node of com.microsoft whose input `x` is fed."""
    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)
    fed = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph([node], "one", [fed], [out], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def layer_with(layer: nn.Module, spec: LayerSpec) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the layer's quantized form with its tensors in memory, and those tensors."""
    twin = quantized(layer, spec)
    stored = round_to_nearest(layer.get_parameter("weight").data, spec.format)
    for name, tensor in stored.items():
        setattr(twin, name, tensor)
    return twin, {name: tensor.numpy() for name, tensor in stored.items()}


def linear_error(spec: LayerSpec) -> float:
    torch.manual_seed(0)
    layer, x = nn.Linear(FEATURES, ROWS), torch.randn(3, FEATURES)
    twin, tensors = layer_with(layer, spec)
    tensors["bias"] = layer.bias.detach().numpy()
    inputs = ["x", "qweight", "scales", "" if spec.format.symmetric else "zero_points", "", "bias"]
    attributes = {"K": FEATURES, "N": ROWS, "bits": spec.format.bits, "block_size": spec.format.block}
    attributes["accuracy_level"] = 4 if spec.activations == "int8" else 0
    with torch.no_grad():
        return range_error(run_node("MatMulNBits", inputs, attributes, tensors, x.numpy()), twin(x).numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_linear_computes_what_the_kernel_computes(bits: Any, group_size: Any, symmetric: bool) -> None:
    assert linear_error(LayerSpec(IntegerFormat(bits, group_size, symmetric), "float")) <= KERNEL


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(2, group) for group in (32, 64, 128, "channel")] + [(bits, group) for bits in (4, 8) for group in GROUPS],
)
def test_int8_activations_are_rounded_as_the_kernel_rounds_them(bits: Any, group_size: Any, symmetric: bool) -> None:
    # Without the simulation the error is 2e-3 of the range and more.
    assert linear_error(LayerSpec(IntegerFormat(bits, group_size, symmetric), "int8")) <= KERNEL


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_embedding_reads_what_the_kernel_reads(bits: Any, group_size: Any, symmetric: bool) -> None:
    torch.manual_seed(0)
    table, ids = nn.Embedding(7, 512), torch.tensor([[0, 6, 3], [1, 1, 5]])
    form = IntegerFormat(bits, group_size, symmetric)
    twin, tensors = layer_with(table, LayerSpec(form, "int8"))
    tensors["qweight"] = tensors["qweight"].reshape(7, -1)
    inputs = ["qweight", "x", "scales"] + ([] if symmetric else ["zero_points"])
    attributes = {"bits": bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}
    got = run_node("GatherBlockQuantized", inputs, attributes, tensors, ids.numpy())
    assert range_error(got, twin(ids).numpy()) <= 1e-7  # one product each: nothing to sum


def test_a_layer_with_exact_activations_multiplies_the_dequantized_weight() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 5), torch.randn(2, 64)
    spec = LayerSpec(IntegerFormat(4, 32), "int8")
    twin, _ = layer_with(layer, spec)
    rounded = twin(x)
    twin.exact_activations = True
    want = nn.functional.linear(x, spec.format.load(twin.stored(), 64), layer.bias)
    torch.testing.assert_close(twin(x), want, rtol=0, atol=1e-6)  # the bias may be added inside or after the product
    assert (rounded - want).abs().max() > 1e-4  # 64 roundings of up to 1/254 each


def test_specs_are_read_as_they_were_written(tmp_path: Path) -> None:
    specs = {
        "model.layers.0.mlp.up_proj": LayerSpec(IntegerFormat(4, 128, False), "int8"),
        "lm_head": LayerSpec(IntegerFormat(8, "channel"), "float"),
    }
    assert read_specs(tmp_path) == {}
    write_specs(tmp_path, specs)
    assert read_specs(tmp_path) == specs


def test_a_layer_of_another_kind_has_no_quantized_form() -> None:
    with pytest.raises(TypeError, match="LayerNorm has no quantized form"):
        quantized(nn.LayerNorm(4), LayerSpec(IntegerFormat(4, 32), "int8"))
