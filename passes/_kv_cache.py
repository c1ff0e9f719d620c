"""Keys and values in 8 bits: what attention then reads, and which range of them the integers cover.

onnxruntime's GroupQueryAttention writes round(x / scale) into an int8 cache, a scale for each channel of each key/value
head, and reads all of it from there, the tokens of the same run too. So what a token sees does not depend on how those
before it were cut into runs, and torch simulates it by rounding keys and values on their way into attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from passes._quantized import SMALLEST_RANGE, CacheSpec
from passes.base import PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._skeleton import Skeleton

CHILD = "kv_cache"
"""Of an attention layer: the module that its keys and values go through."""
LEAST, MOST = -128, 127

Side = Literal["key", "value"]
See = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
_Change = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Int8Cache(nn.Module):
    """Rounds keys and values [B, K, T, E] as the kernel does.

    Attributes:
        exact: whether it leaves them as they are.
    """

    key_scale: torch.Tensor
    value_scale: torch.Tensor

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__()
        self.exact = False
        for name, (shape, dtype) in spec.shapes().items():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what attention reads once these were written."""
        if self.exact:
            return key, value
        return rounded(key, self.key_scale), rounded(value, self.value_scale)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the multiples of `scale` that stand for `x`; the kernel multiplies by 1 / scale, which ties show."""
    return (x * (1 / scale)).round_().clamp_(LEAST, MOST).mul_(scale)


def round_caches(module: PreTrainedModel) -> None:
    """Let every attention layer that has a `kv_cache` read what that gives back."""

    def change(layer: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache: Int8Cache | None = getattr(layer, CHILD, None)
        return (key, value) if cache is None else cache(key, value)

    _attend_through(module, f"optimize_rounded_{module.config._attn_implementation}", change)


@contextmanager
def watching(module: PreTrainedModel, see: See) -> Iterator[None]:
    """Call `see(attention layer, key, value)`, [B, K, T, E] each, whenever a layer attends."""
    before = module.config._attn_implementation

    def change(layer: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        see(layer, key, value)
        return key, value

    _attend_through(module, "optimize_watched", change)
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def _attend_through(module: PreTrainedModel, name: str, change: _Change) -> None:
    """Let keys and values go through `change` before the attention that the module has now."""
    base = module.config._attn_implementation
    AttentionInterface.register(name, partial(_attend, base, change))
    mask: Any = AttentionMaskInterface._global_mapping[base]
    AttentionMaskInterface.register(name, mask)
    module.set_attn_implementation(name)


def _attend(
    base: str,
    change: _Change,
    layer: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *others: Any,
    **options: Any,
) -> Any:
    return _attention(base, layer)(layer, query, *change(layer, key, value), *others, **options)


def _attention(name: str, layer: nn.Module) -> Callable[..., Any]:
    """Return an implementation by its name; the eager one is the family's own."""
    if name == "eager":
        return sys.modules[type(layer).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return AttentionInterface._global_mapping[name]  # type: ignore[no-any-return]


# ---- ranges


def find_scales(
    skeleton: Skeleton, layers: Sequence[str], texts: Sequence[Sequence[int]]
) -> dict[str, dict[Side, torch.Tensor]]:
    """Return attention layer -> scales [K, 1, E] of its keys and values: the largest magnitude of each channel is 127.

    Args:
        skeleton: the model.
        layers: names of the attention layers.
        texts: token ids that the model is run on.

    Raises:
        PassError: a key or value is not finite, or no text reached a layer.
    """
    from passes._walk import walk_over

    names = {id(skeleton.module.get_submodule(layer)): layer for layer in layers}
    peaks: dict[str, dict[Side, torch.Tensor]] = {}

    def see(layer: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        if id(layer) in names:
            own = peaks.setdefault(names[id(layer)], {})
            for side, x in _sides(key, value):
                peak = x.abs().amax((0, 2))[:, None]  # [K, 1, E]
                own[side] = torch.maximum(own[side], peak) if side in own else peak

    with watching(skeleton.module, see):
        walk_over(skeleton, texts)
    for layer in layers:
        if layer not in peaks:
            raise PassError(f"{layer}: no calibration text reached it; exclude it")
        for side, peak in peaks[layer].items():
            if not peak.isfinite().all():
                raise PassError(f"{layer}: a {side} is NaN or infinite; this model cannot be calibrated")
    return {layer: {side: _scale(peak) for side, peak in peaks[layer].items()} for layer in layers}


def _sides(key: torch.Tensor, value: torch.Tensor) -> tuple[tuple[Side, torch.Tensor], ...]:
    return ("key", key), ("value", value)


def _scale(peak: torch.Tensor) -> torch.Tensor:
    """Return the scale that makes `peak` the largest integer; a channel of nothing but zeros keeps them at any."""
    return torch.where(peak > SMALLEST_RANGE, peak / MOST, 1.0)
