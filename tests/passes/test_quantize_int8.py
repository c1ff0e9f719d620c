"""quantize_int8: what it changes, what it leaves alone, what it refuses, and what it promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CALIBRATION, EXPORT, TEXTS, Workshop, file_hashes
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from passes._formats import ChannelFormat, IntegerFormat
from passes._quantized import LayerSpec, read_specs
from passes._safetensors import read_tensor, tensor_index, weight_files, write_safetensors
from passes._select import Selection
from passes._skeleton import Skeleton
from passes._walk import walk
from passes.base import Context, Model, PassError
from passes.quantize_int8 import RANGES, QuantizeInt8

ROW = QuantizeInt8()
STATIC = QuantizeInt8(activations="static", calibration=CALIBRATION)


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in tensor_index(model.folder).items()}


def answers_of(model: Model) -> torch.Tensor:
    skeleton = Skeleton(model)
    ids = torch.tensor([TEXTS[0]])
    result: torch.Tensor = next(walk(skeleton, [lambda module: module(input_ids=ids).logits]))[1]
    return result


@pytest.mark.parametrize("step", [ROW, STATIC])
@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("bert", 12)])
def test_linear_layers_in_the_blocks_become_int8_and_nothing_else(
    workshop: Workshop, name: str, count: int, step: QuantizeInt8
) -> None:
    before, result = tensors_of(workshop.model(name)), workshop.run(name, step)
    after, specs = tensors_of(result.model), read_specs(result.model.folder)
    assert result.changes == {"layers_quantized": count}
    assert set(specs.values()) == {LayerSpec(ChannelFormat(), step.activations)}
    for layer in specs:
        weight = before[f"{layer}.weight"]
        back = after[f"{layer}.qweight"].float() * after[f"{layer}.scales"][:, None]
        half_steps = weight.abs().amax(1, keepdim=True) / 254
        assert ((back - weight).abs() <= half_steps * 1.001).all()
    kept = before.keys() - {f"{layer}.weight" for layer in specs}
    assert all(torch.equal(after[tensor], before[tensor]) for tensor in kept)


def test_answers_come_near_the_source_and_are_not_the_same(workshop: Workshop) -> None:
    want = answers_of(workshop.model("llama"))
    for step in (ROW, STATIC):
        error = (answers_of(workshop.run("llama", step).model) - want).abs().max() / want.std()
        assert 1e-4 < error < 0.2  # noise of 0.6 % per factor, four standard deviations, seven layers deep


def test_the_range_of_a_static_layer_comes_from_the_texts(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    step = replace(STATIC, calibrator="minmax")
    seen: list[torch.Tensor] = []
    skeleton, layer = Skeleton(model), "model.layers.1.mlp.down_proj"
    skeleton.module.get_submodule(layer).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    texts = TEXTS[:1]
    list(walk(skeleton, [lambda module: module(input_ids=torch.tensor(texts)).logits]))
    result = step.run(model, Context(workdir=tmp_path, source=model, calibration={CALIBRATION: texts}))
    assert result.note.startswith("ranges found on 1 calibration text,")
    scale, zero = json.loads((tmp_path / RANGES).read_text())[layer]
    assert scale == pytest.approx(float(seen[0].max() - seen[0].min()) / 255, rel=1e-6)
    assert zero == round(-float(seen[0].min()) / scale)


def test_a_killed_run_keeps_the_ranges_it_found(workshop: Workshop, tmp_path: Path) -> None:
    model, made = workshop.model("llama"), workshop.run("llama", STATIC).model
    (tmp_path / RANGES).write_bytes((made.folder / RANGES).read_bytes())
    STATIC.run(model, Context(workdir=tmp_path, source=model, calibration={CALIBRATION: []}))
    assert file_hashes(tmp_path) == file_hashes(made.folder)


@pytest.mark.parametrize(("name", "step"), [("llama", STATIC), ("bert", ROW)])
def test_the_export_is_proven_on_what_is_not_rounded(
    workshop: Workshop, tmp_path: Path, name: str, step: QuantizeInt8
) -> None:
    before = workshop.run(name, step).model
    EXPORT.ensures(before, workshop.run(name, step, EXPORT).model, workshop.context(tmp_path, before))


def damaged(folder: Path, made: Model, op: str, place: int) -> Model:
    """Return an onnx stage whose first `op` has another constant at an input: one half too large, or 9 more."""
    from passes._graph import load_graph, save_graph
    from passes._match import new_constant

    graph = load_graph(made.folder)
    node = next(node for node in graph.graph if node.op_type == op)
    value = node.inputs[place].const_value.numpy()  # type: ignore[union-attr]
    wrong = (value * np.float32(1.5)) if value.dtype == np.float32 else (value + 9).astype(value.dtype)
    node.replace_input_with(place, new_constant(graph, "wrong", wrong))
    save_graph(graph, folder)
    return replace(made, folder=folder)


@pytest.mark.parametrize(
    ("op", "place"),
    [("QuantizeLinear", 1), ("QuantizeLinear", 2), *(("MatMulIntegerToFloat", place) for place in (1, 2, 3, 4))],
)
def test_a_wrong_scale_zero_point_or_weight_is_found(workshop: Workshop, tmp_path: Path, op: str, place: int) -> None:
    before, made = workshop.run("llama", STATIC).model, workshop.run("llama", STATIC, EXPORT).model
    with pytest.raises(PassError, match=r"the graph of the model differs from torch"):
        EXPORT.ensures(before, damaged(tmp_path, made, op, place), workshop.context(tmp_path, before))


def test_tables_become_groups_of_int8(workshop: Workshop) -> None:
    specs = read_specs(workshop.run("llama", QuantizeInt8(embedding="int8", lm_head="int8")).model.folder)
    assert {specs["lm_head"], specs["model.embed_tokens"]} == {LayerSpec(IntegerFormat(8, 64), "int8")}


@pytest.mark.parametrize("step", [ROW, STATIC, QuantizeInt8(embedding="int8", lm_head="int8")])
def test_estimate_agrees_with_what_is_stored(workshop: Workshop, step: QuantizeInt8) -> None:
    (estimate,), result = workshop.estimate("llama", step), workshop.run("llama", step)
    assert estimate.matches == result.changes["layers_quantized"]
    assert estimate.bytes == sum(path.stat().st_size for path in weight_files(result.model.folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activations": "static"}, "calibration: got none, expected an entry of `data`"),
        ({"calibration": "x"}, "calibration: got 'x' for activations: row"),
        ({"calibrator": "mse"}, "calibrator: got 'mse' for activations: row"),
        ({"samples": 0}, "samples: got 0, expected at least 1"),
        ({"context": 1}, "context: got 1, expected at least 2"),
    ],
)
def test_options_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeInt8(**fields)


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_an_input_scale_that_is_none_is_found(workshop: Workshop, tmp_path: Path, scale: float) -> None:
    before, made = workshop.model("llama"), workshop.run("llama", STATIC).model
    for path in made.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    after, name = replace(made, folder=tmp_path), "model.layers.0.mlp.up_proj.input_scale"
    entries = tensor_index(tmp_path)
    path = entries[name].file
    tensors = {other: read_tensor(entry) for other, entry in entries.items() if entry.file == path}
    write_safetensors(path, tensors | {name: torch.tensor(scale)}, {"quantization": "{}"})
    with pytest.raises(PassError, match=r"model\.layers\.0\.mlp\.up_proj: got the input scale"):
        STATIC.ensures(before, after, workshop.context(tmp_path, before))


def test_experts_that_stay_in_float_are_told(workshop: Workshop) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, moe_intermediate_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    module = Qwen3MoeForCausalLM(config)
    experts = [each for each in module.parameters() if each.ndim == 3]
    share = sum(each.numel() for each in experts) / sum(each.numel() for each in module.parameters())
    note = Selection("x", LayerSpec(ChannelFormat(), "row"), None, None, ()).note(module)
    assert note == f"{len(experts)} expert tensors ({share:.0%} of the weights) left in float"
    assert len(experts) == 4
    assert workshop.run("llama", ROW).note == ""
