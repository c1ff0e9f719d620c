"""Greedy decoding for scoring: the most likely token, the lowest id on a tie, until the caller says that it is done.

On the torch walk the whole loop is one traveller: it calls the model again and again with the cache it keeps, stops
where each call is about to enter a block like any other forward pass, and moves on when that block is there. So a token
costs one reading of all blocks, shared by every prompt that walks along, and the memory is that of one block and of
the caches, which CACHE_BYTES bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from runtime.session import DecoderSession

CACHE_BYTES = 1 << 30
"""Most keys and values that the prompts of one walk may come to hold."""
Ends = Callable[[Sequence[int]], bool]
"""Says whether the ids generated so far, at least one, are a whole answer."""


@dataclass(frozen=True)
class Answer:
    """What a model generated.

    Attributes:
        ids: generated, the one that ended the answer included.
        is_complete: it ended by itself, not for want of tokens.
        is_finite: false where the model gave no number for the most likely token; the answer ends before that one.
    """

    ids: tuple[int, ...]
    is_complete: bool
    is_finite: bool = True


@dataclass
class _Writing:
    """One answer on its way."""

    max_tokens: int
    ends: Ends
    ids: list[int]
    answer: Answer | None = None

    @classmethod
    def begin(cls, max_tokens: int, ends: Ends) -> _Writing:
        return cls(max_tokens, ends, [])

    def add(self, token: int, logit: float) -> None:
        """Take the most likely token and its logit; nothing once the answer is there."""
        if self.answer is not None:
            return
        if not math.isfinite(logit):
            self.answer = Answer(tuple(self.ids), is_complete=False, is_finite=False)
            return
        self.ids.append(token)
        is_complete = self.ends(self.ids)
        if is_complete or len(self.ids) == self.max_tokens:
            self.answer = Answer(tuple(self.ids), is_complete)


def decode(session: DecoderSession, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Answer:
    """Return the runtime's answer to one prompt."""
    writing = _Writing.begin(max_tokens, ends)
    logits = session.run(prompt, rows=[len(prompt) - 1])[0]
    while True:
        token = int(logits.argmax())
        writing.add(token, float(logits[token]))
        if writing.answer is not None:
            return writing.answer
        logits = session.step(token, past=len(prompt) + len(writing.ids) - 1)


def decoding(ids: torch.Tensor, max_tokens: int, ends: Ends) -> Callable[[PreTrainedModel], list[Answer]]:
    """Return the function that answers prompts of equal length, int64 [B, T], with a whole module."""

    def run(module: PreTrainedModel) -> list[Answer]:
        from transformers import DynamicCache

        cache = DynamicCache(config=module.config)
        writings = [_Writing.begin(max_tokens, ends) for _ in ids]
        step = ids
        while True:
            logits = module(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
            best, tokens = logits.max(dim=-1)
            for writing, token, logit in zip(writings, tokens.tolist(), best.tolist(), strict=True):
                writing.add(token, logit)
            answers = [writing.answer for writing in writings if writing.answer is not None]
            if len(answers) == len(writings):
                return answers
            step = tokens[:, None]

    return run


def walks(batches: Sequence[list[int]], lengths: Sequence[int], bytes_per_token: int) -> Iterator[list[list[int]]]:
    """Yield batches of prompts that walk together, so that their caches fit CACHE_BYTES; a prompt at least.

    Args:
        batches: indices of prompts of equal length.
        lengths: tokens that each prompt comes to have with its answer.
        bytes_per_token: of all layers' keys and values.
    """
    together: list[list[int]] = []
    room = CACHE_BYTES
    for batch in batches:
        cost = lengths[batch[0]] * bytes_per_token
        size = max(1, CACHE_BYTES // cost)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            if together and len(part) * cost > room:
                yield together
                together, room = [], CACHE_BYTES
            together.append(part)
            room -= len(part) * cost
    if together:
        yield together


def cache_bytes_per_token(config: Any) -> int:
    """Return the bytes of one token's keys and values, float32, as a transformers configuration describes them."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * np.dtype(np.float32).itemsize)
