"""A shrunken twin of a model: the same architecture, small, with weights that make small errors large.

On a default-initialised model a 1 % error in the attention scale moves the logits by 5e-5 of their range: attention is
nearly uniform there, so nothing that goes wrong in it shows. The twin's query and key weights are 20 times larger, its
biases and norms are not at rest, its window and position limits are small, and the sequence crosses all of them.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes._attention import ROUTES, attention_of
from passes._graph import save_graph
from passes._kind import SWITCHING_ROPES, architecture_of, first_line, kind_of, typed_config
from passes._lower import lower
from passes._parity import Array, GraphRunner, Probe, range_error
from passes._pooling import pooling_of
from passes._quantized import write_specs
from passes._safetensors import SINGLE_NAME, write_safetensors
from passes._skeleton import Skeleton, build_module
from passes.base import ONNX, TORCH, Context, GraphPass, Model, PassError

WINDOW = 6
CONTEXT = 64
TOLERANCE = 1e-4
"""Largest error over the range of the reference's logits. Float32 rounding in another order gives 1e-7 to 1e-6 here;
a 1 % error in the attention scale gives more than 1e-3 on the twin (tests/passes/test_twin.py plants it)."""
VOCABULARY = 256
WIDTH = 16
EXPERTS = 8
SPLITS = (5, 1, 4, 1, 7, 1, 1, 13, 1, 14)
"""Prefill, decode and chunks: 48 tokens, crossing the window and every scaled position limit on each kind of step."""
SHARPEN = 20.0


def twin_configs(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield configurations of a twin, the one to try first first: small, and for families that do not take it, wide.

    Both have every kind of layer once, a small vocabulary, few experts, and position limits scaled down; the wide one
    keeps the widths of the model itself.
    """
    typed = typed_config(config)
    names = dict(type(typed).attribute_map)
    full = {**typed.to_dict(), "architectures": list(config["architectures"])}
    context = int(full.get(names.get("max_position_embeddings", "max_position_embeddings")) or CONTEXT)
    full = _with_sizes(full, names, {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT})
    full = _with_few_layers(full, names.get("num_hidden_layers", "num_hidden_layers"))
    full = _with_scaled_rope(full, context)
    full = {key: _small(key, value) for key, value in full.items()}
    yield _with_sizes(full, names, _widths(full, names))
    yield full


def _small(key: str, value: Any) -> Any:
    """Return a limit of a window, a number of experts or a special token's id that fits a small sequence."""
    if key.endswith(("token_id", "token_ids", "token_index")):
        return [0] if isinstance(value, list) else value if value is None else 0
    if type(value) is not int or value <= 0:
        return value
    if any(word in key for word in ("window", "chunk_size", "local_attention")):
        return min(value, WINDOW)
    if "vocab_size" in key:
        return VOCABULARY
    return min(value, _MOST.get(key, value))


_MOST = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    "position_buckets": 8,
}
"""Numbers of experts, of those asked, of leading dense layers and of distances told apart that fit a small twin."""


