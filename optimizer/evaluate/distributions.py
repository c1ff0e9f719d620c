"""Next-token distributions from logits: sums in float64, float32 where arrays are large, NaN kept as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_ELEMENTS = 1 << 18
"""Most logits that one `Rows` holds when `blocks` cuts it, a row at least: 1 MiB of float32, which fits the cache."""

SMALLEST = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Rows:
    """Logits of consecutive positions of one item; what several tasks need of them is computed once.

    Attributes:
        index: which item.
        first: position of the first row in the item.
        logits: float32 [R, V].
    """

    index: int
    first: int
    logits: NDArray[np.float32]

    @cached_property
    def _peak(self) -> NDArray[np.float32]:
        peak: NDArray[np.float32] = self.logits.max(axis=1, keepdims=True)  # [R, 1]
        return peak

    @cached_property
    def _weights(self) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore"):
            weights: NDArray[np.float32] = self.logits - self._peak  # [R, V]
        return np.exp(weights, out=weights)

    @cached_property
    def log_total(self) -> NDArray[np.float64]:
        """Log of the sum of exponentials of each row, float64 [R]; NaN where a row holds NaN, +inf or only -inf."""
        total: NDArray[np.float64] = self._weights.sum(axis=1, dtype=np.float64)
        log_total: NDArray[np.float64] = np.add(self._peak[:, 0], np.log(total), dtype=np.float64)
        return log_total

    @cached_property
    def top(self) -> NDArray[np.int32]:
        """Most likely token of each row [R]; the lowest id on a tie."""
        ids: NDArray[np.int32] = self.logits.argmax(axis=1).astype(np.int32)
        return ids

    def log_probs(self, ids: NDArray[Any]) -> NDArray[np.float64]:
        """Log-probabilities of the tokens `ids` [R, k] of each row, float64 [R, k]."""
        return np.take_along_axis(self.logits, ids, axis=1).astype(np.float64) - self.log_total[:, None]

    def log_probs_and_rest(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Log-probabilities of `ids` [R, k] and, last, of all other tokens lumped into one bin: float32 [R, k + 1].

        The bin is summed by itself: one minus the sum of the others would lose it to cancellation.
        """
        weights = self._weights
        kept = np.take_along_axis(weights, ids, axis=1)
        np.put_along_axis(weights, ids, 0, axis=1)
        rest = weights.sum(axis=1, dtype=np.float64)
        np.put_along_axis(weights, ids, kept, axis=1)
        with np.errstate(divide="ignore"):
            log_rest = np.log(rest) + self._peak[:, 0] - self.log_total
        return np.column_stack([self.log_probs(ids), log_rest]).astype(np.float32)

    def most_likely(self, count: int) -> NDArray[np.int32]:
        """Ids of the `count` most likely tokens of each row, most likely first [R, min(count, V)]."""
        width = self.logits.shape[1]
        count = min(count, width)
        ids = np.argpartition(self.logits, width - count, axis=1)[:, width - count :]
        order = np.lexsort((ids, -np.take_along_axis(self.logits, ids, axis=1)), axis=1)
        return np.take_along_axis(ids, order, axis=1).astype(np.int32)


def blocks(index: int, first: int, logits: NDArray[np.float32]) -> Iterator[Rows]:
    """Cut logits [R, V] into `Rows` of at most BLOCK_ELEMENTS, so that what is computed of them stays small."""
    step = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, len(logits), step):
        yield Rows(index, first + start, logits[start : start + step])


def kl_divergence(log_p: NDArray[Any], log_q: NDArray[Any]) -> NDArray[np.float64]:
    """Return KL(p || q) in nats of each row, float64 [R]; zero for equal rows, NaN where either holds NaN.

    Args:
        log_p: log-probabilities [R, k] of the reference; -inf is a bin that cannot occur and adds nothing.
        log_q: log-probabilities [R, k]. A bin whose sum underflowed counts as the smallest float64, not as zero.
    """
    log_p, log_q = _normalized(log_p), np.maximum(_normalized(log_q), np.log(SMALLEST))
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p == 0, 0.0, p * (log_p - log_q))
    # Rounding alone can leave -1e-17; np.maximum keeps NaN.
    divergence: NDArray[np.float64] = np.maximum(terms.sum(axis=1), 0.0)
    return divergence


def _normalized(log_p: NDArray[Any]) -> NDArray[np.float64]:
    """Rescale rows of float32 log-probabilities to sum to one, so that no divergence is negative."""
    wide = log_p.astype(np.float64)
    normalized: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return normalized
