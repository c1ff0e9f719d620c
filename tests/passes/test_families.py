"""Architectures beyond Llama and BERT: the way each is lowered, where its context ends, what is refused and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from tiny_models import DECODER, ENCODER, EXPORT, save_model

from passes._checkpoint import stored_tensors
from passes._kind import DEFAULT_CONTEXT, position_limit
from passes._parity import GraphRunner, Probe, graph_error
from passes._safetensors import tensor_index
from passes._skeleton import Skeleton, build_module
from passes._trace import decoder_shapes
from passes._twin import TOLERANCE, Lowering, choose_lowering
from passes.base import Context, GraphPass, Model, PassError

EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
ALIBI = {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}
LOCAL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 6,
    "max_position_embeddings": 64,
}
LONG = {**DECODER, "num_attention_heads": 4, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
DEBERTA = {
    **ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def made(architecture: str, folder: Path, settings: dict[str, Any]) -> Model:
    """Write a random model of an architecture as it would lie on the Hub."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    return save_model(kind(kind.config_class(**settings)).eval(), folder)


def context(folder: Path, model: Model) -> Context:
    folder.mkdir(exist_ok=True)
    return Context(workdir=folder, source=model)


def way(architecture: str, folder: Path, settings: dict[str, Any]) -> Lowering:
    model = made(architecture, folder / "model", settings)
    return choose_lowering(model, context(folder / "work", model))


def test_experts_are_read_from_one_tensor_each_and_lowered_exactly(tmp_path: Path) -> None:
    model = made("Qwen3MoeForCausalLM", tmp_path / "model", EXPERTS)
    assert any("experts.3.down_proj" in name for name in tensor_index(model.folder))
    module = build_module(model.config, "sdpa")
    stored = stored_tensors(model.folder, module)
    original = transformers.Qwen3MoeForCausalLM.from_pretrained(model.folder).state_dict()
    for name, value in original.items():
        assert torch.equal(stored[name].read(), value), name
    ctx = context(tmp_path / "graph", model)
    lowered = EXPORT.run(model, ctx).model
    EXPORT.ensures(model, lowered, ctx)


def test_a_checkpoint_with_older_names_is_read(tmp_path: Path) -> None:
    model = made("GPTNeoXForCausalLM", tmp_path, {**DECODER, "rotary_pct": 0.25})
    original = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path).state_dict()
    skeleton = Skeleton(model)
    assert all(torch.equal(skeleton.read(name), value) for name, value in original.items())


def test_a_family_off_the_interface_takes_the_plain_route_with_the_same_inputs(tmp_path: Path) -> None:
    model = made("BloomForCausalLM", tmp_path / "model", ALIBI)
    ctx = context(tmp_path / "graph", model)
    result = EXPORT.run(model, ctx)
    EXPORT.ensures(model, result.model, ctx)
    found = choose_lowering(model, ctx)
    assert (found.route, found.takes_batches) == ("plain", True)
    assert found.error <= TOLERANCE / 10
    assert "plain attention: fused: 0 of 2 attention layers use transformers' interface" in result.note
    runner = GraphRunner(result.model.folder, 1)
    assert list(runner.inputs)[:4] == ["input_ids", "seqlens_k", "total_sequence_length", "logits_positions"]
    assert [value.name for value in runner.graph.graph.output[:3]] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.slow
def test_a_family_exact_for_one_row_alone_says_so_in_its_signature(tmp_path: Path) -> None:
    # GPT-Neo cuts its own mask out of a table by the length of the longest row.
    model = made("GPTNeoForCausalLM", tmp_path / "model", LOCAL)
    ctx = context(tmp_path / "graph", model)
    result = EXPORT.run(model, ctx)
    EXPORT.ensures(model, result.model, ctx)  # of one row alone
    assert "one row at a time" in result.note
    runner = GraphRunner(result.model.folder, 1)
    assert not runner.takes_batches
    assert runner.inputs["past.0.key"].type.tensor_type.shape.dim[0].dim_value == 1


@pytest.mark.parametrize("architecture", ["DebertaV2ForSequenceClassification", "MPNetModel", "ElectraModel"])
def test_encoders_with_positions_of_their_own_are_exact(tmp_path: Path, architecture: str) -> None:
    found = way(architecture, tmp_path, DEBERTA if "Deberta" in architecture else ENCODER)
    assert found.error <= TOLERANCE / 10, f"{found.error:.1e}"


