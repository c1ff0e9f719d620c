"""What there is to choose from: the passes, found by listing their folder, and the evaluation tasks; never torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from optimizer.evaluate.task import Task
from passes.base import Pass

TASKS = ("perplexity", "classification", "agreement", "similarity", "choice", "generation", "lm_eval")
"""The files of `optimizer/evaluate` that are tasks; the others serve them."""


@dataclass(frozen=True)
class Catalogue:
    """The passes and tasks a recipe may name, by recipe key."""

    passes: Mapping[str, type[Pass]]
    tasks: Mapping[str, type[Task]]


@cache
def installed() -> Catalogue:
    """Return what is shipped: one pass per file of `passes`, and the tasks of `optimizer.evaluate`."""
    return Catalogue(passes=dict(_passes()), tasks=dict(_tasks()))


def class_name(stem: str) -> str:
    """Return the class a file must define: `quantize_rtn` holds `QuantizeRtn`."""
    return "".join(word.capitalize() for word in stem.split("_"))


def _passes() -> Iterator[tuple[str, type[Pass]]]:
    import passes

    for stem in _stems(passes.__path__):
        if stem == "base":
            continue
        module = importlib.import_module(f"passes.{stem}")
        found = [kind for kind in vars(module).values() if _is_pass(kind, module.__name__)]
        if len(found) != 1 or found[0].name() != stem:
            names = ", ".join(kind.__name__ for kind in found) or "none"
            raise ImportError(f"passes/{stem}.py: got the passes {names}, expected exactly {class_name(stem)}")
        yield stem, found[0]


def _is_pass(kind: Any, module: str) -> bool:
    is_public = isinstance(kind, type) and kind.__module__ == module and not kind.__name__.startswith("_")
    return is_public and issubclass(kind, Pass)


def _tasks() -> Iterator[tuple[str, type[Task]]]:
    for stem in TASKS:
        module = importlib.import_module(f"optimizer.evaluate.{stem}")
        yield stem, getattr(module, class_name(stem))


def _stems(folders: object) -> list[str]:
    """List the modules of a package's folders that are not private."""
    assert hasattr(folders, "__iter__")
    files = (file for folder in folders for file in Path(folder).glob("*.py"))
    return sorted(file.stem for file in files if not file.stem.startswith("_"))
