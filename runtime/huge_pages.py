"""Weights in huge pages: every token reads all of them, and page by page of 4 KiB the processor loses its way.

Linux gives memory in huge pages (2 MiB on x86) to those who ask, and ONNX Runtime does not ask. So what it allocated
while it loaded a graph is moved into huge pages afterwards, by the kernel: same addresses, same values.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_ASK: Final = 14  # MADV_HUGEPAGE
_MOVE: Final = 25  # MADV_COLLAPSE, since Linux 6.1; an older one moves pages in its own time, once asked
_LIBC: Final = ctypes.CDLL(None)
_SETTINGS: Final = Path("/sys/kernel/mm/transparent_hugepage")

Range = tuple[int, int]
"""Addresses, the last one exclusive."""


@contextmanager
def huge_pages(settings: Path = _SETTINGS) -> Iterator[None]:
    """Move into huge pages what this process allocates meanwhile, in whole ones; nothing where there are none.

    Args:
        settings: the system's folder that says how large they are, and whether they are to be used.
    """
    page = page_bytes(settings)
    before = memory() if page else []
    yield
    _trim()
    for start, stop in resident(whole(new(before, memory()), page), page) if page else ():
        _advise(start, stop)


def page_bytes(settings: Path) -> int:
    """Return the size of a huge page; 0 where the system has none or never uses them."""
    try:
        if "[never]" in (settings / "enabled").read_text():
            return 0
        return int((settings / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def memory(maps: Path = Path("/proc/self/maps")) -> list[Range]:
    """Return where this process's own memory is, in order: heap and anonymous mappings, not those of files."""
    try:
        lines = [line.split() for line in maps.read_text().splitlines()]
    except OSError:
        return []
    own = [line[0] for line in lines if line[1] == "rw-p" and (len(line) == 5 or line[5] == "[heap]")]
    return [(int(start, 16), int(stop, 16)) for start, _, stop in (each.partition("-") for each in own)]


def new(before: Sequence[Range], after: Sequence[Range]) -> Iterator[Range]:
    """Yield what is in `after` and not in `before`; both are in order."""
    for start, stop in after:
        for old_start, old_stop in before:
            if old_stop <= start:
                continue
            if old_start >= stop:
                break
            if old_start > start:
                yield start, old_start
            start = min(old_stop, stop)
        if start < stop:
            yield start, stop


def whole(ranges: Iterator[Range], page: int) -> Iterator[Range]:
    """Yield of each range the whole pages."""
    for start, stop in ranges:
        first, last = -(-start // page) * page, stop // page * page
        if first < last:
            yield first, last


def resident(ranges: Iterator[Range], page: int) -> Iterator[Range]:
    """Yield the huge pages most of which is in memory: moving one that was given back would take memory again."""
    small = mmap.PAGESIZE
    for start, stop in ranges:
        told = (ctypes.c_ubyte * ((stop - start) // small))()
        if _LIBC.mincore(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), told) != 0:
            yield start, stop  # a system that does not say
            continue
        here = bytes(told)
        for at in range(0, len(here), page // small):
            if 2 * sum(flag & 1 for flag in here[at : at + page // small]) >= page // small:
                yield start + at * small, start + at * small + page


def _trim() -> None:
    """Give what was freed back to the system, where the C library can: loading leaves much."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def _advise(start: int, stop: int) -> None:
    """Ask for huge pages here and now; a system that refuses leaves all as it was."""
    if sys.platform == "linux":
        madvise = _LIBC.madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for advice in (_ASK, _MOVE):
            madvise(start, stop - start, advice)
