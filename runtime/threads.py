"""How many threads this process may keep busy: ONNX Runtime counts the host's cores, not what a container was given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def default_threads(root: Path = Path("/"), allowed: int | None = None) -> int:
    """Return the smaller of the CPU affinity and the cgroup's CPU quota, at least 1.

    A quota of 1.5 CPUs counts as 1: spinning threads beyond the quota are stopped by the kernel for the rest of each
    period, which costs more than the half CPU gains.

    Args:
        root: where `proc` and `sys` are mounted.
        allowed: number of CPUs the affinity allows; None asks the system.
    """
    if allowed is None:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quota, in CPUs, of this process's cgroup and of every group above it (cgroup v1 and v2)."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mounts = ("", "unified") if controllers == "" else (controllers, "cpu", "cpu,cpuacct")
        if controllers == "" or "cpu" in controllers.split(","):
            for mount in mounts:
                yield from _quotas_upwards(root / "sys/fs/cgroup" / mount, group)


def _quotas_upwards(mount: Path, group: str) -> Iterator[float]:
    parts = [part for part in group.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        for line in _lines(folder / "cpu.max"):  # v2: "max 100000" or "150000 100000"
            yield from _ratio(*line.split()[:2])
        for quota, period in zip(
            _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us"), strict=False
        ):
            yield from _ratio(quota, period)


def _ratio(quota: str, period: str = "100000") -> Iterator[float]:
    """Yield quota / period unless the quota says "no limit" (`max`, -1)."""
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        yield int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
