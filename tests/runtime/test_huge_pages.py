"""Which memory is moved into huge pages, and that it is."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from runtime.huge_pages import huge_pages, memory, new, page_bytes, whole

MAPS = """\
55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
7f0000400000-7f0000600000 rw-p 00000000 08:01 42                         /models/model.onnx.data
7f0000600000-7f0000800000 r--p 00000000 00:00 0
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
"""


def settings(folder: Path, enabled: str = "always [madvise] never", size: str = "2097152\n") -> Path:
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text(size)
    return folder


def test_heap_and_anonymous_memory_count_and_files_and_the_stack_do_not(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(MAPS)
    assert memory(tmp_path / "maps") == [(0x55D0C0A00000, 0x55D0C0A21000), (0x7F0000000000, 0x7F0000400000)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [(10, 20)], [(10, 20)]),
        ([(10, 20)], [(10, 20)], []),
        ([(10, 20)], [(10, 30)], [(20, 30)]),  # a heap that grew
        ([(12, 14), (16, 18)], [(10, 20)], [(10, 12), (14, 16), (18, 20)]),  # mappings that were joined
        ([(10, 40)], [(10, 15), (30, 40)], []),  # and that were given back
        ([(0, 5)], [(10, 20)], [(10, 20)]),
    ],
)
def test_new_memory_is_what_was_not_there_before(
    before: list[tuple[int, int]], after: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert list(new(before, after)) == expected


def test_only_whole_pages_are_taken() -> None:
    assert list(whole(iter([(10, 95), (1, 9), (20, 40)]), 20)) == [(20, 80), (20, 40)]


def test_a_system_without_huge_pages_or_that_never_uses_them_is_left_alone(tmp_path: Path) -> None:
    assert page_bytes(tmp_path) == 0
    assert page_bytes(settings(tmp_path)) == 2 << 20
    assert page_bytes(settings(tmp_path, enabled="always madvise [never]")) == 0
    with huge_pages(tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_what_is_allocated_meanwhile_lies_in_huge_pages_with_its_values() -> None:
    if not page_bytes(Path("/sys/kernel/mm/transparent_hugepage")):
        pytest.skip("this system has no huge pages")
    before = huge_bytes()
    with huge_pages():
        block = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[:] = bytes(range(256)) * (len(block) // 256)
    if huge_bytes() == before:
        pytest.skip("this system's kernel moves pages in its own time")
    assert (
        huge_bytes() - before >= 12 << 20
    )  # of 16 MiB 7 or 8 whole pages of 2 MiB; the rest for others that were given back
    assert block[:] == bytes(range(256)) * (len(block) // 256)


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))
