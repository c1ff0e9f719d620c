"""Sequences of token ids that are run together: equal lengths only, so that nothing is ever padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

TOKENS_PER_WALK = 32768
"""Tokens whose hidden states wait between blocks: 256 MiB at a width of 2048."""


def equal_lengths(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield lists of indices of exactly equal length: each index once, short ones first.

    A list has at most `tokens_per_batch` tokens, or a single index.
    """
    for tokens, group in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), key=lengths.__getitem__):
        indices = list(group)
        size = max(1, tokens_per_batch // max(1, tokens))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def walk_groups(batches: Iterable[list[int]], lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Yield batches of indices that walk together: as many as have TOKENS_PER_WALK tokens, one at least."""
    together: list[list[int]] = []
    tokens = 0
    for batch in batches:
        size = len(batch) * lengths[batch[0]]
        if together and tokens + size > TOKENS_PER_WALK:
            yield together
            together, tokens = [], 0
        together.append(batch)
        tokens += size
    if together:
        yield together
