"""How many tokens of a prompt to run at once: as one path through the kernels asks, and as those who wait can bear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

LEAST_TOKENS: Final = 4  # already 1.6 times as much per token as 32 on a 135M shape: the weights are read all the same
MOST_TOKENS: Final = 128  # a larger one is no faster per token
_OVERHEAD: Final = 4  # 3 to 7 on a 135M shape after 0 to 4,000 tokens
_STRETCH: Final = 256


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
    """Learns what chunks cost, apart for each `_STRETCH` of tokens before them.

    A chunk costs what its tokens do and, whatever their number, as much as `_OVERHEAD` more: the weights are read once,
    and so is what attention looks at. A cost that rises counts at once, one that falls by half, so that one quick chunk
    does not make the next too long. It begins with the smallest chunk. The limit is on what was measured: a chunk that
    meets another process on the machine, or the first one after far more tokens than any before, may take longer; the
    next is smaller.
    """

    def __init__(self, max_stall_ms: float) -> None:
        """Take the most milliseconds of a chunk; on a machine too slow for `LEAST_TOKENS` they take what they take."""
        self._limit_s = 0.92 * max_stall_ms / 1e3  # the rest is for what varies from chunk to chunk
        self._token_s: dict[int, float] = {}  # by stretches before the chunk

    def tokens(self, past: int) -> int:
        """Return how many tokens to run after `past` others: an even number from `LEAST_TOKENS` to `MOST_TOKENS`."""
        if not self._token_s:
            return LEAST_TOKENS
        known = [stretch for stretch in self._token_s if stretch <= past // _STRETCH]
        fitting = self._limit_s / self._token_s[max(known or self._token_s)] - _OVERHEAD
        return 2 * round(max(LEAST_TOKENS, min(MOST_TOKENS, fitting)) / 2)

    def measured(self, tokens: int, past: int, seconds: float) -> None:
        """Learn from a chunk that was run; from the short rest of a prompt there is nothing to learn."""
        if tokens >= LEAST_TOKENS:
            cost, stretch = seconds / (tokens + _OVERHEAD), past // _STRETCH
            before = self._token_s.get(stretch, cost)
            self._token_s[stretch] = max(cost, (cost + before) / 2)
