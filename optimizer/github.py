"""GitHub's workflow commands: lines that its runner turns into annotations; light, for errors are told with it too."""

from __future__ import annotations

import os
from collections.abc import Iterator

from optimizer.errors import RecipeError


def is_github() -> bool:
    """Tell whether a GitHub workflow runs this."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def command(name: str, message: str, **properties: object) -> str:
    """Return a workflow command such as `::error title=...::message`, escaped as the runner reads it."""
    listed = ",".join(f"{key}={_property(str(value))}" for key, value in properties.items())
    return f"::{name} {listed}::{_data(message)}"


def error_commands(message: str, error: Exception) -> Iterator[str]:
    """Yield what annotates an error: each mistake of a recipe at its line, else the message."""
    mistakes = error.mistakes if isinstance(error, RecipeError) else ()
    for mistake in mistakes:
        place = {"file": mistake.file, "line": mistake.line, "col": mistake.column} if mistake.line else {}
        yield command("error", mistake.message if place else str(mistake), **(place or {"title": "optimize"}))
    if not mistakes:
        yield command("error", message, title="optimize")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
