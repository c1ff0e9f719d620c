"""Read the local files of a recipe's data with `datasets`: no network, no telemetry, nothing left behind."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import ExitCode, OptimizeError
from optimizer.reader import suggest
from passes._kind import first_line

if TYPE_CHECKING:
    from optimizer.recipe import DataSource


class DataError(OptimizeError):
    """The data that a recipe names cannot be used."""

    exit_code = ExitCode.WRONG_INPUT


Choose = Callable[[Sequence[str]], Iterable[tuple[str, str]]]
"""Takes the names of all columns, returns (what for, column) of those to read."""


@dataclass(frozen=True)
class Row:
    """One row of a data file; `where` names file and row, counted from 1, for messages; `label` is as found."""

    where: str
    text: str
    group: str | None
    label: object


@dataclass(frozen=True)
class Record:
    """One row of a data file with several columns that matter.

    Attributes:
        where: file and row, counted from 1, for messages.
        cells: column -> what stands there; lists and mappings where the file has them.
        group: what ties it to other rows.
    """

    where: str
    cells: Mapping[str, Any]
    group: str | None

    @property
    def text(self) -> str:
        """Return all cells as one text."""
        return json.dumps(self.cells, sort_keys=True, default=str)


def read_rows(source: DataSource) -> list[Row]:
    """Read the text, label and group columns of local files.

    Raises:
        DataError: a file cannot be read, is empty, lacks a column, or has a row without its text, group or label.
    """
    columns = [("text", source.text)] + ([("label", source.label)] if source.label is not None else [])
    return [_row(record, source) for record in read_records(source, lambda _: columns)]


def _row(record: Record, source: DataSource) -> Row:
    text = record.cells[source.text]
    if not isinstance(text, str):
        raise DataError(f"{record.where}: {source.text}: got {text!r:.60}, expected a text")
    return Row(record.where, text, record.group, None if source.label is None else record.cells[source.label])


def read_records(source: DataSource, choose: Choose) -> list[Record]:
    """Read columns of local files with `datasets`: no network, no telemetry, nothing left behind.

    Args:
        source: the files.
        choose: names the columns and what each is for, given those that are there.

    Raises:
        DataError: a file cannot be read, is empty, lacks a column, or has a row with nothing in one.
    """
    records: list[Record] = []
    for path in source.files:
        records += _read_file(path, source, choose)
        if source.items is not None and len(records) >= source.items:
            break
    if not records:
        raise DataError(f"{', '.join(map(str, source.files))}: got no rows, expected at least one")
    return records[: source.items]


def _read_file(path: Path, source: DataSource, choose: Choose) -> Iterator[Record]:
    with tempfile.TemporaryDirectory(prefix="optimize-data-") as cache, _quiet_datasets():
        dataset = _read_dataset(path, source.format, cache)
        present = dataset.column_names
        parts = [*choose(present), *([("group", source.group)] if source.group is not None else [])]
        for part, column in parts:
            if column not in present:
                raise DataError(f"{path}: no column {column!r} for the {part}{suggest(column, present)}")
        cells = {column: dataset[column][: source.items] for _, column in parts}
        count = min(len(dataset), source.items or len(dataset))
        del dataset
    for number in range(count):
        row = {column: values[number] for column, values in cells.items()}
        where = f"{path}: row {number + 1}"
        for part, column in parts:
            if row[column] is None:
                raise DataError(f"{where}: {column}: got nothing, expected a {part}; fill it in or remove the row")
        yield Record(where, row, None if source.group is None else str(row[source.group]))


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
