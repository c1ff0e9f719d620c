"""From the vectors of a text's tokens to one vector, in torch: the walk and the graph share this code.

Batches are right-padded: a text's tokens are the first of its row, as the attention mask says.
Source: sentence-transformers' Pooling and Normalize; Reimers & Gurevych 2019 (arXiv:1908.10084).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes._sentence import Mode, SentenceSettings, sentence_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_LENGTH = 1e-12


def pooling_of(assets: Path, config: Mapping[str, Any]) -> Pooling | None:
    """Return how an embedder pools; None for another kind of model, or one that does not say."""
    settings = sentence_settings(assets, config)
    return Pooling(settings) if settings else None


class Pooling(nn.Module):
    """Hidden states [B, T, D] and an attention mask [B, T] in, one vector per text [B, D * modes] out."""

    def __init__(self, settings: SentenceSettings) -> None:
        super().__init__()
        self.modes, self.normalized = settings.pooling, settings.normalized

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool by every mode, side by side, and scale to length 1 where that was asked for."""
        pooled = torch.cat([_MODES[mode](hidden, mask) for mode in self.modes], dim=-1)
        return nn.functional.normalize(pooled, dim=-1, eps=SMALLEST_LENGTH) if self.normalized else pooled


def has_token_types(module: PreTrainedModel) -> bool:
    """Return whether an encoder is told which of two texts each token belongs to."""
    return (getattr(module.config, "type_vocab_size", None) or 0) > 1


def encode(module: nn.Module, feed: Mapping[str, torch.Tensor], pooling: Pooling | None) -> torch.Tensor:
    """Return an encoder's answer to named inputs [B, T]: logits [B, labels], vectors [B, W], or hidden states."""
    out = module(**feed)
    if hasattr(out, "logits"):
        logits: torch.Tensor = out.logits
        return logits
    hidden: torch.Tensor = out.last_hidden_state
    return hidden if pooling is None else pooling(hidden, feed["attention_mask"])


def _first(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    index = (mask.sum(dim=1) - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])  # [B, 1, D]
    return hidden.gather(1, index)[:, 0]


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1)


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _weighted(hidden, mask.to(hidden.dtype))


def _mean_sqrt_len(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _mean(hidden, mask) * mask.sum(dim=1, keepdim=True).to(hidden.dtype).sqrt()


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weigh the i-th token by i, counted from 1 (arXiv:2202.08904)."""
    return _weighted(hidden, (mask * mask.cumsum(dim=1)).to(hidden.dtype))


def _weighted(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (hidden * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)


_MODES: Mapping[Mode, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