def _widths(full: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """Return small widths that keep how many query heads share a key/value head, up to three."""
    heads = int(full.get(names.get("num_attention_heads", "num_attention_heads")) or 4)
    kv_heads = int(full.get(names.get("num_key_value_heads", "num_key_value_heads")) or heads)
    group = min(heads // kv_heads, 3) if heads % kv_heads == 0 else 1
    hidden = 2 * group * WIDTH
    sizes = {
        "num_attention_heads": 2 * group,
        "num_key_value_heads": 2 if kv_heads < heads else 2 * group,
        "head_dim": WIDTH,
        "hidden_size": hidden,
    }
    for key in full:
        if key.endswith(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "dim_ff")):
            sizes[key] = 96
        elif key in ("embedding_size", "word_embed_proj_dim"):
            sizes[key] = hidden
    if full.get("qk_rope_head_dim"):  # latent attention: what is rotated, what is not, and values differ in width
        sizes |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "qk_head_dim": 24}
        sizes |= {"kv_lora_rank": 16, "q_lora_rank": 24}
        sizes["head_dim"] = next((sizes[key] for key in _LATENT if full.get(key) == full.get("head_dim")), WIDTH)
    return sizes | {"rotary_dim": WIDTH // 2}


_LATENT = ("qk_rope_head_dim", "qk_head_dim", "v_head_dim")


def _with_sizes(full: Mapping[str, Any], names: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration with sizes under the names its family has for them; what it has not stays out."""
    named = {names.get(name, name): size for name, size in sizes.items()}
    return {**full, **{name: size for name, size in named.items() if full.get(name) is not None}}


def _with_few_layers(full: Mapping[str, Any], depth: str) -> dict[str, Any]:
    """Return the configuration with the first layer of each kind, two at least, as its per-layer settings tell kinds.

    Layers that share what an earlier one of their kind keeps come once more, at the end.
    """
    count, kept = int(full.get(depth) or 2), first_of_each(kinds_of_layers(full, depth))
    if full.get("num_kv_shared_layers"):
        return {**with_layers(full, depth, kept * 2), "num_kv_shared_layers": len(kept)}
    return with_layers(full, depth, kept if len(kept) > 1 else list(range(min(2, count))))


def kinds_of_layers(full: Mapping[str, Any], depth: str) -> list[str]:
    """Return what tells each layer from those of other kinds: the per-layer settings of a configuration.

    Args:
        full: the configuration.
        depth: what its family calls the number of layers.
    """
    settings = [value for value in _per_layer(full, depth).values() if not _are_numbers_of_layers(value)]
    return [repr([value[layer] for value in settings]) for layer in range(int(full.get(depth) or 2))]


def first_of_each(kinds: Sequence[Any]) -> list[int]:
    """Return the places at which a kind comes for the first time."""
    return [place for place, kind in enumerate(kinds) if kind not in kinds[:place]]


def with_layers(full: Mapping[str, Any], depth: str, kept: Sequence[int]) -> dict[str, Any]:
    """Return the configuration of a model that has, of all layers, those of `kept`, in that order."""
    few: dict[str, Any] = {}
    for key, value in _per_layer(full, depth).items():
        if not isinstance(full[key], list):
            few[key] = {place: value[layer] for place, layer in enumerate(kept) if value[layer] is not None}
        elif _are_numbers_of_layers(value):
            few[key] = list(range(len(kept)))
        else:
            few[key] = [value[layer] for layer in kept]
    return {**full, depth: len(kept), **few}


def _per_layer(full: Mapping[str, Any], depth: str) -> dict[str, list[Any]]:
    """Return the settings that have a value for each layer."""
    count = int(full.get(depth) or 2)
    mappings = {key: _by_layer(full[key], count) for key in full.keys() - {"id2label"} if _by_layer(full[key], count)}
    return {key: value for key, value in full.items() if isinstance(value, list) and len(value) == count > 1} | mappings


def _are_numbers_of_layers(values: list[Any]) -> bool:
    """Tell a list that names layers from one that has a setting for each."""
    return all(type(value) is int for value in values) and len(set(values)) == len(values)


def _by_layer(value: Any, count: int) -> list[Any]:
    """Return a mapping of layer number -> setting as a list with None elsewhere; empty for anything else."""
    if not isinstance(value, dict) or not value or not all(str(key).isdecimal() for key in value):
        return []
    settings = {int(key): entry for key, entry in value.items()}
    return [settings.get(layer) for layer in range(count)]


def _with_scaled_rope(full: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return the configuration with the position limits of rotary embeddings scaled as the context was."""

    def scaled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        limit = "original_max_position_embeddings"
        inner = {key: scaled(entry) for key, entry in value.items()}
        if value.get("rope_type") in SWITCHING_ROPES:
            return inner | {limit: CONTEXT}  # what comes after it is out of bounds
        return inner | {limit: max(8, int(value[limit]) * CONTEXT // context)} if value.get(limit) else inner

    return {key: scaled(value) if key.startswith("rope") else value for key, value in full.items()}


def make_twin(model: Model, folder: Path, seed: int) -> Model:
    """Write the twin of `model` into `folder` and return it, at stage torch.

    Raises:
        PassError: transformers builds or runs none of the configurations.
    """
    reason: Exception | None = None
    for config in twin_configs(model.config):
        try:
            module = build_module(config, "eager")
            weights = _hard_weights(module, torch.Generator().manual_seed(seed))
            write_safetensors(folder / SINGLE_NAME, weights)
            write_specs(folder, {})
            twin = replace(model, stage=TORCH, folder=folder, config=config)
            _answer(twin, seed)
        except Exception as error:  # a configuration nobody has tried to shrink
            reason = reason or error
        else:
            return twin
    raise PassError(f"export_onnx: no small twin of this architecture can be made: {first_line(reason)}") from reason


@dataclass(frozen=True)
class Lowering:
    """How the graph of one architecture is made, as its twin has shown.

    Attributes:
        route: of a decoder's attention; "" for an encoder.
        takes_batches: whether rows of different lengths can share a run; else the graph takes one row.
        error: of the twin's graph over the range of torch's logits.
        nodes: of the twin's graph.
        note: why it is not a better one, or "".
    """

    route: str
    takes_batches: bool
    error: float
    nodes: int
    note: str = ""


def choose_lowering(model: Model, ctx: Context) -> Lowering:
    """Return the first way to lower this architecture that is exact on its twin, fused attention before plain.

    Raises:
        PassError: none is; the message has the reason of each.
    """
    return _lowered_twin(model, ctx).way


def fusion_error(fusion: GraphPass, model: Model, ctx: Context) -> float:
    """Return how far a fusion moves the answers of the twin's graph; 0 where it finds no place in it.

    A trained model may hide what a wrong fusion does, and a model at its initialisation does: its attention is nearly
    uniform. The twin's is not.
    """
    lowered = _lowered_twin(model, ctx)
    graph = replace(lowered.twin, stage=ONNX)
    with tempfile.TemporaryDirectory(prefix="optimize-twin-") as folder:
        inner = replace(ctx, workdir=Path(folder))
        try:
            after = fusion.run(graph, inner).model
        except PassError:  # no place fits: the pass itself says so of the model, where it counts
            return 0.0
        probe = Probe.random(lowered.twin.config, ctx.seed, SPLITS)
        want = probe.graph(graph.folder, ctx.threads)
        return range_error(probe.graph(after.folder, ctx.threads), want)


@dataclass(frozen=True)
class _LoweredTwin:
    """A twin and the graph beside its weights; their folder goes with this object."""

    twin: Model
    way: Lowering

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.twin.folder, ignore_errors=True)


def _lowered_twin(model: Model, ctx: Context) -> _LoweredTwin:
    return _lower_twin(json.dumps(dict(model.config), sort_keys=True), model.assets, ctx.seed, ctx.threads)


@lru_cache(maxsize=4)
def _lower_twin(config: str, assets: Path, seed: int, threads: int) -> _LoweredTwin:
    model = Model(TORCH, assets, assets, json.loads(config))
    routes = ROUTES if kind_of(model.config) == "decoder" else ("",)
    folder = Path(tempfile.mkdtemp(prefix="optimize-twin-"))
    refusals: list[str] = []
    try:
        twin = make_twin(model, folder, seed)
        for route in routes:
            way, reason = _try(twin, route, seed, threads)
            refusals += [reason] if reason else []
            if way is not None:
                return _LoweredTwin(twin, replace(way, note="; ".join(refusals)))
        raise PassError(
            f"export_onnx: {architecture_of(model.config)} cannot be lowered exactly (expected at most {TOLERANCE:.0e} "
            f"of the logits' range on a small twin): {'; '.join(refusals)}"
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _try(twin: Model, route: str, seed: int, threads: int) -> tuple[Lowering | None, str]:
    """Return how the twin is lowered by one route, if it is, and what is not as one would wish."""
    try:
        graph = lower(Skeleton(twin, attention_of(route)), route)
        save_graph(graph, twin.folder)
        alone, batched = twin_errors(twin, twin.folder, seed, threads)
    except PassError as error:
        reason = str(error).removeprefix("export_onnx: ")
        return None, f"{route}: {reason}" if route else reason
    if not alone <= TOLERANCE:
        return None, f"{route or 'its graph'}: differs from torch by {alone:.1e} of the logits' range"
    nodes = len(list(graph.graph))
    if not batched <= TOLERANCE:
        remark = "rows of different lengths in one run disturb each other: one row at a time"
        save_graph(lower(Skeleton(twin, attention_of(route)), route, takes_batches=False), twin.folder)
        return Lowering(route, False, alone, nodes), remark
    return Lowering(route, True, max(alone, batched), nodes), ""


def twin_errors(twin: Model, graph: Path, seed: int, threads: int) -> tuple[float, float]:
    """Return the errors of the graph in folder `graph` against torch's eager attention on the twin.

    The first is of rows run alone (an encoder: of its batch), the second of rows of different lengths run together.
    """
    probe, want = _answer(twin, seed)
    runner, count = GraphRunner(graph, threads), len(probe.ids)
    if not count:
        return range_error(probe.graph(graph, threads), want), 0.0
    alone = range_error(runner.decode(probe.ids, probe.splits), want[:count])
    try:
        return alone, range_error(runner.decode_batch(probe.ids, probe.ragged), want[count:])
    except PassError:  # shapes that fit one row only
        return alone, math.inf


def _answer(twin: Model, seed: int) -> tuple[Probe, Array]:
    """Return what the twin is asked, and torch's answer."""
    probe = Probe.random(twin.config, seed, SPLITS)
    skeleton = Skeleton(twin, attention="eager")
    pooling = pooling_of(twin.assets, twin.config)
    with skeleton.loaded(""), torch.inference_mode():
        return probe, probe.torch(skeleton.module, pooling)


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
    stored = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in stored:
            noise = 0.1 * torch.randn(buffer.shape, generator=generator)
            weights[name] = buffer + noise if buffer.is_floating_point() else buffer.clone()
    return weights


_QUERY_KEY = {"q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "query_proj", "key_proj", "q", "k"}
