"""The shrunken twin: what it keeps of a configuration, and the faults of a graph that it makes visible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_models import EXPORT, Workshop

from passes._graph import initializer, load_graph, save_graph
from passes._lower import lower
from passes._safetensors import SINGLE_NAME, read_header, read_tensor
from passes._skeleton import Skeleton, build_module
from passes._twin import (
    SPLITS,
    TOLERANCE,
    WINDOW,
    choose_lowering,
    make_twin,
    twin_configs,
    twin_errors,
)
from passes.base import Model, PassError

EXACT = TOLERANCE / 10
"""An exact graph must be far from the tolerance: 1e-7 to 2e-6 measured."""


def lowered_twin(workshop: Workshop, name: str) -> Model:
    def make(folder: Path) -> Model:
        twin = make_twin(workshop.model(name), folder, seed=0)
        save_graph(lower(Skeleton(twin)), folder)
        return twin

    return workshop.once(("twin", name), make)  # type: ignore[no-any-return]


def error_with(reference: Model, graph: Path, folder: Path, fault: Callable[[ir.Model], None]) -> float:
    """Return the error of a graph after `fault` was planted in it."""
    faulty = load_graph(graph)
    fault(faulty)
    save_graph(faulty, folder)
    return max(twin_errors(reference, folder, seed=0, threads=1))


def nodes(graph: ir.Model, *kinds: str) -> list[ir.Node]:
    found = [node for node in graph.graph if node.op_type in kinds]
    assert found, f"no {kinds} in the graph: the fault is not planted"
    return found


def number(graph: ir.Model, name: str, value: object, dtype: type = np.int64) -> ir.Value:
    graph.graph.initializers[name] = initializer(ir.Tensor(np.array(value, dtype), name=name))
    return graph.graph.initializers[name]


def in_front(graph: ir.Model, node: ir.Node, place: int, op: str, *operands: ir.Value, **attributes: int) -> None:
    """Put `op(input, operands)` in front of one input of a node."""
    fault = ir.node(op, [node.inputs[place], *operands], attributes)
    graph.graph.insert_before(node, fault)
    node.replace_input_with(place, fault.outputs[0])


def without_rotary(graph: ir.Model) -> None:
    zero = number(graph, "fault", 0, np.float32)
    for node in nodes(graph, "Cos", "Sin"):
        in_front(graph, node, 0, "Mul", zero)


def position_off_by_one(graph: ir.Model) -> None:
    # All positions moved alike change nothing, since rotary angles are relative: here the first step is right and
    # every later one begins one position early.
    (start,) = nodes(graph, "Clip")
    in_front(graph, start, 0, "Sub", number(graph, "fault", 1))


def scale_up_1_percent(graph: ir.Model) -> None:
    for node in nodes(graph, "GroupQueryAttention"):
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.01 * node.attributes.get_float("scale"))


def window_longer(graph: ir.Model) -> None:
    move_window(graph, 1)


def window_shorter(graph: ir.Model) -> None:
    move_window(graph, -1)


def move_window(graph: ir.Model, by: int) -> None:
    for node in nodes(graph, "GroupQueryAttention"):
        assert node.attributes.get_int("local_window_size") == WINDOW
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", WINDOW + by)


def past_shifted_by_one(graph: ir.Model) -> None:
    first, last, end = (number(graph, f"fault.{i}", [i]) for i in (0, 1, 2**62))
    axis = number(graph, "fault.axis", [2])
    for node in nodes(graph, "GroupQueryAttention"):
        for place in (3, 4):
            past = node.inputs[place]
            rest = ir.node("Slice", [past, last, end, axis])
            begin = ir.node("Slice", [past, first, last, axis])
            joined = ir.node("Concat", [rest.outputs[0], begin.outputs[0]], {"axis": 2})
            graph.graph.insert_before(node, [rest, begin, joined])
            node.replace_input_with(place, joined.outputs[0])


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
DECODER_FAULTS = [
    without_rotary,
    position_off_by_one,
    scale_up_1_percent,
    window_longer,
    window_shorter,
    past_shifted_by_one,
]


@pytest.mark.parametrize("name", ["mistral", "bert"])
def test_the_twin_of_an_exact_graph_is_exact(workshop: Workshop, name: str) -> None:
    twin = lowered_twin(workshop, name)
    alone, together = twin_errors(twin, twin.folder, seed=0, threads=1)
    assert max(alone, together) <= EXACT, f"{alone:.1e}, {together:.1e}"


@pytest.mark.parametrize("fault", DECODER_FAULTS)
def test_a_fault_in_a_decoder_shows(workshop: Workshop, tmp_path: Path, fault: Callable[[ir.Model], None]) -> None:
    twin = lowered_twin(workshop, "mistral")
    error = error_with(twin, twin.folder, tmp_path, fault)
    assert error > TOLERANCE, f"{fault.__name__}: {error:.1e} of range"


@pytest.mark.slow
def test_on_a_model_as_initialised_the_scale_fault_would_not_show(workshop: Workshop, tmp_path: Path) -> None:
    # A scale 1 % too large moves the logits of a tiny default-initialised model by 9e-5 of their range, below the
    # tolerance, and those of its twin by 2e-3. That is why there is a twin.
    model = workshop.model("mistral-at-rest")
    graph = workshop.run("mistral-at-rest", EXPORT).model.folder
    plain = error_with(model, graph, tmp_path, scale_up_1_percent)
    assert plain < TOLERANCE, f"{plain:.1e}"


def encoder_scale_up_1_percent(graph: ir.Model) -> None:
    for node in nodes(graph, "Attention"):
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.01 * 16**-0.5)


def mask_ignored(graph: ir.Model) -> None:
    for node in nodes(graph, "Attention"):
        node.replace_input_with(3, None)


def token_types_ignored(graph: ir.Model) -> None:
    (gather,) = [n for n in nodes(graph, "Gather") if n.inputs[1].name == "token_type_ids"]  # type: ignore[union-attr]
    in_front(graph, gather, 1, "Mul", number(graph, "fault", 0))


def encoder_position_off_by_one(graph: ir.Model) -> None:
    (gather,) = [n for n in nodes(graph, "Gather") if "position_embeddings" in str(n.inputs[0].name)]  # type: ignore[union-attr]
    in_front(graph, gather, 1, "Add", number(graph, "fault", 1))


@pytest.mark.parametrize(
    "fault", [encoder_scale_up_1_percent, mask_ignored, token_types_ignored, encoder_position_off_by_one]
)
def test_a_fault_in_an_encoder_shows(workshop: Workshop, tmp_path: Path, fault: Callable[[ir.Model], None]) -> None:
    twin = lowered_twin(workshop, "bert")
    error = error_with(twin, twin.folder, tmp_path, fault)
    assert error > TOLERANCE, f"{fault.__name__}: {error:.1e} of range"


def test_the_lengths_cross_the_window_on_prefill_chunk_and_decode() -> None:
    ends = np.cumsum(SPLITS)
    kinds = {"chunk": [length > 1 for length in SPLITS], "decode": [length == 1 for length in SPLITS]}
    assert SPLITS[0] < WINDOW  # the first step alone would not show it
    for kind in kinds.values():
        reaching = [end for end, fits in zip(ends, kind, strict=True) if fits and end > WINDOW]
        assert len(reaching) >= 2


def test_twin_keeps_heads_in_groups_and_what_switches_code_paths() -> None:
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "num_hidden_layers": 24,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_position_embeddings": 32768,
        "eos_token_id": 151645,
    }
    twin = next(twin_configs(config))
    assert (twin["num_attention_heads"], twin["num_key_value_heads"], twin["hidden_size"]) == (6, 2, 96)
    assert (twin["num_hidden_layers"], twin["vocab_size"], twin["eos_token_id"]) == (2, 256, 0)
    same = ("hidden_act", "rms_norm_eps", "tie_word_embeddings", "use_sliding_window")
    assert all(twin[key] == config[key] for key in same)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (3, 1), (9, 3)])
def test_twin_has_grouped_heads_exactly_where_the_model_has(heads: int, kv_heads: int) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 24 * heads}
    twin = next(twin_configs(LLAMA | sizes))
    assert twin["num_attention_heads"] % twin["num_key_value_heads"] == 0
    assert (twin["num_attention_heads"] > twin["num_key_value_heads"]) == (heads > kv_heads)


def test_twin_has_one_layer_of_each_kind() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 12}
    twin = next(twin_configs(config | {"layer_types": kinds * 2, "sliding_window": 512}))
    assert (twin["layer_types"], twin["sliding_window"]) == (["sliding_attention", "full_attention"], WINDOW)
    twin = next(twin_configs(config | {"layer_types": ["full_attention"] * 12}))
    assert twin["layer_types"] == ["full_attention"] * 2


def test_twin_scales_the_limits_of_its_positions() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32768, "rope_theta": 5e5}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    twin = next(twin_configs(LLAMA | {"max_position_embeddings": 131072, "rope_parameters": rope}))
    assert twin["max_position_embeddings"] == 64 >= sum(SPLITS)
    assert twin["rope_parameters"] == rope | {"original_max_position_embeddings": 16}
    assert rope["original_max_position_embeddings"] == 32768


def test_twin_has_sharp_queries_and_keys_and_no_norm_or_bias_at_rest(workshop: Workshop, tmp_path: Path) -> None:
    twin = make_twin(workshop.model("qwen2"), tmp_path, seed=0)
    weights = {name: read_tensor(entry) for name, entry in read_header(tmp_path / SINGLE_NAME).items()}
    assert weights.keys() == build_module(twin.config, "sdpa").state_dict().keys()
    layer = "model.layers.1.self_attn."
    for name in ("q_proj", "k_proj"):
        assert weights[f"{layer}{name}.weight"].std() == pytest.approx(0.02 * 20, rel=0.05)  # 20 x the usual 0.02
    assert weights[f"{layer}v_proj.weight"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert all(weights[name].std() > 0.1 for name in weights if weights[name].ndim == 1)


def test_twin_depends_on_configuration_and_seed_alone(workshop: Workshop, tmp_path: Path) -> None:
    files = []
    for place, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(place)
        folder.mkdir()
        torch.manual_seed(place)
        make_twin(workshop.model("mistral"), folder, seed)
        files.append((folder / SINGLE_NAME).read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_family_that_renames_its_sizes_has_a_small_twin() -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_head": 25, "n_layer": 48}
    twin = next(twin_configs(config | {"n_positions": 1024}))
    assert (twin["n_embd"], twin["n_head"], twin["n_layer"], twin["n_positions"]) == (32, 2, 2, 64)


def test_a_class_that_answers_no_text_is_refused_by_name(workshop: Workshop, tmp_path: Path) -> None:
    encoder = workshop.model("bert")
    model = replace(encoder, config={**encoder.config, "architectures": ["BertForTokenClassification"]})
    with pytest.raises(PassError, match="BertForTokenClassification cannot be lowered"):
        choose_lowering(model, workshop.context(tmp_path, model))
    assert list(tmp_path.iterdir()) == []


def one_row_for_all(graph: ir.Model) -> None:
    # Every row of a batch begins where the first one does: right for one row, wrong beside a row of another length.
    first, last, axis = (number(graph, f"row.{i}", [i]) for i in (0, 1, 0))
    (start,) = nodes(graph, "Clip")
    users = [(use.node, use.idx) for use in start.outputs[0].uses()]
    cut = ir.node("Slice", [start.outputs[0], first, last, axis])
    graph.graph.insert_after(start, cut)
    for node, place in users:
        node.replace_input_with(place, cut.outputs[0])


def test_a_row_that_takes_another_rows_positions_shows_in_the_batch_alone(workshop: Workshop, tmp_path: Path) -> None:
    twin = lowered_twin(workshop, "mistral")
    faulty = load_graph(twin.folder)
    one_row_for_all(faulty)
    save_graph(faulty, tmp_path)
    alone, together = twin_errors(twin, tmp_path, seed=0, threads=1)
    assert alone <= EXACT < TOLERANCE < together
