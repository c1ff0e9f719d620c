"""How many tokens of a prompt to run at once: as one path through the kernels asks, and as those who wait can bear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

LEAST_TOKENS: Final = 4  # already 1.6 times as much per token as 32 on a 135M shape: the weights are read all the same
MOST_TOKENS: Final = 128  # a larger one is no faster per token


def prefill_chunks(tokens: int, size: int = MOST_TOKENS) -> Iterator[int]:
    """Yield the lengths of the forward passes of a prompt, `next_chunk` by `next_chunk`."""
    while tokens > 0:
        take = next_chunk(tokens, size)
        yield take
        tokens -= take


def next_chunk(left: int, size: int) -> int:
    """Return how many of a prompt's tokens that are left to run at once: at most `size`, an even number of at least 4.

    Never one, unless it is the whole prompt: a pass of one token takes another path through the kernels and rounds
    differently; prompt positions should not. And an even number but for the last pass: some kernels round the last of
    an odd number of rows differently (int4 in blocks of 64 and more, by 1e-7). So however a prompt is cut, each of its
    positions is computed in one way.
    """
    if left <= size:
        return left
    return size - 2 if left - size == 1 else size


class Pace:
    """Learns what a token costs from the chunks that were run, apart for each power of two of tokens before it.

    A cost that rises counts at once, one that falls by half, so that one quick chunk does not make the next too long.
    It begins with the smallest chunk. The limit is on what was measured: a chunk that meets another process on the
    machine, or the first one after far more tokens than any before, may take longer; the next is smaller.
    """

    def __init__(self, max_stall_ms: float) -> None:
        """Take the most milliseconds of a chunk; on a machine too slow for `LEAST_TOKENS` they take what they take."""
        self._limit_s = 0.95 * max_stall_ms / 1e3  # the rest is for rounding to the nearest even number
        self._token_s: dict[int, float] = {}  # by the number of bits of the tokens before the chunk

    def tokens(self, past: int) -> int:
        """Return how many tokens to run after `past` others: an even number from `LEAST_TOKENS` to `MOST_TOKENS`."""
        known = [bits for bits in self._token_s if bits <= _bits(past)] or list(self._token_s)
        if not known:
            return LEAST_TOKENS
        fitting = self._limit_s / self._token_s[max(known)]
        return 2 * round(max(LEAST_TOKENS, min(MOST_TOKENS, fitting)) / 2)

    def measured(self, tokens: int, past: int, seconds: float) -> None:
        """Learn from a chunk that was run.

        A token costs less in a longer chunk. So once something is known, only chunks of the size that was told count,
        not those of when nobody waited, nor the short rest of a prompt unless it took too long itself.
        """
        cost, bits, told = seconds / tokens, _bits(past), self.tokens(past)
        counts = tokens == told or (tokens < told and seconds >= self._limit_s)
        if bits in self._token_s and not counts:
            return
        before = self._token_s.get(bits, cost)
        self._token_s[bits] = max(cost, (cost + before) / 2)


def _bits(past: int) -> int:
    return max(past, 256).bit_length()  # below 256 attention is a small part of the cost
