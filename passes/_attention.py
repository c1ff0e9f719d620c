"""Two routes by which a decoder's attention becomes part of a graph, with the same inputs and outputs.

`fused`: transformers' attention interface hands query, key and value of every layer to a function that emits one
    `com.microsoft::GroupQueryAttention`, which also masks and keeps the cache. Fast; for families that go through the
    interface and whose attention is what the operator computes.
`plain`: the family's own eager attention is traced; new keys and values are scattered into the cache, and the mask is
    what the family's own rule says of the positions. Exact for any family that asks a `Cache` for keys and values;
    slower, since scores and masks are tensors of their own.

Neither is believed: `export_onnx` compares each with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from passes._exact import CACHE_SCALES
from passes._kind import first_line
from passes._kv_cache import CHILD, Int8Cache
from passes.base import PassError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FUSED_NAME = "optimize_fused"
ROUTES = ("fused", "plain")


@dataclass(frozen=True)
class CacheShape:
    """What one layer keeps of a token: `heads` keys of `key_width` and values of `value_width` numbers."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Step:
    """The inputs of one run of a decoder graph that attention needs.

    Attributes:
        positions: of every token in its row, int64 [B, T].
        seqlens_k: real tokens of each row after this step, minus one, int32 [B].
        total: the largest of them plus one, int32 [1].
        past: key and value of each layer in turn, float32 or int8 [B, K, capacity, E].
    """

    positions: torch.Tensor
    seqlens_k: torch.Tensor
    total: torch.Tensor
    past: Sequence[torch.Tensor]


class Route(Protocol):
    """One way to trace attention."""

    def installed(self, module: PreTrainedModel) -> Any:
        """Return a context in which `module` takes this route."""

    def begin(self, step: Step) -> Any:
        """Return the cache to hand to the model for one run."""

    def present(self) -> list[torch.Tensor]:
        """Return key and value of each layer in turn after the run."""