def test_state_that_is_no_keys_and_values_is_refused_before_any_work(tmp_path: Path) -> None:
    model = made("MambaForCausalLM", tmp_path / "model", {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2})
    with pytest.raises(PassError, match=r"MambaForCausalLM cannot be lowered .*keeps other state than keys and values"):
        EXPORT.admits(model, context(tmp_path / "work", model))


def test_a_rotary_embedding_that_switches_ends_the_context_where_it_would(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_type": "longrope", "rope_theta": 1e4}
    settings = {**LONG, "rope_scaling": factors}
    model = made("Phi3ForCausalLM", tmp_path / "model", settings)
    limit, reason = position_limit(model.config)
    assert limit == 64
    assert "longrope rotary embedding: the context ends at 64" in reason
    assert choose_lowering(model, context(tmp_path / "work", model)).error <= TOLERANCE / 10
    ids = torch.arange(1, limit + 1)[None]  # to the last position, torch's own switching code still agrees
    original = transformers.Phi3ForCausalLM.from_pretrained(model.folder).eval()
    skeleton = Skeleton(model)
    with skeleton.loaded(""), torch.inference_mode():
        held, own = skeleton.module(input_ids=ids).logits, original(input_ids=ids).logits
    assert torch.allclose(held, own, atol=1e-6)  # the same sums in float32


def test_rows_of_a_position_table_before_the_first_token_do_not_count(tmp_path: Path) -> None:
    model = made("RobertaModel", tmp_path, {**ENCODER, "max_position_embeddings": 34, "pad_token_id": 1})
    limit, reason = position_limit(model.config)
    assert limit == 32
    assert reason == "2 rows of its position table stand for no position"
    module = transformers.RobertaModel.from_pretrained(tmp_path)
    module(input_ids=torch.full((1, limit), 5))  # the longest text that transformers takes
    with pytest.raises((IndexError, RuntimeError)):
        module(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(("architecture", "settings", "limit"), [
    ("GPT2LMHeadModel", {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, 128),
    ("BloomForCausalLM", ALIBI, DEFAULT_CONTEXT),
])  # fmt: skip
def test_context_is_found_under_the_familys_own_name(
    tmp_path: Path, architecture: str, settings: dict[str, Any], limit: int
) -> None:
    assert position_limit(made(architecture, tmp_path, settings).config)[0] == limit


def test_layers_may_keep_heads_of_different_widths(tmp_path: Path) -> None:
    latent = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    settings = {**DECODER, **latent, **experts, "moe_intermediate_size": 32, "num_key_value_heads": 4}
    skeleton = Skeleton(made("DeepseekV3ForCausalLM", tmp_path, settings))
    kept = [(shape.heads, shape.key_width, shape.value_width) for shape in decoder_shapes(skeleton)]
    assert kept == [(1, 16, 8)] * 2  # the latent vector, and the part of the key that is rotated


def test_the_probe_asks_for_rows_of_different_lengths(tmp_path: Path) -> None:
    probe = Probe.random(made("BloomForCausalLM", tmp_path, ALIBI).config, seed=0)
    short, long = probe.ragged
    assert 1 < short < long < len(probe.ids)
    assert np.unique(probe.ids).size > 10


@dataclass(frozen=True, kw_only=True)
class FuseScale(GraphPass):
    """A fusion that is wrong: the scale of attention is off by a hundredth."""

    begins_at: ClassVar[tuple[str, ...]] = ("GroupQueryAttention",)

    def rewrite(self, node: ir.Node, graph: ir.Model, model: Model) -> str:
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.01 * node.attributes.get_float("scale"))
        return ""


def test_a_wrong_fusion_is_not_admitted_though_the_model_would_hide_it(tmp_path: Path) -> None:
    model = made("LlamaForCausalLM", tmp_path / "model", DECODER)  # at its initialisation: attention nearly uniform
    ctx = context(tmp_path / "graph", model)
    graph = EXPORT.run(model, ctx).model
    wrong = FuseScale().run(graph, context(tmp_path / "wrong", graph)).model
    assert graph_error(graph, wrong, ctx) < TOLERANCE
    with pytest.raises(PassError, match="fuse_scale: on a small twin of this architecture numbers moved by"):
        FuseScale().admits(model, ctx)


def test_a_fusion_that_finds_no_place_in_the_twin_is_admitted(tmp_path: Path) -> None:
    model = made("BertModel", tmp_path / "model", ENCODER)
    FuseScale().admits(model, context(tmp_path / "work", model))
