"""What each pass and each scoring took on this machine, in seconds and memory: what `plan` forecasts with.

The store keeps it in `measured/costs.jsonl`, a line for every piece of work that was really done, newest last.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

from optimizer import journal
from passes._safetensors import tensor_index
from passes.base import TORCH, Model, Stage

NAME = "measured/costs.jsonl"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of proc_pid_clear_refs(5)
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of <malloc.h>
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_CLOSE = 1.2
"""Times as large, or as small, is nearly the same work."""
_LAST = 5
"""Measurements of one kind of work that count, the newest."""

Basis: TypeAlias = Literal["measured", "scaled", "shipped"]


@dataclass(frozen=True)
class Work:
    """One piece of work, and what its cost depends on.

    Attributes:
        what: a pass's name, or what `scoring_at` calls a scoring.
        bytes: size of the model that is read.
        parameters: of the source model.
        layers: of the source model.
        tokens: that are scored; 0 for a pass.
    """

    what: str
    bytes: int
    parameters: int
    layers: int
    tokens: int = 0


@dataclass(frozen=True)
class Cost:
    """What a piece of work took.

    Attributes:
        seconds: it took.
        peak_bytes: largest resident memory of the process meanwhile; 0 where that is not measured.
        threads: it had.
        host: what the seconds depend on besides.
        day: when, YYYY-MM-DD.
    """

    work: Work
    seconds: float
    peak_bytes: int
    threads: int
    host: str
    day: str


@dataclass(frozen=True)
class Rate:
    """Seconds of a kind of work on two threads: `start`, and so many for each layer and each 10^9 parameters.

    Scoring counts 10^9 parameters x tokens instead.
    """

    start: float
    layer: float
    billion: float

    def seconds(self, work: Work) -> float:
        """Return what a piece of work takes."""
        return self.start + self.layer * work.layers + self.billion * work.parameters / 1e9 * (work.tokens or 1)


SHIPPED: Mapping[str, Rate] = {
    "scoring torch": Rate(0.3, 0.0, 0.03),
    "scoring onnx": Rate(0.2, 0.0, 0.02),
    "quantize_rtn": Rate(0.05, 0.0, 15.0),
    "quantize_int8": Rate(0.05, 0.0, 15.0),
    "smooth_quant": Rate(2.0, 0.3, 60.0),
    "quantize_mixed": Rate(1.0, 1.0, 400.0),
    "rotate": Rate(1.0, 0.15, 50.0),
    "export_onnx": Rate(3.0, 0.6, 40.0),
    "fuse": Rate(0.1, 0.02, 6.0),
}
"""Measured on two cores of an AMD EPYC, 2026-11-25."""
_UNKNOWN = Rate(1.0, 0.2, 30.0)


@dataclass(frozen=True)
class Expected:
    """What a piece of work will take: as measured here, scaled from other work done here, or as on another machine."""

    seconds: float
    basis: Basis


@dataclass
class Spent:
    """What `measured` found, once its block has ended."""

    seconds: float = 0.0
    peak_bytes: int = 0


def scoring_at(stage: Stage) -> str:
    """Return what the scoring of a model at a stage is called."""
    return f"scoring {stage.name}"


def extent(source: Model) -> tuple[int, int]:
    """Return the parameters and the layers of a source model; no parameters of an artifact, which has no headers."""
    return _parameters(source.folder) if source.stage == TORCH else 0, _layers(source.config)


@contextmanager
def measured(root: Path, work: Work, threads: int, *, keep: bool = True) -> Iterator[Spent]:
    """Measure the work of a block, and remember it in the store at `root` unless it raises.

    Memory that was freed goes back to the system first, so that the peak is of this work; the process's own peak is set
    back, which Linux allows and others do not.

    Args:
        root: the store's folder.
        work: what is done.
        threads: it has.
        keep: whether to remember it; not when a part of the work had been done before. Never of a model whose
            parameters are not known.
    """
    spent = Spent()
    give_back_freed_memory()
    can_measure = _reset_peak()
    start = time.perf_counter()
    yield spent
    spent.seconds = time.perf_counter() - start
    spent.peak_bytes = _peak_bytes() if can_measure else 0
    if keep and work.parameters:
        cost = Cost(work, spent.seconds, spent.peak_bytes, threads, host(), time.strftime("%Y-%m-%d"))
        journal.append(root / NAME, asdict(cost))


def recorded(root: Path, threads: int) -> list[Cost]:
    """Return what was measured on this machine with so many threads, oldest first."""
    return [cost for cost in _read(root) if (cost.host, cost.threads) == (host(), threads)]


def expected(work: Work, known: Sequence[Cost], threads: int) -> Expected:
    """Return what a piece of work will take.

    Args:
        work: what is to be done.
        known: what was done on this machine with as many threads.
        threads: it has.
    """
    shipped = _rate(work.what).seconds(work)
    alike = [cost for cost in known if cost.work.what == work.what]
    close = [cost for cost in alike if _is_close(cost.work, work)]
    if not known:
        return Expected(shipped * 2 / threads, "shipped")
    nearest = close or alike or known
    ratio = median(cost.seconds / _rate(cost.work.what).seconds(cost.work) for cost in nearest[-_LAST:])
    return Expected(ratio * shipped, "measured" if close else "scaled")


def _rate(what: str) -> Rate:
    return SHIPPED.get(what) or SHIPPED.get(what.partition("_")[0]) or _UNKNOWN


def _is_close(one: Work, other: Work) -> bool:
    pairs = ((one.bytes, other.bytes), (one.parameters, other.parameters))
    return all(max(pair) <= _CLOSE * min(pair) for pair in pairs)


@lru_cache(maxsize=1)
def host() -> str:
    """Return what tells machines apart whose work takes different times: the processor, and how many there are."""
    return f"{_processor()} x {os.cpu_count()}"


def _read(root: Path) -> Iterator[Cost]:
    for record in journal.read(root / NAME):
        with suppress(TypeError, KeyError):
            yield Cost(**{**record, "work": Work(**record["work"])})


@lru_cache(maxsize=8)
def _parameters(folder: Path) -> int:
    return sum(prod(entry.shape) for entry in tensor_index(folder).values())


def _layers(config: Mapping[str, Any]) -> int:
    """Return the depth of a model, under whichever name its family has for it; 1 where it has none."""
    text = {**config, **(config.get("text_config") or {})}
    return next((text[name] for name in _DEPTHS if isinstance(text.get(name), int)), 1)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_bytes() -> int:
    """Return what of this process is in memory now; 0 where that is not known."""
    return _status("VmRSS")


def give_back_freed_memory() -> None:
    """Let glibc return what was freed to the system, and from now on every freed block of a megabyte and more at once.

    Left alone it raises that threshold to 32 MiB by itself, and blocks of weights that come and go leave a heap that
    grows with the model's depth (measured: docs/log.md, 2026-11-20); and the threads of a walk, which take turns, would
    have heaps of their own that keep what they once had: 260 MB after 3,080 texts through MiniLM (2026-11-25).
    Elsewhere there is no `mallopt`, and no need.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.malloc_trim(0)


def _reset_peak() -> bool:
    """Set the peak of resident memory back to what is resident now; return whether that worked."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