def cache_shapes(module: PreTrainedModel) -> list[CacheShape]:
    """Return what each layer of a decoder keeps, found by running two tokens up to the head.

    Raises:
        PassError: some layer keeps another state than keys and values, or layers share what they keep.
    """
    name = type(module).__name__
    require_keys_and_values(name, module.config)
    cache = _Recorder(config=module.config)
    hook = _head(module).register_forward_pre_hook(_stop)
    try:
        module(input_ids=torch.zeros(1, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    except _HeadReached:
        pass
    except Exception as error:  # a family whose forward pass asks for more, or for another cache
        raise PassError(f"export_onnx: {name} does not run on token ids and a cache: {first_line(error)}") from error
    finally:
        hook.remove()
    if sorted(cache.seen) != list(range(len(cache.seen))) or not cache.seen:
        raise PassError(
            f"export_onnx: the layers of {name} that keep keys and values are {sorted(cache.seen)}, "
            "expected 0, 1, 2, ...; a layer that reads another layer's cache cannot be lowered"
        )
    return [cache.seen[layer] for layer in range(len(cache.seen))]


def require_keys_and_values(name: str, config: PreTrainedConfig) -> None:
    """Refuse a decoder whose configuration says that some layer keeps another state, such as a recurrence's.

    Args:
        name: its class, for the message.
        config: its configuration; what that does not say, only a run of the model can tell.

    Raises:
        PassError: names the kinds of state.
    """
    if other := _Recorder(config=config).other:
        raise PassError(
            f"export_onnx: {name} keeps other state than keys and values: {other}, which cannot be lowered yet"
        )


def _head(module: PreTrainedModel) -> nn.Module:
    head = module.get_output_embeddings()
    if head is None:
        raise PassError(f"export_onnx: {type(module).__name__} has no output head that can be found")
    return head  # type: ignore[no-any-return]


class _HeadReached(Exception):
    """Ends a run whose logits nobody wants."""


def _stop(*_: Any) -> None:
    raise _HeadReached


class _Recorder(DynamicCache):
    """Notes what every layer keeps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, CacheShape] = {}
        kinds = zip(self.layers, self.is_linear, strict=True)
        self.other = ", ".join(sorted({type(layer).__name__ for layer, is_linear in kinds if is_linear}))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the shapes and keep the tensors."""
        self.seen[layer_idx] = CacheShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Fused:
    """Emits one GroupQueryAttention per layer."""

    def __init__(self, shapes: Sequence[CacheShape]) -> None:
        if any(shape.key_width != shape.value_width for shape in shapes):
            raise PassError("export_onnx: keys and values differ in width, which GroupQueryAttention does not take")
        self._shapes = shapes
        self._cache: _FusedCache | None = None

    @contextmanager
    def installed(self, module: PreTrainedModel) -> Iterator[None]:
        """Make the attention interface call this object."""
        AttentionInterface.register(FUSED_NAME, self._attend)
        AttentionMaskInterface.register(FUSED_NAME, _no_mask)
        before = module.config._attn_implementation
        module.set_attn_implementation(FUSED_NAME)
        try:
            yield
        finally:
            module.set_attn_implementation(before)

    def begin(self, step: Step) -> Any:
        """Return a cache that leaves keys and values to the operator."""
        self._cache = _FusedCache(step)
        return self._cache

    def present(self) -> list[torch.Tensor]:
        """Return what the operators kept.

        Raises:
            PassError: some layer did not call the interface.
        """
        assert self._cache is not None
        return self._cache.sides(len(self._shapes), "use transformers' interface")

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Emit the operator: query [B, H, T, E], key and value [B, K, T, E] -> [B, T, H, E]."""
        assert self._cache is not None
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        sinks = others.pop("s_aux", None)
        _require_plain_causal(module, layer, attention_mask, others)
        B, H, T, E = query.shape
        K = key.shape[1]
        past_key, past_value = self._cache.past[layer]
        inputs: list[torch.Tensor | None] = [
            query.transpose(1, 2).reshape(B, T, H * E),
            key.transpose(1, 2).reshape(B, T, K * E),
            value.transpose(1, 2).reshape(B, T, K * E),
            past_key,
            past_value,
            self._cache.step.seqlens_k,
            self._cache.step.total,
        ]
        if sinks is not None:
            inputs += [None, None, None, None, sinks]  # cos_cache, sin_cache, position_ids, attention_bias, head_sink
        cache: Int8Cache | None = getattr(module, CHILD, None)
        if cache is not None:
            inputs += [None] * (CACHE_SCALES - len(inputs)) + [cache.key_scale, cache.value_scale]
        attributes: dict[str, Any] = {
            "num_heads": H,
            "kv_num_heads": K,
            "scale": float(E**-0.5 if scaling is None else scaling),
            "local_window_size": int(sliding_window or -1),
            "softcap": float(softcap or 0),
        }
        if cache is not None:
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(query.dtype, past_key.dtype, past_value.dtype),
            shapes=((B, T, H * E), past_key.shape, past_value.shape),
            version=1,
        )
        self._cache.present[layer] = present
        return out.reshape(B, T, H, E), None


_HARMLESS = {"dropout", "is_causal", "output_attentions", "position_ids", "use_cache", "cache_position", "layer_idx"}


def _require_plain_causal(module: nn.Module, layer: int, mask: torch.Tensor | None, others: dict[str, Any]) -> None:
    """Refuse what the operator would silently leave out."""
    if mask is not None:
        raise PassError(f"layer {layer} adds a mask or bias of its own to its scores")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise PassError(f"layer {layer} is not causal")
    unknown = sorted(key for key, value in others.items() if isinstance(value, torch.Tensor) and key not in _HARMLESS)
    if unknown:
        raise PassError(f"layer {layer} hands {unknown[0]} to its attention, which GroupQueryAttention does not know")


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: GroupQueryAttention masks by length and window itself."""


class _GraphCache(Cache):
    """What both routes tell a model about its cache."""

    def __init__(self, step: Step) -> None:
        super().__init__(layers=[])
        self.step = step
        self.past = list(zip(step.past[::2], step.past[1::2], strict=True))
        self.present: dict[int, list[torch.Tensor]] = {}

    def sides(self, layers: int, expected: str) -> list[torch.Tensor]:
        """Return key and value of each layer in turn; refuse when some layer left none."""
        if set(self.present) != set(range(layers)):
            raise PassError(f"{len(self.present)} of {layers} attention layers {expected}")
        return [side for layer in range(layers) for side in self.present[layer]]


class _FusedCache(_GraphCache):
    """Hands new keys and values through: the operator joins them with the past."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new keys and values alone."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come from `position_ids`, never from the cache."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Return sizes of a mask that is not made."""
        return 1, 0


class Plain:
    """Traces the family's own eager attention over the whole cache."""

    def __init__(self, shapes: Sequence[CacheShape]) -> None:
        self._shapes = shapes
        self._cache: _PlainCache | None = None

    @contextmanager
    def installed(self, module: PreTrainedModel) -> Iterator[None]:
        """Build masks by the positions of this graph, for whatever the family calls `eager`."""
        before, mapping = module.config._attn_implementation, AttentionMaskInterface._global_mapping
        original = mapping["eager"]
        module.set_attn_implementation("eager")
        mapping["eager"] = self._mask
        try:
            yield
        finally:
            mapping["eager"] = original
            module.set_attn_implementation(before)

    def begin(self, step: Step) -> Any:
        """Return a cache that writes into the past in place."""
        self._cache = _PlainCache(step)
        return self._cache

    def present(self) -> list[torch.Tensor]:
        """Return the past with the new tokens in it.

        Raises:
            PassError: some layer did not ask the cache.
        """
        assert self._cache is not None
        return self._cache.sides(len(self._shapes), "use the cache they are given")

    def _mask(
        self, *_: Any, mask_function: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32, **__: Any
    ) -> torch.Tensor:
        """Return what to add to the scores, [B, 1, T, total]: 0 where the family's rule lets a token see a key."""
        assert self._cache is not None
        queries = self._cache.step.positions
        rows = torch.arange(queries.shape[0])[:, None, None, None]
        heads = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        keys = torch.arange(self._cache.length)[None, None, None, :]
        seen = mask_function(rows, heads, queries[:, None, :, None], keys)
        seen = seen & (keys <= queries[:, None, :, None])
        return torch.where(seen, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


class _PlainCache(_GraphCache):
    """Scatters new keys and values into the past and returns the part that is in use."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        capacity = step.past[0].shape[2]
        self.length: Any = step.total[0].item()  # symbolic while it is traced
        torch._check(self.length >= 1)
        torch._check(self.length <= capacity)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values up to the longest row's end."""
        places = self.step.positions[:, None, :, None]
        present = [
            past.scatter(2, places.expand(new.shape), new)
            for past, new in zip(self.past[layer_idx], (key_states, value_states), strict=True)
        ]
        self.present[layer_idx] = present
        key, value = (side.narrow(2, 0, self.length) for side in present)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return the first row's length before this step."""
        return self.step.positions[0, 0]

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[Any, int]:
        """Return the number of keys a layer sees, from position 0."""
        return self.length, 0


def attention_of(route: str) -> str:
    """Return the attention implementation a module must be built with to take a route ("" for an encoder)."""
    return "eager" if route == "plain" else "sdpa"


def route(name: str, shapes: Sequence[CacheShape]) -> Route:
    """Return the route of this name."""
    return Fused(shapes) if name == "fused" else Plain(shapes)
