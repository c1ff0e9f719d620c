"""Read the local files of a recipe's data with `datasets`: no network, no telemetry, nothing left behind."""

from __future__ import annotations

import csv
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from optimizer.errors import ExitCode, OptimizeError
from optimizer.reader import suggest
from passes._kind import first_line

if TYPE_CHECKING:
    from optimizer.recipe import DataSource


class DataError(OptimizeError):
    """The data that a recipe names cannot be used."""

    exit_code = ExitCode.WRONG_INPUT


LONGEST_CELL = 2**31 - 1
"""Characters; the `csv` module's own limit is shorter than many documents."""

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


def csv_rows(path: Path) -> Iterator[list[str]]:
    """Yield the header of a CSV file, then its rows; blank lines are none.

    Raises:
        DataError: it is not UTF-8, quotes in it do not match, or a row has more cells than the header.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open("rb") as file:
            yield from _whole_rows(path, csv.reader(_lines(path, file), strict=True))
    finally:
        csv.field_size_limit(limit)


def _whole_rows(path: Path, reader: Any) -> Iterator[list[str]]:
    """Yield the rows of a `csv.reader`; the first that is malformed ends them."""
    width = count = 0  # of the header, and of the rows with it
    begun = 1  # line
    try:
        for row in reader:
            if any(cell.strip() for cell in row) or len(row) > 1:
                width = width or len(row)
                if len(row) > width:
                    raise DataError(
                        f"{path}: row {count} (line {begun}): got {len(row)} cells, expected at most {width}, as in "
                        "the header; put a cell that holds a comma between double quotes"
                    )
                yield row
                count += 1
            begun = reader.line_num + 1
    except csv.Error:
        raise DataError(
            f"{path}: {f'row {count}' if count else 'header'} (line {begun}): its double quotes do not match, expected "
            "one at either end of a cell; write one that is part of the text twice"
        ) from None


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a file, ends kept: all that `csv` takes for one."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            got = f"the byte {line[error.start]:#04x}"
            raise DataError(f"{path}: line {number}: got {got}, expected UTF-8; save the file as UTF-8") from None
        if "\0" in text:
            raise DataError(f"{path}: line {number}: got a NUL character, expected text; save the file as UTF-8")
        yield from io.StringIO(text, newline="")


def require_file(path: Path, form: str) -> None:
    """Refuse what is no file, or an empty one."""
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a {form} file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty, expected rows")


def _read_dataset(path: Path, form: str, cache: str) -> Any:
    import datasets

    require_file(path, form)
    if form == "csv":
        for _ in csv_rows(path):  # the library reads some malformed files as others than they are
            pass
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
