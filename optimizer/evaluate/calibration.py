"""Texts that show a pass what its model meets: token ids, and never those that the model is judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from optimizer.evaluate.data import DataError, read_rows
from optimizer.evaluate.items import Item, make_items, shuffled
from optimizer.evaluate.text_reader import TextReader

if TYPE_CHECKING:
    from optimizer.recipe import DataSource
    from passes.base import Pass

BEGINNING = 200
"""Characters that two texts share by more than chance."""

Calibration = Mapping[str, Sequence[tuple[int, ...]]]


def load_calibration(
    step: Pass, where: str, data: Mapping[str, DataSource], reader: TextReader, judged: Mapping[str, Sequence[Item]]
) -> Calibration:
    """Return the token ids of each entry of `data` that a pass names: `samples` texts at most, cut to its `context`.

    Raises:
        DataError: a file cannot be used, or a text is one that the model is judged on.
    """
    made: dict[str, Sequence[tuple[int, ...]]] = {}
    for name in _named_data(step):
        options: Any = step
        items = make_items(shuffled(read_rows(data[name])), reader, options.context, bos=True, limit=options.samples)
        require_unseen(f"{where}: data.{name}", items, judged, reader)
        made[name] = [item.ids for item in items]
    return made


def _named_data(step: Pass) -> list[str]:
    named = [getattr(step, option.name) for option in fields(step) if option.metadata.get("names") == "data"]
    return [name for name in named if name is not None]


def require_unseen(where: str, items: Sequence[Item], judged: Mapping[str, Sequence[Item]], reader: TextReader) -> None:
    """Refuse texts of an evaluation: a model calibrated on them would be judged on what it has seen."""
    shown = _plain_texts(items, reader)
    for name, others in judged.items():
        seen = _count_seen(shown, _plain_texts(others, reader))
        if seen:
            raise DataError(
                f"{where}: {seen} of {len(items)} calibration texts are texts of evaluate.{name}, or begin as one "
                "does, expected none; calibrate on other texts"
            )


def _plain_texts(items: Sequence[Item], reader: TextReader) -> list[str]:
    """Return the texts without special tokens, case and white space, as far as the model reads them."""
    decode = reader.tokenizer.decode
    return [" ".join(decode(list(text)).casefold().split()) for item in items for text in item.texts]


def _count_seen(shown: Sequence[str], judged: Sequence[str]) -> int:
    """Count the texts that are among others, or the same as one of them for as long as the shorter of the two is.

    Short texts, of less than BEGINNING characters, are compared as a whole: "what is" begins many questions.
    """
    beginnings: dict[str, list[str]] = {}
    for text in judged:
        beginnings.setdefault(text[:BEGINNING], []).append(text)
    return sum(
        any(text.startswith(other) or other.startswith(text) for other in beginnings.get(text[:BEGINNING], ()))
        for text in shown
    )
