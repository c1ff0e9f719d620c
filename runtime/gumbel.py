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


def race(
    logits: NDArray[np.float32],
    maxima: NDArray[np.float32],
    temperatures: NDArray[np.float64],
    least: NDArray[np.float64],
    keys: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Return for each row the id that maximizes logit / temperature + noise.

    Every block has an id that the noise is known of, and so a score that is surely reached; blocks that cannot exceed
    the best of these are never looked into.

    Args:
        logits: `[R, V]`, the largest of each row a number, and no NaN.
        maxima: their `block_maxima` `[R, N]`.
        temperatures: `[R]`, above 0.
        least: `[R]`, logits below it are out of the race; not above the largest logit.
        keys: `[R]`, the `noise_key` of each row.
    """
    row, every = np.arange(len(logits))[:, None], np.arange(maxima.shape[1])[None]
    waits, places = _block_waits(keys[:, None], every)
    bounds = _scores(maxima, row, temperatures, least) - np.log(waits)
    known = _scores(_at(logits, row, member(every, places)), row, temperatures, least) - np.log(waits)
    rows, blocks = np.nonzero(bounds >= known.max(axis=1, keepdims=True))
    alive = bounds[rows, blocks] > -np.inf
    rows, blocks = rows[alive], blocks[alive]
    ids = members(blocks)
    noise = -np.log(_waits(keys[rows, None], ids, waits[rows, blocks][:, None], places[rows, blocks][:, None]))
    scores = _scores(_at(logits, rows[:, None], ids), rows[:, None], temperatures, least) + noise
    return _winners(rows, ids, scores)


def gumbel(key: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the noise of ids, which `race` sees where it looks at all: standard Gumbel variables."""
    keys = np.full(len(ids), key, np.uint64)
    return -np.log(_waits(keys, ids, *_block_waits(keys, block_of(ids))))


def _winners(rows: NDArray[np.int64], ids: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the id with the largest score of each row; `rows` `[P]` ascend, `ids` and `scores` are `[P, BLOCK]`."""
    at = np.arange(len(rows)), scores.argmax(axis=1)
    order = np.lexsort((scores[at], rows))
    last = order[np.append(np.flatnonzero(np.diff(rows)), len(rows) - 1)]
    winners: NDArray[np.int64] = ids[at][last]
    return winners


def _scores(
    logits: NDArray[np.float32], row: NDArray[np.int64], temperatures: NDArray[np.float64], least: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return logits over the temperature of their row, -inf where they are out of the race."""
    return np.where(logits >= least[row], logits / temperatures[row], -np.inf)


def _at(logits: NDArray[np.float32], row: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits of ids, -inf for those that the model does not have."""
    vocabulary = logits.shape[1]
    found: NDArray[np.float32] = np.take(logits, row * vocabulary + np.minimum(ids, vocabulary - 1))
    found[ids >= vocabulary] = -np.inf
    return found


def _block_waits(keys: NDArray[np.uint64], blocks: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the least exponential variable of each block, and the place of the id that has it."""
    bits = _hash(keys, blocks.astype(np.uint64) + np.uint64(_BLOCKS))
    return _exponential(bits) / BLOCK, (bits % np.uint64(BLOCK)).astype(np.int64)


def _waits(
    keys: NDArray[np.uint64], ids: NDArray[np.int64], least: NDArray[np.float64], place: NDArray[Any]
) -> NDArray[np.float64]:
    """Return the exponential variable of each id, given what `_block_waits` says of its block."""
    others = _exponential(_hash(keys, ids.astype(np.uint64)))
    return least + np.where(place_in_block(ids) == place, 0.0, others)


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
