"""Sentence-transformers files as their users find them beside a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREFIX = "sentence_transformers.models."


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_modules(folder: Path, kinds: Sequence[str]) -> None:
    """Write `modules.json` of modules such as "Pooling", the first in the folder itself."""
    places = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": place, "type": kind if "." in kind else PREFIX + kind}
        for index, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    write_json(folder / "modules.json", modules)


def write_sentence_files(folder: Path, *, normalize: bool = True, **pooling: Any) -> None:
    """Write the files of an embedder; `pooling` is what its pooling module's `config.json` holds."""
    write_modules(folder, ["Transformer", "Pooling", *(["Normalize"] if normalize else [])])
    write_json(folder / "1_Pooling" / "config.json", pooling)
