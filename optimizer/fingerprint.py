"""Name a value, or the code of a pass, by the hash of its content: the parts of a store key."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


def canonical_json(value: Any) -> str:
    """Write a value as JSON that depends on its content alone: sorted keys, no spaces; dataclasses as objects.

    Raises:
        TypeError: something in it has no JSON form.
        ValueError: a number in it is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def fingerprint(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON in hexadecimal; errors as in `canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def source_fingerprint(module: ModuleType | Path) -> str:
    """Return the hash of a module's source and of every module of its own package that it imports, at any depth.

    Imports are found by parsing, those inside functions included, so that nothing is imported to be hashed.
    """
    path = module if isinstance(module, Path) else Path(str(module.__file__))
    package = path.parent
    pending, seen = [path.resolve()], set[Path]()
    while pending:
        source = pending.pop()
        if source not in seen:
            seen.add(source)
            pending.extend(_imported_sources(source, package.resolve()))
    return fingerprint({source.name: source.read_text(encoding="utf-8") for source in seen})


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _imported_sources(source: Path, package: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        for name in _imported_names(node, package.name):
            head, _, rest = name.partition(".")
            if head == package.name and rest:
                path = package / f"{rest.split('.')[0]}.py"
                if path.is_file():
                    yield path


def _imported_names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            module = f"{package}.{module}".rstrip(".")
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)
