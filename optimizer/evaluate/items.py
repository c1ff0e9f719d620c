"""What is evaluated: token ids made once, by the model's own tokenizer, so that every model answers the same thing."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import numpy as np

from optimizer.errors import CannotRun
from optimizer.evaluate.data import DataError, Record, Row, read_rows
from optimizer.evaluate.task import phase_of
from optimizer.evaluate.text_reader import TextReader
from optimizer.quantities import check_ranges

if TYPE_CHECKING:
    from optimizer.evaluate.task import Task
    from optimizer.recipe import DataSource

ENCODE_AT_ONCE = 1024
AnyRow = TypeVar("AnyRow", Row, Record)


@dataclass(frozen=True, kw_only=True)
class TopUp:
    """So many items at most: a gate that fewer have decided asks for no more."""

    most: int = field(metadata={"help": "most items; gates look at an eighth, a quarter, a half and all", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)


def limit_of(items: int | TopUp | None) -> int | None:
    """Return how many items a task takes at most, None for all."""
    return items.most if isinstance(items, TopUp) else items


@dataclass(frozen=True)
class Item:
    """One document, request or labelled text; tasks that need more of it have a subclass.

    Attributes:
        ids: token ids, special tokens included, cut to the task's context.
        group: items of one group are not independent; unique where the data has no groups.
        label: index of the right class or choice, None where there is none.
    """

    ids: tuple[int, ...]
    group: str
    label: int | None = None

    @property
    def first(self) -> int:
        """Return the first position whose logits are asked for."""
        return 0

    @property
    def unit(self) -> int | None:
        """Return which question it belongs to, where several items are scored as one; None where each is by itself."""
        return None

    @property
    def texts(self) -> tuple[tuple[int, ...], ...]:
        """Return the ids of each text that an embedder makes a vector of."""
        return (self.ids,)

    @property
    def types(self) -> tuple[int, ...]:
        """Return which text each token belongs to, 0 or 1; empty where there is one text alone."""
        return ()


@dataclass(frozen=True)
class Document(Item):
    """A text after BOS, for a decoder.

    Attributes:
        ids: BOS, then those of `text`, so that the model is asked for every byte of it.
        text: what the other ids stand for, whole characters.
    """

    text: str = ""


def items_hash(items: Sequence[Item], context: int | None) -> str:
    """Return the sha256, in hexadecimal, of `context` and all that the items hold."""
    digest = hashlib.sha256(f"{context} {len(items)}\n".encode())
    for item in items:
        more = [getattr(item, name) for name in item.__dataclass_fields__ if name not in ("ids", "label", "group")]
        # The header says how many ids follow, so that no two lists of items spell the same bytes.
        digest.update(json.dumps([len(item.ids), item.label, item.group, *more]).encode() + b"\n")
        digest.update(np.asarray(item.ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def tokens_read(tasks: Mapping[str, Task], items: Mapping[str, Sequence[Item]]) -> int:
    """Count the tokens that a model reads and writes to be scored.

    Tasks whose items are equal share one reading for each phase.
    """
    distinct = {(items_hash(items[name], 0), phase_of(task)): items[name] for name, task in tasks.items()}
    read = sum(len(text) for chosen in distinct.values() for item in chosen for text in item.texts)
    return read + sum(getattr(task, "max_tokens", 0) * len(items[name]) for name, task in tasks.items())


def majority_share(items: Sequence[Item]) -> float | None:
    """Return the share of the most frequent label: what a model that reads nothing gets right. None without labels."""
    labels = Counter(item.label for item in items if item.label is not None)
    return labels.most_common(1)[0][1] / len(items) if labels else None


class Reading(Protocol):
    """How items are made of data; equal readings of one source make the same items."""

    def __hash__(self) -> int:
        """Return a hash of what decides the items."""

    def load(self, source: DataSource, reader: TextReader) -> list[Item]:
        """Read the files and return the items.

        Raises:
            DataError: a file cannot be used.
            CannotRun: the tokenizer does not fit the model.
        """


@runtime_checkable
class OwnReading(Protocol):
    """How items are made where the task itself knows its data."""

    def __hash__(self) -> int:
        """Return a hash of what decides the items."""

    def load_own(self, reader: TextReader) -> list[Item]:
        """Return the items; raise CannotRun where that fails."""


@dataclass(frozen=True)
class Texts:
    """Documents, or texts with labels: one item for each row.

    Attributes:
        context: most tokens of an item.
        bos: whether a decoder's text begins with BOS.
        limit: most items; they are a random sample.
    """

    context: int
    bos: bool = False
    limit: int | None = None

    def load(self, source: DataSource, reader: TextReader) -> list[Item]:
        """Read the rows, draw the sample, encode the texts."""
        rows = read_rows(source)
        chosen = rows if self.limit is None else shuffled(rows)
        return make_items(chosen, reader, self.context, bos=self.bos, limit=self.limit)


def load_items(tasks: Mapping[str, Task], data: Mapping[str, DataSource], reader: TextReader) -> dict[str, list[Item]]:
    """Return the items of every task; tasks that read the same data the same way get the same list.

    Raises:
        DataError: a file cannot be used.
        CannotRun: the tokenizer does not fit the model, or a task cannot score this kind of model.
    """
    made: dict[tuple[str, Reading | OwnReading], list[Item]] = {}
    result = {}
    for name, task in tasks.items():
        _check_fit(name, task, data, reader)
        reading = task.reading
        key = (task.data, reading)
        if key not in made:
            if isinstance(reading, OwnReading):
                made[key] = reading.load_own(reader)
            else:
                made[key] = reading.load(data[task.data], reader)
        result[name] = made[key]
    return result


def _check_fit(name: str, task: Task, data: Mapping[str, DataSource], reader: TextReader) -> None:
    if reader.kind not in task.kinds:
        wanted = " or ".join(task.kinds)
        raise CannotRun(f"evaluate.{name}: cannot score this kind of model, got {reader.kind}, expected {wanted}")
    if phase_of(task) == "decode" and reader.kind != "decoder":
        raise CannotRun(f"evaluate.{name}: phase: got decode, expected prefill; {reader.kind}s do not write answers")
    if task.needs_labels and data[task.data].label is None:
        raise DataError(f"evaluate.{name}: data.{task.data} names no label column; add `label: COLUMN` to it")


def shuffled(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Return rows in the order of a hash of their group, else text: the first few are a sample of whole groups."""

    def place(row: AnyRow) -> tuple[str, str]:
        group = row.text if row.group is None else row.group
        return hashlib.sha256(group.encode()).hexdigest(), group

    return sorted(rows, key=place)


