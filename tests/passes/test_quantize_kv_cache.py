"""quantize_kv_cache: torch rounds as the kernel does, the range is what texts reach, the artifact keeps bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tiny_models import CALIBRATION, EXPORT, TABLES_IN_INT8, TEXTS, Workshop, save_model
from transformers import DynamicCache

from passes._graph import GRAPH, load_graph, save_graph
from passes._kv_cache import rounded
from passes._parity import Probe, range_error
from passes._skeleton import Skeleton
from passes.base import Model, PassError
from passes.fuse_gqa import FuseGqa
from passes.quantize_kv_cache import SCALES, QuantizeKvCache
from passes.quantize_rtn import QuantizeRtn
from passes.rotate import Rotate
from passes.smooth_quant import SmoothQuant
from runtime.invariance import Found, examine
from runtime.session import DecoderSession

KV = QuantizeKvCache(calibration=CALIBRATION)
HEADS, WIDTH, TOKENS = 2, 16, 4


def test_rounding_by_hand() -> None:
    x = torch.tensor([[0.0, 0.24, 0.25, 0.26], [-0.74, 0.75, 0.76, -0.25], [63.5, 64, 70, -64], [-65, 1, 2, 63.7]])
    want = [[0.0, 0.0, 0.0, 0.5], [-0.5, 1.0, 1.0, 0.0], [63.5, 63.5, 63.5, -64], [-64, 1, 2, 63.5]]
    assert rounded(x, torch.tensor(0.5)).tolist() == want  # ties to even; integers from -128 to 127


@lru_cache
def kernel() -> Any:
    """Return a session of one GroupQueryAttention with an int8 cache."""
    import onnxruntime

    names = ["q", "k", "v", "past_k", "past_v", "lengths", "total", "", "", "", "", "", "k_scale", "v_scale"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
    )
    kinds = {"past": TensorProto.INT8, "leng": TensorProto.INT32, "tota": TensorProto.INT32}
    inputs = [helper.make_tensor_value_info(x, kinds.get(x[:4], TensorProto.FLOAT), None) for x in names if x]
    outputs = [helper.make_tensor_value_info("present_k", TensorProto.INT8, None)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 5), st.sampled_from([-1, 0, 1]))
def test_torch_rounds_as_the_kernel_does_in_ties_and_beside_them(seed: int, size: float, side: int) -> None:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size, 1, (HEADS, 1, WIDTH))).astype(np.float32)
    key = (rng.integers(-140, 140, (HEADS, TOKENS, WIDTH)).astype(np.float32) + np.float32(0.5)) * scale
    key = np.nextafter(key, np.float32(side * np.inf)) if side else key
    rows = key.transpose(1, 0, 2).reshape(1, TOKENS, -1)
    past = np.zeros((1, HEADS, TOKENS, WIDTH), np.int8)
    counts = {"lengths": np.array([TOKENS - 1], np.int32), "total": np.array([TOKENS], np.int32)}
    sides = {"past_k": past, "past_v": past, "k_scale": scale, "v_scale": scale}
    (codes,) = kernel().run(None, {"q": rows, "k": rows, "v": rows, **counts, **sides})
    assert np.array_equal(rounded(torch.tensor(key), torch.tensor(scale)).numpy(), codes[0] * scale)


def test_the_range_is_the_largest_magnitude_that_a_layer_keeps_of_any_text(workshop: Workshop) -> None:
    folder = workshop.model("llama").folder
    module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    peaks: dict[str, torch.Tensor] = {}
    for text in TEXTS:
        cache = DynamicCache(config=module.config)
        with torch.inference_mode():
            module(input_ids=torch.tensor([text]), past_key_values=cache)
        for number, layer in enumerate(cache.layers):
            for leaf, kept in (("key_scale", layer.keys), ("value_scale", layer.values)):
                name = f"model.layers.{number}.self_attn.kv_cache.{leaf}"
                peak = kept[0].abs().amax(1, keepdim=True)
                peaks[name] = torch.maximum(peaks.get(name, peak), peak)
    skeleton = Skeleton(workshop.run("llama", KV).model)
    assert {name for name in skeleton.tensors("") if "kv_cache" in name} == peaks.keys()
    for name, peak in peaks.items():
        assert torch.allclose(skeleton.read(name) * 127, peak, rtol=1e-5)  # other kernels sum in another order


def test_nothing_but_the_scales_is_added(workshop: Workshop) -> None:
    before, after = Skeleton(workshop.model("llama")), Skeleton(workshop.run("llama", KV).model)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors(""))
    assert len(after.tensors("")) - len(before.tensors("")) == 4


def test_answers_move_by_the_rounding_and_no_more(workshop: Workshop) -> None:
    probe = replace(Probe.random(workshop.model("llama").config, 0), rounds_cache=True)
    want, got = (probe.walked(Skeleton(m)) for m in (workshop.model("llama"), workshop.run("llama", KV).model))
    # 0.0048: half of a 127th of the range in each number, on logits that hardly hang on attention
    assert 1e-4 < range_error(got, want) < 2e-2


def test_a_killed_run_keeps_the_scales_it_found(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    KV.run(model, workshop.context(tmp_path, model))
    parts = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    for path in parts:
        path.unlink()
    no_texts = replace(workshop.context(tmp_path, model), calibration={CALIBRATION: [(float("nan"),)] * 32})  # type: ignore[list-item]
    KV.run(model, no_texts)
    assert (tmp_path / SCALES).exists() and {path: path.read_bytes() for path in parts} == parts


def test_the_artifact_answers_as_torch_in_a_quarter_of_the_bytes_and_keeps_every_bit(workshop: Workshop) -> None:
    quantized = workshop.run("llama", TABLES_IN_INT8, KV).model
    graph = workshop.run("llama", TABLES_IN_INT8, KV, EXPORT, FuseGqa()).model.folder
    for rounds in (False, True):
        probe = replace(Probe.random(quantized.config, 0), rounds_cache=rounds)
        # the same products in another order; no number fell on the other side of a half
        assert probe.error(probe.graph(graph, 1), probe.walked(Skeleton(quantized))) < 1e-5
    session = DecoderSession(graph / GRAPH, capacity=64, threads=1, slots=4)
    assert session.cache.token_bytes == 2 * 2 * 2 * 16  # layers, sides, heads, width: a byte each
    assert examine(session) == Found(even_rows=True, odd_rows=True, chunks=True, phases=True)


def test_scales_of_the_wrong_side_are_found_at_export(workshop: Workshop, tmp_path: Path) -> None:
    quantized = workshop.run("llama", TABLES_IN_INT8, KV).model
    exported = workshop.run("llama", TABLES_IN_INT8, KV, EXPORT).model
    model = load_graph(exported.folder)
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        scales = node.inputs[12:]
        for place, scale in zip((12, 13), reversed(scales), strict=True):
            node.replace_input_with(place, scale)
    save_graph(model, tmp_path)
    wrong = replace(exported, folder=tmp_path)
    with pytest.raises(PassError, match=r"export_onnx: the graph of the model differs from torch by \d"):
        EXPORT.ensures(quantized, wrong, workshop.context(tmp_path, quantized))


def test_weights_are_rounded_before_the_cache(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.run("llama", KV).model
    ctx = workshop.context(tmp_path, model)
    for step in (QuantizeRtn(), SmoothQuant(calibration=CALIBRATION), Rotate()):
        for asked in (step.estimate, step.run):
            with pytest.raises(PassError, match="put quantize_kv_cache last"):
                asked(model, ctx)
    with pytest.raises(PassError, match="the cache is quantized already"):
        KV.requires(model)


def test_excluded_layers_stay_in_float(workshop: Workshop) -> None:
    step = replace(KV, exclude=("*.1.self_attn",))
    result = workshop.run("llama", step)
    assert set(Skeleton(result.model).caches) == {"model.layers.0.self_attn.kv_cache"}
    assert "take 320 bytes a token instead of 512" in result.note
    step.ensures(workshop.model("llama"), result.model, workshop.context(result.model.folder, result.model))
    with pytest.raises(PassError, match="matched none of 2 attention layers: all are excluded"):
        workshop.run("llama", replace(KV, exclude=("*.self_attn",)))
    with pytest.raises(PassError, match="exclude pattern 'q_proj' matches no module"):
        replace(KV, exclude=("q_proj",)).requires(workshop.model("llama"))


def test_a_key_that_is_no_number_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(workshop.model("llama").folder)
    module.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.inf
    model = save_model(module, tmp_path / "model")
    with pytest.raises(PassError, match=r"model\.layers\.1\.self_attn: a key is NaN or infinite"):
        KV.run(model, workshop.context(tmp_path, model))


def test_encoders_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("bert")
    with pytest.raises(PassError, match="BertForSequenceClassification keeps no keys and values, expected a decoder"):
        KV.admits(model, workshop.context(tmp_path, model))


@pytest.mark.slow
def test_families_without_the_operator_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2)
    model = save_model(transformers.BloomForCausalLM(config), tmp_path / "model")
    with pytest.raises(PassError, match="quantize_kv_cache: the attention of BloomForCausalLM does not become GroupQ"):
        KV.admits(model, workshop.context(tmp_path, model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen2", "phi", "gpt2"])
def test_windows_caps_and_other_families_answer_as_torch(workshop: Workshop, name: str) -> None:
    quantized: Model = workshop.run(name, KV).model
    graph = workshop.run(name, KV, EXPORT).model.folder
    for rounds in (False, True):
        probe = replace(Probe.random(quantized.config, 0), rounds_cache=rounds)
        assert probe.error(probe.graph(graph, 1), probe.walked(Skeleton(quantized))) < 1e-5
    found = examine(DecoderSession(graph / GRAPH, capacity=64, threads=1, slots=4))
    assert found == Found(even_rows=True, odd_rows=True, chunks=True, phases=True)
