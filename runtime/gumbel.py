"""The noise of every token id, and the id whose score and noise together are largest, without drawing most of it.

The Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030, section 2): with independent g_v = -log(e_v),
e_v exponential, argmax(z_v + g_v) has the distribution softmax(z). The noise is drawn from the top down, as in section
3 there: the least of the `BLOCK` exponential variables of a block is exponential with mean 1 / BLOCK; it is any id's
with the same chance; and those of the other ids exceed it by an exponential variable each, for these have no memory.
So one random number says how much noise a block has at most, and an id whose block cannot win needs none of its own.

The random numbers are those of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"),
whose state is a counter: each is computed alone, from a seed, a position and the number of the id or of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.blocks import BLOCK, block_of, member, members, place_in_block

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
_MASK: Final = (1 << 64) - 1
_BLOCKS: Final = 1 << 32  # counters from here on are those of blocks, below those of ids


def noise_key(seed: int, position: int) -> int:
    """Return what the noise of all ids at a position is derived from, 64 bits."""
    return _mix(_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN & _MASK)


def gumbel(key: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the noise of ids, which `race` sees where it looks at all: standard Gumbel variables."""
    return -np.log(_waits(np.full(len(ids), key, np.uint64), ids, block_of(ids)))


def race(
    logits: NDArray[np.float32],
    maxima: NDArray[np.float32],
    temperatures: NDArray[np.float64],
    least: NDArray[np.float64],
    keys: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Return for each row the id that maximizes logit / temperature + noise.

    What a block can reach at most is known of all. The block that may reach the most is looked into; of the others that
    could exceed what was found there, only the id with the block's most noise; and all ids only of blocks that could
    exceed that too: some 30 of 5,000 at V = 152k.

    Args:
        logits: `[R, V]`, the largest of each row a number, and no NaN.
        maxima: their `block_maxima` `[R, N]`.
        temperatures: `[R]`, above 0.
        least: `[R]`, logits below it are out of the race; not above the largest logit.
        keys: `[R]`, the `noise_key` of each row.
    """
    field = _Field(logits, temperatures, least, keys)
    bounds = field.bounds(maxima)
    every = np.arange(len(logits))
    best = field.contest(every, bounds.argmax(axis=1))[1]
    at = np.flatnonzero(bounds >= best[:, None])
    rows, blocks = np.divmod(at, bounds.shape[1])
    np.maximum.at(best, rows, field.reached(rows, blocks))
    keep = bounds.reshape(-1)[at] >= best[rows]
    rows = rows[keep]
    ids, scores = field.contest(rows, blocks[keep])
    order = np.lexsort((scores, rows))
    winners: NDArray[np.int64] = ids[order[np.searchsorted(rows, every, side="right") - 1]]
    return winners


@dataclass(frozen=True)
class _Field:
    """The arguments of a race, for rows and blocks that are picked: `[P]` of each."""

    logits: NDArray[np.float32]
    temperatures: NDArray[np.float64]
    least: NDArray[np.float64]
    keys: NDArray[np.uint64]

    def bounds(self, maxima: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the most that each block can reach `[R, N]`."""
        rows, every = np.arange(len(maxima))[:, None], np.arange(maxima.shape[1])[None]
        waits, _ = _block_waits(self.keys[rows], every)
        return self._scores(maxima, rows) - np.log(waits)

    def contest(self, rows: NDArray[np.int64], blocks: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the best id of each block, and its score."""
        rows, blocks, ids = rows[:, None], blocks[:, None], members(blocks)
        scores = self._scores(self._logits_of(ids, rows), rows) - np.log(_waits(self.keys[rows], ids, blocks))
        at = np.arange(len(ids)), scores.argmax(axis=1)
        return ids[at], scores[at]

    def reached(self, rows: NDArray[np.int64], blocks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the score of the id in each block that has the most noise."""
        waits, places = _block_waits(self.keys[rows], blocks)
        return self._scores(self._logits_of(member(blocks, places), rows), rows) - np.log(waits)

    def _scores(self, logits: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return logits over the temperature of their row, -inf where they are out of the race."""
        return np.where(logits >= self.least[rows], logits / self.temperatures[rows], -np.inf)

    def _logits_of(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of ids, -inf for those that the model does not have."""
        vocabulary = self.logits.shape[1]
        found: NDArray[np.float32] = np.take(self.logits, rows * vocabulary + np.minimum(ids, vocabulary - 1))
        found[ids >= vocabulary] = -np.inf
        return found


def _block_waits(keys: NDArray[np.uint64], blocks: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the least exponential variable of each block, and the place of the id that has it."""
    bits = _hash(keys, blocks.astype(np.uint64) + np.uint64(_BLOCKS))
    return _exponential(bits) / BLOCK, (bits & np.uint64(BLOCK - 1)).astype(np.int64)


def _waits(keys: NDArray[np.uint64], ids: NDArray[np.int64], blocks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the exponential variable of each id, which is in the block given."""
    least, places = _block_waits(keys, blocks)
    return least + np.where(place_in_block(ids) == places, 0.0, _exponential(_hash(keys, ids.astype(np.uint64))))


def _exponential(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return standard exponential variables of the upper 52 bits: with 53, adding a half could round up to 1."""
    uniform = (bits >> np.uint64(12)).astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-52
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform)


def _hash(keys: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output for each counter."""
    state = (counters + np.uint64(1)) * np.uint64(_GOLDEN) + keys
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return state


def _mix(state: int) -> int:
    """Return SplitMix64's output for one state."""
    state = (state ^ state >> 30) * _MIX_1 & _MASK
    state = (state ^ state >> 27) * _MIX_2 & _MASK
    return state ^ state >> 31
