"""What each pass and each scoring took on this machine, in seconds and memory: what `plan` forecasts with.

The store keeps it in `measured/costs.jsonl`, a line for every piece of work that was really done, newest last.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from optimizer import journal

NAME = "measured/costs.jsonl"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of proc_pid_clear_refs(5)


@dataclass(frozen=True)
class Cost:
    """One piece of work.

    Attributes:
        what: the pass's name, or "scoring" and the stage that was scored.
        bytes: size of the model that was read.
        tokens: that were scored; 0 for a pass.
        seconds: it took.
        peak_bytes: largest resident memory of the process meanwhile; 0 where that is not measured.
        threads: it had.
        host: what the seconds depend on besides.
        day: when, YYYY-MM-DD.
    """

    what: str
    bytes: int
    tokens: int
    seconds: float
    peak_bytes: int
    threads: int
    host: str
    day: str


@dataclass
class Spent:
    """What `measured` found, once its block has ended."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured(root: Path, what: str, size: int, *, tokens: int = 0, threads: int, keep: bool = True) -> Iterator[Spent]:
    """Measure the work of a block, and remember it in the store at `root` unless it raises.

    The process's peak of resident memory is set back first, which Linux allows and others do not.

    Args:
        root: the store's folder.
        what: as in `Cost`.
        size: bytes of the model that is read.
        tokens: as in `Cost`.
        threads: as in `Cost`.
        keep: whether to remember it; not when a part of the work had been done before.
    """
    spent = Spent()
    can_measure = _reset_peak()
    start = time.perf_counter()
    yield spent
    spent.seconds = time.perf_counter() - start
    spent.peak_bytes = _peak_bytes() if can_measure else 0
    if keep:
        cost = Cost(what, size, tokens, spent.seconds, spent.peak_bytes, threads, host(), time.strftime("%Y-%m-%d"))
        journal.append(root / NAME, asdict(cost))


def recorded(root: Path, threads: int) -> list[Cost]:
    """Return what was measured on this machine with so many threads, oldest first."""
    return [cost for cost in _read(root) if (cost.host, cost.threads) == (host(), threads)]


def host() -> str:
    """Return what tells machines apart whose work takes different times: the processor, and how many there are."""
    return f"{_processor()} x {os.cpu_count()}"


def _read(root: Path) -> Iterable[Cost]:
    for record in journal.read(root / NAME):
        with suppress(TypeError):
            yield Cost(**record)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _reset_peak() -> bool:
    """Set the peak of resident memory back to what is resident now; return whether that worked."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
