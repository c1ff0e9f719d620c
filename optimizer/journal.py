"""Short records of what runs found out, one JSON object per line of a file in the store; many processes may add to it.

A line is added by one write at the file's end. What cannot be read or written is left out: nothing depends on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimizer.fingerprint import canonical_json
from passes._files import atomic_write

MOST_BYTES = 1 << 20
"""Size at which the older half of a journal is dropped."""


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record; a disk that is full or cannot be written to is no reason to stop."""
    line = canonical_json(record).encode() + b"\n"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MOST_BYTES:
            lines = path.read_bytes().splitlines(keepends=True)
            atomic_write(path, b"".join(lines[len(lines) // 2 :]))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records, oldest first; lines that are damaged are passed over."""
    content = b""
    with suppress(OSError):
        content = path.read_bytes()
    for line in content.splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record
