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
        _require_unseen(f"{where}: data.{name}", items, judged)
        made[name] = [item.ids for item in items]
    return made


def _named_data(step: Pass) -> list[str]:
    named = [getattr(step, option.name) for option in fields(step) if option.metadata.get("names") == "data"]
    return [name for name in named if name is not None]


def _require_unseen(where: str, items: Sequence[Item], judged: Mapping[str, Sequence[Item]]) -> None:
    """Refuse texts of an evaluation: a model calibrated on them would be judged on what it has seen."""
    for name, others in judged.items():
        known = {item.ids for item in others}
        seen = sum(item.ids in known for item in items)
        if seen:
            raise DataError(
                f"{where}: {seen} of {len(items)} calibration texts have the same token ids as texts of "
                f"evaluate.{name}, expected none; calibrate on other texts"
            )
