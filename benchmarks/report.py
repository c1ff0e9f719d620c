"""What every benchmark says beside its numbers: machine, date, versions, command; and how numbers are written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Spread:
    """Repetitions of one measurement."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int) -> str:
        """Write `median (low to high)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def machine() -> dict[str, str]:
    """Return what a reader needs to judge a number: processor, cores, memory, system."""
    described = _read_fields(Path("/proc/cpuinfo"))
    flags = set(described.get("flags", described.get("Features", "")).split())
    memory_kib = int(_read_fields(Path("/proc/meminfo")).get("MemTotal", "0 kB").split()[0])
    family = f" (family {described['cpu family']}, model {described['model']})" if "cpu family" in described else ""
    return {
        "processor": described.get("model name", platform.processor() or platform.machine()) + family,
        "features": " ".join(f for f in CPU_FEATURES if f in flags),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / 2**20:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load": f"{os.getloadavg()[0]:.1f} over the last minute, before the run",
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of these packages; those that are absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def header(title: str, about: Mapping[str, str], libraries: Mapping[str, str]) -> str:
    """Return the lines above a table: what was run, when, on what, with which versions."""
    lines = [
        f"## {title}",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        *(f"- {key.capitalize()}: {text}" for key, text in about.items()),
        f"- Versions: {', '.join(f'{name} {number}' for name, number in sorted(libraries.items()))}",
        f"- Command: `python {shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}`",
        "",
    ]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    line = "| " + " | ".join(columns) + " |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    return "\n".join([line, rule, *("| " + " | ".join(row) + " |" for row in rows), ""])


def write_json(path: Path, document: object) -> None:
    """Write a document for other programs to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def say(text: str) -> None:
    """Tell the person watching how far it is; results go to standard output, this does not."""
    print(text, file=sys.stderr, flush=True)


def _read_fields(path: Path) -> dict[str, str]:
    """Read `key: value` lines, the first of each key; nothing where the system has no such file."""
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields
