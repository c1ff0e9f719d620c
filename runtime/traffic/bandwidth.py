"""How fast this machine reads memory: the limit of a decode, whose every step reads all weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

BYTES: Final = 1 << 28
"""Read in each pass by all threads together: several times any cache of a few cores."""
PASSES: Final = 8


def read_bandwidth(threads: int) -> float:
    """Return bytes per second, the best of several passes: other processes only ever make one slower.

    Each thread takes the dot product of a part of its own with itself; numpy lets go of the interpreter meanwhile.
    """
    parts = [np.ones(BYTES // 4 // threads, np.float32) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            begin = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            best = min(best, time.perf_counter() - begin)
    return sum(part.nbytes for part in parts) / best
