"""Threads follow what the process was given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.threads import default_threads


def system(root: Path, group: str, **files: str) -> Path:
    """Write a fake /proc and /sys; a double underscore in a name stands for a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def test_without_a_quota_the_affinity_decides(tmp_path: Path) -> None:
    assert default_threads(tmp_path, allowed=6) == 6
    assert default_threads(system(tmp_path, "0::/\n", cpu_DOT_max="max 100000"), allowed=6) == 6


@pytest.mark.parametrize(("quota", "threads"), [("200000", 2), ("150000", 1), ("50000", 1), ("900000", 6)])
def test_a_version_2_quota_limits_and_rounds_down(tmp_path: Path, quota: str, threads: int) -> None:
    root = system(tmp_path, "0::/\n", cpu_DOT_max=f"{quota} 100000")
    assert default_threads(root, allowed=6) == threads


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "0::/pod/container\n",
        pod__cpu_DOT_max="300000 100000",
        pod__container__cpu_DOT_max="max 100000",
        other__cpu_DOT_max="100000 100000",
    )
    assert default_threads(root, allowed=8) == 3


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_a_version_1_quota_limits(tmp_path: Path, mount: str) -> None:
    files = {f"{mount}__job__cpu_DOT_cfs_quota_us": "400000", f"{mount}__job__cpu_DOT_cfs_period_us": "100000"}
    root = system(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n", **files)
    assert default_threads(root, allowed=8) == 4


def test_a_version_1_quota_of_minus_one_is_none(tmp_path: Path) -> None:
    root = system(tmp_path, "1:cpu:/\n", cpu__cpu_DOT_cfs_quota_us="-1", cpu__cpu_DOT_cfs_period_us="100000")
    assert default_threads(root, allowed=8) == 8


def test_a_container_that_cannot_see_its_own_group_reads_the_mounts_root(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/docker/0123\n", cpu_DOT_max="200000 100000")
    assert default_threads(root, allowed=8) == 2


def test_nonsense_in_the_files_is_ignored(tmp_path: Path) -> None:
    assert default_threads(system(tmp_path, "::\nx\n0::/../..\n", cpu_DOT_max="a b"), allowed=3) == 3


def test_this_machine_gives_at_least_one_and_no_more_than_it_has() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
