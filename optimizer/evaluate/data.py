"""Read the local files of a recipe's data with `datasets`: no network, no telemetry, nothing left behind."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import ExitCode, OptimizeError
from optimizer.reader import suggest

if TYPE_CHECKING:
    from optimizer.recipe import DataSource


class DataError(OptimizeError):
    """The data that a recipe names cannot be used."""

    exit_code = ExitCode.WRONG_INPUT


@dataclass(frozen=True)
class Row:
    """One row of a data file; `where` names file and row, counted from 1, for messages; `label` is as found."""

    where: str
    text: str
    group: str | None
    label: object


def read_rows(source: DataSource) -> list[Row]:
    """Read the named columns of local files with `datasets`: no network, no telemetry, nothing left behind.

    Raises:
        DataError: a file cannot be read, is empty, lacks a column, or has a row without its text, group or label.
    """
    rows: list[Row] = []
    for path in source.files:
        rows += _read_file(path, source)
        if source.items is not None and len(rows) >= source.items:
            break
    if not rows:
        raise DataError(f"{', '.join(map(str, source.files))}: got no rows, expected at least one")
    return rows[: source.items]


def _read_file(path: Path, source: DataSource) -> list[Row]:
    named = {"text": source.text, "group": source.group, "label": source.label}
    columns = {part: column for part, column in named.items() if column is not None}
    with tempfile.TemporaryDirectory(prefix="optimize-data-") as cache, _quiet_datasets():
        dataset = _read_dataset(path, source.format, cache)
        present = dataset.column_names
        for part, column in columns.items():
            if column not in present:
                raise DataError(f"{path}: no column {column!r} for the {part}{suggest(column, present)}")
        cells = {part: dataset[column][: source.items] for part, column in columns.items()}
        del dataset
    count = len(cells["text"])
    rows = zip(cells["text"], cells.get("group", [None] * count), cells.get("label", [None] * count), strict=True)
    return [
        _row(f"{path}: row {number}", columns, dict(zip(named, row, strict=True))) for number, row in enumerate(rows, 1)
    ]


def _row(where: str, columns: Mapping[str, str], cells: Mapping[str, Any]) -> Row:
    for part, column in columns.items():
        if cells[part] is None:
            raise DataError(f"{where}: {column}: got nothing, expected a {part}; fill it in or remove the row")
    if not isinstance(cells["text"], str):
        raise DataError(f"{where}: {columns['text']}: got {cells['text']!r:.60}, expected a text")
    group = None if cells["group"] is None else str(cells["group"])
    return Row(where, cells["text"], group, cells["label"])


def _read_dataset(path: Path, form: str, cache: str) -> Any:
    import datasets

    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a {form} file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty, expected rows")
    # `Dataset.from_*` builds in place; `load_dataset` would report every use to the Hub's download counter.
    try:
        if form == "json":
            return datasets.Dataset.from_json(str(path), cache_dir=cache)
        # Unless told, the CSV reader takes texts such as "null" or "NA" for missing.
        return datasets.Dataset.from_csv(str(path), cache_dir=cache, keep_default_na=False)
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{path}: got a header without rows, expected rows") from None
        reason = first_line(error.__cause__ or error)
        raise DataError(f"{path}: cannot be read as {form}: {reason}") from None


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the library's progress bars and log lines off the terminal: the error that is raised says it all."""
    import datasets

    log = logging.getLogger("datasets")
    level, had_bars = log.level, not datasets.are_progress_bars_disabled()
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
