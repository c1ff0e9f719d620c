"""int8 layers against the kernel they lower to, their rows against each other, and the graph that really runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tiny_models import CALIBRATION, EXPORT, Workshop, op_counts
from torch import nn

from passes._formats import ChannelFormat, integer_product, round_channels
from passes._graph import GRAPH
from passes._quantized import IntegerLinear, LayerSpec, quantized
from passes.base import Model, Pass
from passes.fuse_gate import FuseGate
from passes.fuse_gqa import FuseGqa
from passes.fuse_norm import FuseNorm
from passes.quantize_int8 import QuantizeInt8

ROW = QuantizeInt8()
STATIC = QuantizeInt8(activations="static", calibration=CALIBRATION)
FUSED = (EXPORT, FuseGqa(), FuseNorm(), FuseGate())
both = pytest.mark.parametrize("step", [ROW, STATIC], ids=["row", "static"])


def integer_layer(activations: Any, features: int = 200, rows: int = 6, bias: bool = True) -> IntegerLinear:
    """Return a random layer; a static one covers [-2, 3]."""
    torch.manual_seed(0)
    layer = nn.Linear(features, rows, bias=bias).requires_grad_(False)
    twin = quantized(layer, LayerSpec(ChannelFormat(), activations))
    assert isinstance(twin, IntegerLinear)
    stored = round_channels(layer.weight)
    if activations == "static":
        stored |= {"input_scale": torch.tensor(5 / 255), "input_zero_point": torch.tensor(102, dtype=torch.uint8)}
    for name, tensor in stored.items():
        setattr(twin, name, tensor)
    return twin


def opened(source: Any, optimized: Path | None = None) -> ort.InferenceSession:
    """Load a graph with onnxruntime's own optimizations; write what it makes of it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def exported(layer: nn.Module, x: torch.Tensor) -> ort.InferenceSession:
    """Return a session on the layer alone, [B, M] in."""
    program = torch.onnx.export(
        layer.eval(),
        (x,),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        verbose=False,
    )
    assert program is not None
    return opened(program.model_proto.SerializeToString())


def answers(session: ort.InferenceSession, x: torch.Tensor) -> np.ndarray:
    result: np.ndarray = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [200, 1300])  # the second is summed in three parts
@pytest.mark.parametrize("activations", ["row", "static"])
def test_the_layer_computes_what_the_kernel_computes(activations: Any, features: int, bias: bool) -> None:
    layer = integer_layer(activations, features, bias=bias)
    x = 2 * torch.randn(40, features)
    x[3], x[4] = 0, 1000 * x[4]
    got, want = answers(exported(layer, x), x), layer(x).numpy()
    # Integer sums are exact and float32 division is the same everywhere: the sum with the bias alone may round twice.
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-7 * float(np.abs(want).max()))
    if not bias:
        assert np.array_equal(got, want)


@pytest.mark.parametrize("activations", ["row", "static"])
def test_rounding_activations_costs_what_eight_bits_cost(activations: Any) -> None:
    layer, x = integer_layer(activations), torch.randn(50, 200).clamp(-2, 3)
    rounded = layer(x)
    layer.exact_activations = True
    want = layer(x)
    error = float((rounded - want).std() / want.std())
    # A range of 5 in 255 steps is noise of 5 / 255 / sqrt(12) = 0.0057 on values of 1; a row's own range is as large.
    assert 0.003 < error < 0.012


def test_an_integer_product_is_the_integer_sum_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-255, 256, (4, 3000), generator=generator)
    weight = torch.randint(-128, 128, (5, 3000), generator=generator)
    x[0], weight[0] = 255, -128  # the largest sum: 98 million, which float32 cannot count to one by one
    got = integer_product(x.float(), weight.to(torch.int8))
    assert torch.equal(got, (x @ weight.T).float())


