"""Which columns of a data file hold what a recipe asks for, told by their names alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optimizer.evaluate.data import DataError, csv_rows, require_file
from passes._kind import first_line

_HINT_AT = 22
"""Column of the recipe's line, after its indent, at which its comment begins."""


@dataclass(frozen=True)
class Column:
    """One key of an entry of `data`: the name of a column.

    Attributes:
        key: such as "text".
        names: what such columns are called, the most usual first.
        hint: what it holds, for a comment.
        is_needed: whether the recipe cannot do without; else it stands in a comment where no column fits.
    """

    key: str
    names: tuple[str, ...]
    hint: str
    is_needed: bool = True

    def lines(self, file: str, present: Sequence[str] | None) -> list[str]:
        """Return the recipe's lines.

        Args:
            file: the data file, as the user named it.
            present: its columns; None where it is not there yet.
        """
        found = None if present is None else self.found(present)
        mark = "" if found or self.is_needed else "# "
        line = f"{f'{mark}{self.key}: {found or self.names[0]}':<{_HINT_AT}}# {self.hint}"
        if present is None or found or not self.is_needed:
            return [line]
        there = ", ".join(json.dumps(name, ensure_ascii=False) for name in present)
        return [f"# set `{self.key}` to one of the columns of {json.dumps(file)}: {there}", line]

    def found(self, present: Sequence[str]) -> str | None:
        """Return the column of one of the names, in that order; exactly so called, or else in other letters' case."""
        lowered = {name.lower(): name for name in reversed(present)}
        exact = (name for name in self.names if name in present)
        return next(exact, None) or next((lowered[name] for name in self.names if name in lowered), None)


def columns_of(path: Path) -> list[str]:
    """Return the header of a CSV file, or the keys of the first row of a JSON file.

    Raises:
        DataError: the file has none, or cannot be read so far.
    """
    form = form_of(path)
    require_file(path, form)
    names = next(csv_rows(path), []) if form == "csv" else _keys(path)
    if not names:
        raise DataError(f"{path}: got no columns, expected rows with a text")
    return names


def form_of(path: Path) -> str:
    """Return what a recipe calls the format of a file, by its name."""
    return "csv" if path.suffix.lower() == ".csv" else "json"


def _keys(path: Path) -> list[str]:
    """Return the keys of the first of several objects, a line each or in an array."""
    try:
        first, _ = json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8-sig").lstrip())
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as json: {first_line(error)}") from None
    row = first[0] if isinstance(first, list) and first else first
    if not isinstance(row, dict):
        raise DataError(f"{path}: row 1: got {row!r:.60}, expected an object with a text in it")
    return list(row)
