"""What made an artifact, exactly: versions, hashes of what went in, and the machine's kind. No dates, no paths."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from runtime.artifact import canonical_json

PROJECT = "optimize-models"
PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "tokenizers", "torch", "transformers")
"""Distributions whose version may change what a pass makes or what a score is."""


def versions() -> dict[str, str]:
    """Return the version of Python and of every package of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        for distribution in (name, f"{name}-gpu"):
            try:
                found[distribution] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
    return found


def machine() -> dict[str, str]:
    """Return what of this machine may change the last bits of a number."""
    return {"system": platform.system(), "machine": platform.machine()}


def lock_text(inputs: Mapping[str, Any]) -> bytes:
    """Return the content of `optimize.lock`: `inputs`, and the versions, our own with them."""
    return canonical_json({"versions": own_version() | versions(), "machine": machine(), **inputs})


def own_version() -> dict[str, str]:
    """Return the version of this project, empty where it runs without being installed."""
    try:
        return {PROJECT: metadata.version(PROJECT)}
    except metadata.PackageNotFoundError:
        return {}