def make_items(
    rows: Sequence[Row], reader: TextReader, context: int, *, bos: bool = False, limit: int | None = None
) -> list[Item]:
    """Turn rows into at most `limit` items. A decoder's text of fewer than two tokens predicts nothing and is left out.

    Raises:
        DataError: a label is not one of the model's, or nothing is left.
    """
    items: list[Item] = []
    for start in range(0, len(rows), ENCODE_AT_ONCE):
        chunk = rows[start : start + ENCODE_AT_ONCE]
        encoded = reader.encode([row.text for row in chunk], context, bos=bos)
        for number, (row, ids) in enumerate(zip(chunk, encoded, strict=True), start):
            if reader.kind == "decoder" and len(ids) < 2:
                continue
            if not ids:
                raise DataError(f"{row.where}: got a text without tokens, expected at least one")
            is_labelled = reader.kind == "classifier" and row.label is not None
            label = _label_index(row.where, row.label, reader.labels) if is_labelled else None
            group = str(number) if row.group is None else row.group
            if reader.kind == "decoder" and bos and reader.bos is not None:
                items.append(_document(row.text, ids, group, reader, reader.longest(context) or context))
            else:
                items.append(Item(ids, group, label))
        if limit is not None and len(items) >= limit:
            return items[:limit]
    if not items:
        raise DataError(f"{rows[0].where} and the rest: got no text of two tokens or more, expected documents")
    return items


def _document(text: str, ids: tuple[int, ...], group: str, reader: TextReader, context: int) -> Document:
    """Return a document that begins with BOS, and its text; a cut within a character is moved before it."""
    if len(ids) < context:
        return Document(ids, group, text=text)
    ends, kept = reader.ends(text), len(ids) - 1
    if kept == len(ends):
        return Document(ids, group, text=text)
    while kept > 1 and ends[kept] == ends[kept - 1]:
        kept -= 1
    return Document(ids[: kept + 1], group, text=text[: ends[kept - 1]])


def encoded_again(items: Sequence[Item], reader: TextReader) -> list[Document]:
    """Return the same documents in the ids of another tokenizer, so that models of two vocabularies can be compared.

    Raises:
        ValueError: a document does not begin with BOS, or is longer than the model reads.
    """
    found = []
    for index, item in enumerate(items):
        if not isinstance(item, Document) or reader.bos is None:
            raise ValueError(f"items: item {index}: does not begin with BOS, so that its first token is not predicted")
        (ids,) = reader.encode([item.text], sys.maxsize, bos=True)
        if len(reader.ends(item.text)) + 1 != len(ids):
            raise ValueError(
                f"items: item {index}: got more than the {len(ids)} tokens the model reads; cut it shorter"
            )
        found.append(Document(ids, item.group, text=item.text))
    return found


def _label_index(where: str, value: object, labels: Mapping[str, int]) -> int:
    """Return the index of a class given by name or number."""
    index = labels.get(str(value))
    if index is None and str(value).isdecimal():
        index = int(str(value))
    if index is None or not 0 <= index < len(labels):
        close = difflib.get_close_matches(str(value), labels, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = f"a name of the model's id2label or a number from 0 to {len(labels) - 1}"
        raise DataError(f"{where}: unknown label, got {value!r}, expected {known}{hint}")
    return index
