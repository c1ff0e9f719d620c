"""From folders to served models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from runtime.artifact import verify
from runtime.async_engine import AsyncEngine
from runtime.encoder import open_encoder
from runtime.encoder_batcher import AsyncEncoder
from runtime.engine import MAX_STALL_MS, Engine
from runtime.errors import SamplingError, SettingsError
from runtime.sampler import SamplingParams
from runtime.server.service import Served

_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What `Engine.load` takes, for every decoder of a server; encoders take the threads."""

    slots: int | None = None
    kv_memory: int | None = None
    context: int | None = None
    threads: int | None = None
    max_stall_ms: float = MAX_STALL_MS


def named(folders: Sequence[str]) -> dict[str, Path]:
    """Return name to folder of `DIR` (named as the folder) and `NAME=DIR`.

    Raises:
        SettingsError: two of them have one name.
    """
    found: dict[str, Path] = {}
    for given in folders:
        name, has_name, rest = given.partition("=")
        folder = Path(rest if has_name and not Path(given).exists() else given)
        name = name if folder == Path(rest) and has_name else folder.resolve().name
        if not name or name in found:
            raise SettingsError(f"{given}: the name {name!r} is empty or taken; give it another as NAME=DIR")
        found[name] = folder
    return found


def load(folder: Path, options: EngineOptions, digest: str | None = None) -> Served:
    """Verify an artifact and load it.

    Raises:
        ServingError: one line that says what is wrong.
    """
    manifest = verify(folder, digest)
    if manifest.kind != "decoder":
        encoder = open_encoder(folder, manifest, options.threads)
        return Served(manifest, encoder.tokenizer, AsyncEncoder(encoder))
    engine = Engine.from_verified(folder, manifest, **asdict(options))
    return Served(manifest, engine.tokenizer, AsyncEngine(engine), sampling_defaults(folder))


def sampling_defaults(folder: Path) -> Mapping[str, float]:
    """Return what `generation_config.json` says of how tokens are drawn; nothing where it says nothing usable."""
    try:
        content = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return MappingProxyType({})
    known: dict[str, Any] = content if isinstance(content, dict) else {}
    found = {name: known[name] for name in _SAMPLING if type(known.get(name)) in (int, float)}
    try:
        SamplingParams(**found)
    except SamplingError:
        return MappingProxyType({})
    return MappingProxyType(found)
