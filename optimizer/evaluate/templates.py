"""Text made of a row's cells: `{column}` stands for a cell, and nothing is ever run.

`{choices.text}` is a key of a mapping, `{choices.0}` an element of a list; `{{` and `}}` are braces. A template that is
one placeholder and nothing else, of a cell that holds a list, stands for all its elements.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from optimizer.evaluate.data import DataError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ALONE = re.compile(r"\{([^{}]+)\}")


def check_template(template: str) -> None:
    """Raise ValueError for a brace that opens or closes nothing, and for `{}`."""
    for piece in _PIECE.finditer(template):
        if piece[0] in ("{", "}", "{}"):
            raise ValueError(f"got {template!r}, expected {{column}} for a cell and {{{{ or }}}} for a brace")


def check_named(name: str, template: str) -> None:
    """Check the template of a field; raise ValueError `field: got X, expected Y`."""
    try:
        check_template(template)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def columns_of(template: str, present: Sequence[str]) -> list[str]:
    """Return the columns that a template names, each once, in order."""
    names = [piece[1] for piece in _PIECE.finditer(template) if piece[1]]
    return list(dict.fromkeys(_split(name, present)[0] for name in names))


def render(template: str, cells: Mapping[str, Any], where: str) -> str:
    """Return the template with each placeholder replaced.

    Raises:
        DataError: a cell has no such part, or is no text and no number; names `where`.
    """

    def piece(found: re.Match[str]) -> str:
        return _text(cell(found[1], cells, where), found[1], where) if found[1] else found[0][0]

    return _PIECE.sub(piece, template)


def render_all(templates: str | Sequence[str], cells: Mapping[str, Any], where: str) -> list[str]:
    """Return the text of each template; a single placeholder of a list gives one text for each element."""
    if not isinstance(templates, str):
        return [render(template, cells, where) for template in templates]
    alone = _ALONE.fullmatch(templates)
    value = cell(alone[1], cells, where) if alone else None
    if alone and isinstance(value, list):
        return [_text(element, alone[1], where) for element in value]
    return [render(templates, cells, where)]


def cell(name: str, cells: Mapping[str, Any], where: str) -> Any:
    """Return what a placeholder's name stands for."""
    column, path = _split(name, list(cells))
    value = cells.get(column)
    for key in path:
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise DataError(f"{where}: {name}: got {value!r:.60}, which has no {key!r}; correct the row or the recipe")
    return value


def _split(name: str, present: Sequence[str]) -> tuple[str, list[str]]:
    """Return the column and the path below it; a column whose own name has dots comes first."""
    if name in present:
        return name, []
    column, *path = name.split(".")
    return column, path


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{where}: {name}: got {value!r:.60}, expected a text or a number")
