"""Who owns the memory of keys and values: one buffer per layer and side, a slot of it for each sequence.

Buffers are reserved, not taken: pages of memory come as tokens are written, and a freed slot gives its pages back and
reads as zeros again. So the number of slots and the longest sequence cost address space alone, and a budget can count
tokens. Elsewhere than on Linux buffers are plain zeros, and a freed slot keeps its pages.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SessionError

_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; Python names it from 3.13 on


class Side(NamedTuple):
    """Keys or values of one layer.

    Attributes:
        heads: how many heads K they have.
        width: E, of a head.
        dtype: of a number: float32, or int8 where the graph holds scales.
    """

    heads: int
    width: int
    dtype: np.dtype[Any] = np.dtype(np.float32)

    @property
    def head_bytes(self) -> int:
        """Memory of one token in one head."""
        return self.width * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Memory of one token in all heads."""
        return self.heads * self.head_bytes


class Memory(Protocol):
    """Bytes that read as zeros until they are written."""

    cells: NDArray[np.uint8]

    def clear(self, start: int, stop: int) -> None:
        """Make the bytes from `start` to `stop` zeros again."""


class MappedMemory:
    """Reserved address space of Linux. What is cleared in whole pages goes back to the system."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, size, flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # 2 MiB for the first token of every head would break the budget
        self.cells: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    def clear(self, start: int, stop: int) -> None:
        """Give these pages back; they are whole ones."""
        self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class PlainMemory:
    """Zeros of numpy, for systems without the above."""

    def __init__(self, size: int) -> None:
        self.cells: NDArray[np.uint8] = np.zeros(size, np.uint8)

    def clear(self, start: int, stop: int) -> None:
        """Write zeros."""
        self.cells[start:stop] = 0


class KVBuffers:
    """The keys and values of all slots: `[slots, K, capacity, E]` for each layer and side.

    Attributes:
        slots: how many sequences there is room for.
        capacity: positions of a slot: those asked for, rounded up so that every head's begin with a page.
        granule: tokens that fill whole pages in every head: memory comes in so many of them.
        token_bytes: memory of one token of one sequence, all layers and sides together.
    """

    def __init__(
        self,
        sides: Mapping[str, Side],
        *,
        slots: int,
        capacity: int,
        memory: Callable[[int], Memory] = MappedMemory if sys.platform == "linux" else PlainMemory,
    ) -> None:
        """Reserve the buffers.

        Args:
            sides: what there is of each layer, by name.
            slots: how many sequences.
            capacity: most tokens of one sequence.
            memory: makes zeros, given the number of bytes.

        Raises:
            SessionError: the system has no room for them.
        """
        page = mmap.PAGESIZE
        self.slots = slots
        self.granule = math.lcm(*(page // math.gcd(page, side.head_bytes) for side in sides.values()))
        self.capacity = -(-capacity // self.granule) * self.granule
        self.token_bytes = sum(side.token_bytes for side in sides.values())
        try:
            self._memory = {name: memory(slots * self.capacity * side.token_bytes) for name, side in sides.items()}
        except (MemoryError, OSError, OverflowError):
            needed = slots * self.capacity * self.token_bytes >> 20
            asked = f"{slots} x {capacity} tokens" if slots > 1 else f"{capacity} tokens"
            raise SessionError(f"capacity: {asked} need {needed} MiB of cache; ask for a smaller context") from None
        self._arrays = {
            name: self._memory[name].cells.view(side.dtype).reshape(slots, side.heads, self.capacity, side.width)
            for name, side in sides.items()
        }

    def view(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """Return `[count, K, capacity, E]` of each layer's sides: slots `first` and after, not copied."""
        return {name: array[first : first + count] for name, array in self._arrays.items()}

    def copy(self, source: int, slot: int, first: int, count: int) -> None:
        """Write positions `first` to `first + count - 1` of a slot over those of another."""
        cells = slice(first, first + count)
        for array in self._arrays.values():
            array[slot, :, cells] = array[source, :, cells]

    def free(self, slot: int) -> None:
        """Give a slot's memory back; it reads as zeros until it is written again."""
        for name, memory in self._memory.items():
            size = self._arrays[name][0].nbytes
            memory.clear(slot * size, (slot + 1) * size)
