"""Which layers a quantizing pass hurts most, and the same pass with those in another format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_args

from passes._override import LayerFormat, Override
from passes.base import Pass, PassError


def kept_formats(kind: type[Pass]) -> tuple[str, ...]:
    """Return the formats that a pass can give some of its layers, none for a pass that treats all alike."""
    options = {option.name for option in fields(kind)}
    if "overrides" in options:
        return get_args(LayerFormat)
    return ("float",) if "exclude" in options else ()


def keep(step: Pass, layers: Sequence[str], format: str) -> Pass:
    """Return the same pass with the layers of these names in another format, whatever it said of them before.

    Raises:
        PassError: the pass cannot give a layer that format.
    """
    known = kept_formats(type(step))
    if format not in known:
        expected = f"one of {', '.join(known)}" if len(known) > 1 else " ".join(known) or "none: it treats all alike"
        raise PassError(f"{step.name()}: got the format {format!r} for layers to keep, expected {expected}")
    options: Any = step
    if not layers:
        return step
    if format == "float":
        return replace(options, exclude=(*options.exclude, *layers))  # type: ignore[no-any-return]
    override = Override(layers=tuple(layers), format=format)  # type: ignore[arg-type]
    return replace(options, overrides=(override, *options.overrides))  # type: ignore[no-any-return]
