"""Which processors sum int8 products exactly, and what is done on the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.processor import int8_sums_may_overflow


@pytest.mark.parametrize(
    ("flags", "machine", "may"),
    [
        (["fpu avx2 avx512f avx512_vnni"], "x86_64", False),
        (["fpu avx2 avx_vnni", "fpu avx2 avx_vnni"], "AMD64", False),
        (["fpu avx2"], "x86_64", True),
        (["fpu avx2 avx512f"], "x86_64", True),
        (["fpu avx2 avx_vnni", "fpu avx2"], "x86_64", True),  # a thread may run on either kind of core
        ([], "x86_64", True),
        (["asimddp i8mm"], "aarch64", False),
    ],
)
def test_x86_without_vnni_may_overflow(tmp_path: Path, flags: list[str], machine: str, may: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("".join(f"processor\t: {core}\nflags\t\t: {each}\n\n" for core, each in enumerate(flags)))
    assert int8_sums_may_overflow(path, machine) is may


def test_where_nothing_can_be_read_it_may(tmp_path: Path) -> None:
    assert int8_sums_may_overflow(tmp_path / "none", "x86_64")
    assert not int8_sums_may_overflow(tmp_path / "none", "arm64")
