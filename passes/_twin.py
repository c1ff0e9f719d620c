"""A shrunken twin of a model: the same architecture, small, with weights that make small errors large.

On a default-initialised model a 1 % error in the attention scale moves the logits by 5e-5 of their range: attention is
nearly uniform there, so nothing that goes wrong in it shows. The twin's query and key weights are 20 times larger, its
biases and norms are not at rest, its window and position limits are small, and the sequence crosses all of them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes._graph import save_graph
from passes._lower import lower
from passes._parity import Probe, range_error
from passes._pooling import pooling_of
from passes._safetensors import SINGLE_NAME, write_safetensors
from passes._skeleton import Skeleton, build_module
from passes.base import TORCH, Context, Model, PassError

WINDOW = 6
CONTEXT = 64
VOCABULARY = 256
SPLITS = (5, 1, 4, 1, 7, 1, 1, 13, 1, 14)
"""Prefill, decode and chunks: 48 tokens, crossing the window and every scaled position limit on each kind of step."""
SHARPEN = 20.0


def twin_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the twin: every kind of layer, small sizes, limits scaled down."""
    twin = dict(config)
    heads = int(config.get("num_attention_heads", 4))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    group = min(heads // kv_heads, 3) if heads % kv_heads == 0 else 1
    width = 16
    twin |= {"num_attention_heads": 2 * group, "hidden_size": 2 * group * width, "vocab_size": VOCABULARY}
    _set_if_present(twin, "num_key_value_heads", 2 if kv_heads < heads else 2 * group)
    _set_if_present(twin, "head_dim", width)
    _set_if_present(twin, "intermediate_size", 96)
    _set_if_present(twin, "sliding_window", WINDOW)
    _set_if_present(twin, "max_position_embeddings", CONTEXT)
    _keep_layer_kinds(twin)
    _scale_rope(twin, int(config.get("max_position_embeddings") or CONTEXT))
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if twin.get(token) is not None:
            twin[token] = 0
    return twin


def make_twin(model: Model, folder: Path, seed: int) -> Model:
    """Write the twin of `model` into `folder` and return it, at stage torch."""
    config = twin_config(model.config)
    module = build_module(config, "sdpa")
    weights = _hard_weights(module, torch.Generator().manual_seed(seed))
    write_safetensors(folder / SINGLE_NAME, weights)
    return replace(model, stage=TORCH, folder=folder, config=config)


def twin_error(model: Model, ctx: Context) -> float:
    """Lower the twin as the model is lowered; return the error of its graph over the range of torch's logits."""
    folder = ctx.workdir / "twin"
    folder.mkdir(exist_ok=True)
    try:
        try:
            twin = make_twin(model, folder, ctx.seed)
        except Exception as error:  # a configuration nobody has tried to shrink
            raise PassError(f"export_onnx: no small twin of this architecture can be made: {error}") from error
        save_graph(lower(Skeleton(twin)), folder)
        return compare(twin, folder, ctx)
    finally:
        shutil.rmtree(folder)


def compare(twin: Model, graph: Path, ctx: Context) -> float:
    """Return the error of the graph in folder `graph` against torch's eager attention on the twin."""
    probe = Probe.random(twin.config, ctx.seed, SPLITS)
    skeleton = Skeleton(twin, attention="eager")
    pooling = pooling_of(twin.assets, twin.config)
    with skeleton.loaded(""), torch.inference_mode():
        want = probe.torch(skeleton.module, pooling)
    return range_error(probe.graph(graph, ctx.threads), want)


def _hard_weights(module: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return weights of unit gain, sharpened queries and keys, and norms and biases away from their rest values."""
    attention = {
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and name.rpartition(".")[2] in _QUERY_KEY
    }
    weights: dict[str, torch.Tensor] = {}
    shared: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in shared:
            continue
        shared.add(id(parameter))
        layer, _, leaf = name.rpartition(".")
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            weights[name] = 0.2 * noise + (1.0 if leaf == "weight" else 0.0)
        else:
            gain = 0.02 * math.sqrt(parameter.shape[-1]) * SHARPEN if layer in attention else 1.0
            weights[name] = noise * gain / math.sqrt(parameter.shape[-1])
    return weights


_QUERY_KEY = {"q_proj", "k_proj", "query", "key", "q_lin", "k_lin"}


def _keep_layer_kinds(twin: dict[str, Any]) -> None:
    """Keep the first layer of each kind, two layers at least."""
    kinds = twin.get("layer_types")
    if kinds:
        kept = list(dict.fromkeys(kinds))
        twin["layer_types"] = kept if len(kept) > 1 else kept * 2
    layers = len(twin["layer_types"]) if kinds else 2
    twin["num_hidden_layers"] = layers


def _scale_rope(twin: dict[str, Any], context: int) -> None:
    """Scale position limits of a rotary embedding as the context was scaled."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = twin.get(key)
        if isinstance(rope, dict) and rope.get("original_max_position_embeddings"):
            scaled = max(8, int(rope["original_max_position_embeddings"]) * CONTEXT // context)
            twin[key] = rope | {"original_max_position_embeddings": scaled}


def _set_if_present(twin: dict[str, Any], key: str, value: int) -> None:
    if twin.get(key) is not None:
        twin[key] = value