def test_a_four_by_four_layer_by_hand() -> None:
    layer = integer_layer("row", 4, 4, bias=False)
    layer.qweight, layer.scales = torch.eye(4, dtype=torch.int8) * 127, torch.tensor([1.0, 1.0, 2.0, 1.0]) / 127
    # Each row is rounded to 127ths of its own largest magnitude: 0.5 of 1 is 63.5, and goes to 64 of 127, the even one.
    x = torch.tensor([[1.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-254.0, 2.0, 4.0, 0.9]])
    want = [[1.0, 64 / 127, 128 / 127, 0.0], [0.0] * 4, [-254.0, 2.0, 8.0, 0.0]]
    torch.testing.assert_close(layer(x), torch.tensor(want), rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_no_product_in_the_blocks_stays_float_in_the_graph_that_runs(
    workshop: Workshop, tmp_path: Path, name: str, step: Pass
) -> None:
    model = workshop.run(name, step, *((EXPORT,) if name == "bert" else FUSED)).model
    opened(str(model.folder / GRAPH), tmp_path / GRAPH)
    runs = Counter(node.op_type for node in onnx.load(tmp_path / GRAPH, load_external_data=False).graph.node)
    # bert has six layers in each of two blocks; query, key and value, gate and up are joined in the decoders.
    assert runs["MatMulIntegerToFloat"] == (12 if name == "bert" else 8)
    assert runs["QuantizeLinear"] == 8  # query, key and value share theirs
    assert runs["DequantizeLinear"] == runs["DynamicQuantizeMatMul"] == runs["DynamicQuantizeLinear"] == 0
    # What is float is outside the blocks: pooler (fused with its tanh) and classifier, or head.
    products = {kind: count for kind, count in runs.items() if kind.endswith(("MatMul", "Gemm"))}
    assert products == ({"FusedGemm": 1, "Gemm": 1} if name == "bert" else {"MatMul": 1})


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_graph_runs_where_signed_weights_would_overflow(workshop: Workshop, name: str) -> None:
    model = workshop.run(name, ROW, *((EXPORT,) if name == "bert" else FUSED)).model
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # as runtime/session.py on such a processor
    ort.InferenceSession(str(model.folder / GRAPH), options, providers=["CPUExecutionProvider"])


def encoder_answers(model: Model, texts: list[list[int]]) -> np.ndarray:
    """Run texts as one right-padded batch."""
    session = opened(str(model.folder / GRAPH))
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    result: np.ndarray = session.run(None, feed)[0]
    return result


@both
def test_a_text_alone_and_in_a_batch_of_its_length_give_the_same_bits(workshop: Workshop, step: Pass) -> None:
    model = workshop.run("bert", step, EXPORT).model
    rng = np.random.default_rng(0)
    texts = rng.integers(1, 256, (7, 13)).tolist()
    together = encoder_answers(model, texts)
    assert all(np.array_equal(together[row], encoder_answers(model, [text])[0]) for row, text in enumerate(texts))


@both
def test_padding_changes_no_more_than_it_changes_in_float(workshop: Workshop, step: Pass) -> None:
    texts = [[5, 9, 2], [7] * 11, [3, 1, 4, 1, 5, 9]]
    spread: dict[str, float] = {}
    for kind, steps in {"float": (EXPORT,), "int8": (step, EXPORT)}.items():
        model = workshop.run("bert", *steps).model
        together = encoder_answers(model, texts)
        alone = np.concatenate([encoder_answers(model, [text]) for text in texts])
        spread[kind] = float(np.abs(together - alone).max())
    # Attention sums over padded keys in another order (1e-8 here), which may move a rounding by one step of 255.
    assert spread["float"] < 1e-6
    assert spread["int8"] < 1e-3


def decoder_logits(model: Model, ids: list[int], splits: tuple[int, ...]) -> np.ndarray:
    """Run one sequence in chunks."""
    session = opened(str(model.folder / GRAPH))
    shapes = {each.name: each.shape for each in session.get_inputs()}
    past = {n: np.zeros((1, s[1], 32, s[3]), np.float32) for n, s in shapes.items() if n.startswith("past.")}
    rows, start = [], 0
    for length in splits:
        feed = {
            "input_ids": np.array([ids[start : start + length]]),
            "seqlens_k": np.array([start + length - 1], np.int32),
            "total_sequence_length": np.array([start + length], np.int32),
            "logits_positions": np.arange(length),
        }
        names = ["logits", *(name.replace("past.", "present.") for name in past)]
        logits, *present = session.run(names, feed | past)
        past = dict(zip(past, present, strict=True))
        rows.append(logits)
        start += length
    return np.concatenate(rows)


@both
@pytest.mark.parametrize("splits", [(4, 8), (6, 2, 4), (2, 3, 7)])
def test_chunks_of_a_sequence_give_the_same_bits_as_the_whole(
    workshop: Workshop, step: Pass, splits: tuple[int, ...]
) -> None:
    model = workshop.run("llama", step, *FUSED).model
    ids = np.random.default_rng(0).integers(1, 256, 12).tolist()
    assert np.array_equal(decoder_logits(model, ids, splits), decoder_logits(model, ids, (12,)))


@both
@pytest.mark.parametrize("fusion", [FuseGqa(), FuseGate()], ids=lambda each: each.name())
def test_fusions_keep_the_numbers_of_int8_layers(workshop: Workshop, tmp_path: Path, step: Pass, fusion: Pass) -> None:
    before, after = (workshop.run("qwen2", step, EXPORT, *steps) for steps in ((), (fusion,)))
    fusion.ensures(before.model, after.model, workshop.context(tmp_path, before.model))
    assert after.changes["refused"] == 0
    assert "not packed" not in after.note


def test_layers_of_two_kinds_are_not_joined_and_it_is_said(workshop: Workshop) -> None:
    step = QuantizeInt8(exclude=("model.layers.0.self_attn.q_proj",))
    result = workshop.run("llama", step, EXPORT, FuseGqa())
    assert result.note == "GroupQueryAttention 0: not packed: layers.0.qkv: the layers are of different kinds"
    assert op_counts(result.model)["MatMulIntegerToFloat"] == 11  # of 14, the three of layer 1 are one
