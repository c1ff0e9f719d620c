"""Trace a torch-stage model into an ONNX graph without its weights being in memory.

Parameters are expanded scalars while the graph is traced: full shape, no memory. Afterwards every initializer reads
its tensor from the stage's files when, and only when, the graph is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from passes._pooling import Pooling, encode, pooling_of
from passes._quantized import OPSET
from passes._skeleton import Skeleton
from passes.base import PassError

IR_VERSION = 11
GQA = "grouped_query_attention"
_DYNAMIC = torch.export.Dim.DYNAMIC


def trace_decoder(skeleton: Skeleton) -> ir.Model:
    """Return one graph for prefill, chunk and decode, with attention as `com.microsoft::GroupQueryAttention`.

    Raises:
        PassError: some attention layer of this family does not go through transformers' attention interface.
    """
    attention = _GroupedQueryAttention()
    AttentionInterface.register(GQA, attention)
    AttentionMaskInterface.register(GQA, _no_mask)
    skeleton.module.set_attn_implementation(GQA)
    graph = _Decoder(skeleton.module, attention)
    layers, heads, width = cache_shape(skeleton.module.config)
    batch, tokens = 2, 3
    past = [torch.zeros(batch, heads, 16, width) for _ in range(2 * layers)]
    arguments = (
        torch.zeros(batch, tokens, dtype=torch.int64),
        torch.full((batch,), tokens - 1, dtype=torch.int32),
        torch.tensor([tokens], dtype=torch.int32),
        torch.arange(5),
        past,
    )
    shapes: Any = (
        {0: _DYNAMIC, 1: _DYNAMIC},
        {0: _DYNAMIC},
        {},
        {0: _DYNAMIC},
        [{0: _DYNAMIC, 2: _DYNAMIC}] * len(past),
    )
    cache = [f"{layer}.{side}" for layer in range(layers) for side in ("key", "value")]
    inputs = ["input_ids", "seqlens_k", "total_sequence_length", "logits_positions", *(f"past.{x}" for x in cache)]
    model = _trace(skeleton, graph, arguments, shapes, inputs, ["logits", *(f"present.{x}" for x in cache)])
    if attention.layers_seen != set(range(layers)):
        raise PassError(
            f"export_onnx: {len(attention.layers_seen)} of {layers} attention layers of "
            f"{type(skeleton.module).__name__} use transformers' attention interface; the others cannot be lowered yet"
        )
    axes = {"input_ids": ["batch", "tokens"], "seqlens_k": ["batch"], "logits_positions": ["rows"]}
    for name in cache:
        axes[f"past.{name}"] = axes[f"present.{name}"] = ["batch", str(heads), "capacity", str(width)]
    _name_axes(model, axes | {"logits": ["rows", str(skeleton.module.config.vocab_size)]})
    return model


def trace_encoder(skeleton: Skeleton) -> ir.Model:
    """Return the graph of an encoder with dynamic batch and sequence.

    Its output is `logits`, `sentence_embedding` where the folder says how tokens are pooled, or `last_hidden_state`.
    """
    ids = torch.zeros(2, 5, dtype=torch.int64)
    mask = torch.ones(2, 5, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    arguments = [ids, mask]
    if getattr(skeleton.module.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
        arguments.append(torch.zeros(2, 5, dtype=torch.int64))
    graph = _Encoder(skeleton.module, names, pooling_of(skeleton.assets, skeleton.config))
    shapes = ([{0: _DYNAMIC, 1: _DYNAMIC}] * len(names),)
    model = _trace(skeleton, graph, (arguments,), shapes, names, [graph.output])
    axes = {name: ["batch", "tokens"] for name in names}
    width = model.graph.outputs[0].shape
    assert width is not None
    axes[graph.output] = [*["batch", "tokens"][: len(width) - 1], str(width[-1])]
    _name_axes(model, axes)
    return model


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Return layers, key/value heads and head width of a decoder's configuration.

    Raises:
        PassError: it is of another kind, such as a state-space model.
    """
    config = config.get_text_config(decoder=True)
    if not hasattr(config, "num_attention_heads"):
        raise PassError(
            f"export_onnx: {config.model_type} has no attention heads; only attention models can be lowered"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, width


class _GroupedQueryAttention:
    """The attention function that transformers calls while a decoder is traced."""

    def __init__(self) -> None:
        self.cache: _GraphCache | None = None
        self.layers_seen: set[int] = set()

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Emit the operator: query [B, H, T, E], key and value [B, K, T, E] -> [B, T, H, E]."""
        assert self.cache is not None
        B, H, T, E = query.shape
        K = key.shape[1]
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        past_key, past_value = self.cache.past[layer]
        attributes: dict[str, Any] = {
            "num_heads": H,
            "kv_num_heads": K,
            "scale": float(E**-0.5 if scaling is None else scaling),
            "local_window_size": int(sliding_window or -1),
            "softcap": float(softcap or 0),
        }
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (
                query.transpose(1, 2).reshape(B, T, H * E),
                key.transpose(1, 2).reshape(B, T, K * E),
                value.transpose(1, 2).reshape(B, T, K * E),
                past_key,
                past_value,
                self.cache.seqlens_k,
                self.cache.total,
            ),
            attributes,
            dtypes=(query.dtype, past_key.dtype, past_value.dtype),
            shapes=((B, T, H * E), past_key.shape, past_value.shape),
            version=1,
        )
        self.cache.present[layer] = present
        self.layers_seen.add(layer)
        return out.reshape(B, T, H, E), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: GroupQueryAttention masks by length and window itself."""


class _GraphCache(Cache):
    """Hands the graph's past tensors to the attention function, which appends to them inside the graph."""

    def __init__(self, past: Sequence[torch.Tensor], seqlens_k: torch.Tensor, total: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.past = list(zip(past[::2], past[1::2], strict=True))
        self.seqlens_k, self.total = seqlens_k, total
        self.present: dict[int, list[torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new keys and values alone: the operator joins them with the past."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come from `position_ids`, never from the cache."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Return sizes of a mask that is not made."""
        return 1, 0


class _Decoder(nn.Module):
    """A causal LM as the graph sees it: flat past in, logits of the named positions and flat present out."""

    def __init__(self, model: nn.Module, attention: _GroupedQueryAttention) -> None:
        super().__init__()
        self.wrapped, self.attention = model, attention

    def forward(
        self,
        input_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total: torch.Tensor,
        logits_positions: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        tokens = input_ids.shape[1]
        cache = self.attention.cache = _GraphCache(past, seqlens_k, total)
        start = (seqlens_k.to(torch.int64) + 1 - tokens).clamp(min=0)
        positions = start[:, None] + torch.arange(tokens)[None]
        head = self.wrapped.get_output_embeddings()  # type: ignore[operator]
        rows = head.register_forward_pre_hook(
            lambda _, hidden: (hidden[0].flatten(0, 1).index_select(0, logits_positions)[None], *hidden[1:])
        )
        with _removed_after(rows):
            out = self.wrapped(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.logits[0], [side for layer in sorted(cache.present) for side in cache.present[layer]]


class _Encoder(nn.Module):
    """An encoder as the graph sees it: named integer inputs in, one tensor out."""

    def __init__(self, model: nn.Module, names: Sequence[str], pooling: Pooling | None) -> None:
        super().__init__()
        self.wrapped, self.names, self.pooling = model, names, pooling
        classifies = type(model).__name__.endswith("ForSequenceClassification")
        self.output = "logits" if classifies else "sentence_embedding" if pooling else "last_hidden_state"

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return encode(self.wrapped, dict(zip(self.names, inputs, strict=True)), self.pooling)


def _trace(
    skeleton: Skeleton,
    graph: nn.Module,
    arguments: tuple[Any, ...],
    shapes: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> ir.Model:
    try:
        with _weightless(skeleton.module), _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # whatever an architecture nobody has tried makes torch raise
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        architecture = type(skeleton.module).__name__
        raise PassError(f"export_onnx: torch cannot trace {architecture}: {reason[:300]}") from error
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    _bind_weights(model, skeleton)
    return model


def _bind_weights(model: ir.Model, skeleton: Skeleton) -> None:
    """Give every initializer its own name of the checkpoint and the file to read it from."""
    graph = model.graph
    known = skeleton.tensors("")
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = value.name.removeprefix("wrapped.")
        if name in known:
            graph.initializers.pop(value.name)
            value.name = name
            value.const_value = lazy_tensor(skeleton, name)
            graph.initializers[name] = value
        elif value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)


def lazy_tensor(skeleton: Skeleton, name: str) -> ir.LazyTensor:
    """Return a tensor that is read, as float32 if it is floating point, each time it is looked at."""
    entry = skeleton.entries[skeleton.stored_name(name)]
    dtype = {"U8": ir.DataType.UINT8, "I8": ir.DataType.INT8}.get(entry.dtype, ir.DataType.FLOAT)

    def read() -> ir.TensorProtocol:
        return ir.Tensor(skeleton.read(name).numpy(), name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(entry.shape), name=name)


@contextmanager
def _weightless(module: nn.Module) -> Iterator[None]:
    """Have expanded scalars in the place of tensors on the meta device; shared tensors stay shared."""
    stand_ins: dict[int, torch.Tensor] = {}
    places: list[tuple[dict[str, Any], str, Any]] = []
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for leaf, value in table.items():
                if value is not None and value.is_meta:
                    if id(value) not in stand_ins:
                        scalar = torch.zeros((), dtype=value.dtype).expand(value.shape)
                        is_parameter = isinstance(value, nn.Parameter)
                        stand_ins[id(value)] = nn.Parameter(scalar, requires_grad=False) if is_parameter else scalar
                    places.append((table, leaf, value))
                    table[leaf] = stand_ins[id(value)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for table, leaf, value in places:
            table[leaf] = value


@contextmanager
def _removed_after(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks: what fails is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _name_axes(model: ir.Model, axes: dict[str, list[str]]) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in axes:
            value.shape = ir.Shape([int(axis) if axis.isdigit() else axis for axis in axes[value.name]])
