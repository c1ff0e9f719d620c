"""Which texts run together: only those of exactly equal length, so that nothing is ever padded.

Padding changes the order in which a kernel adds, and with it the last bits of an answer. On a CPU a batch of one length
costs about as much per token as a longer one with padding, and a larger batch no less than one of a few hundred tokens
(docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

TOKENS_PER_BATCH: Final = 512


def equal_length_batches(lengths: Sequence[int], tokens_per_batch: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Yield lists of indices into `lengths`; those of a list have equal lengths.

    Each index comes once, short ones first; a list has at most `tokens_per_batch` tokens, or a single index.
    """
    for tokens, group in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), key=lengths.__getitem__):
        indices = list(group)
        size = max(1, tokens_per_batch // max(1, tokens))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))
