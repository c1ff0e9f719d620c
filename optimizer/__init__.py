"""The driver: a recipe in, gated passes, an artifact out. `run` is the Python door; the rest serves it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from optimizer.record import Run

__all__ = ["run"]


def run(
    path: str | PathLike[str],
    settings: Sequence[str] = (),
    *,
    output: str | PathLike[str] | None = None,
    store: str | PathLike[str] | None = None,
    stop_after: str | None = None,
    keep: bool = False,
    reporter: Literal["live", "plain", "quiet"] = "quiet",
) -> Run:
    """Run a recipe, as `optimize PATH` does.

    Args:
        path: the recipe.
        settings: what to change in it, such as `passes.0.group_size=32`.
        output: folder of the artifact; `artifacts/NAME` if not given.
        store: folder of what the passes made; the user's cache if not given.
        stop_after: name of the last pass to run.
        keep: keep the artifact even when a gate failed or was inconclusive.
        reporter: what is shown while it runs.

    Raises:
        OptimizeError: the recipe is wrong, or the work cannot be done; carries an exit code.
    """
    from optimizer.recipe_reader import load

    recipe = load(Path(path), settings)
    if stop_after is not None:
        recipe.index_of(stop_after)

    from optimizer import pipeline

    return pipeline.run(
        recipe,
        output=None if output is None else Path(output),
        store=None if store is None else Path(store),
        stop_after=stop_after,
        keep=keep,
        reporter=reporter,
    )
