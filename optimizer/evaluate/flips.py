"""Items whose answer changed, in words: what was asked, what the source said, what the model says now.

A task that has answers (a class, a choice, a text, the most likely next token) has a method `flips`; see `Answering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from optimizer.record import Effect, Flip, Flips

if TYPE_CHECKING:
    from optimizer.evaluate.items import Item
    from optimizer.evaluate.result import TaskResult
    from optimizer.evaluate.task import Task
    from optimizer.evaluate.text_reader import TextReader

SHOWN = 20
"""Flips of a run that are told in words."""
LONGEST = 200
"""Characters of a text that are told."""


@dataclass(frozen=True)
class Changed:
    """The answers of one task that changed.

    Attributes:
        changed: how many.
        answers: of how many.
        order: indices of items that can be told, what became worse first.
        tell: says in words what became of one of them.
        unit: what an answer is.
    """

    changed: int
    answers: int
    order: Sequence[int]
    tell: Callable[[int], Flip]
    unit: str = "answers"


@runtime_checkable
class Answering(Protocol):
    """A task whose answers can be told in words."""

    def flips(self, items: Sequence[Item], before: TaskResult, after: TaskResult, reader: TextReader) -> Changed | None:
        """Return the items whose answer changed; None where the results do not hold the answers."""


def find_flips(
    tasks: Mapping[str, Task],
    items: Mapping[str, Sequence[Item]],
    before: Mapping[str, TaskResult],
    after: Mapping[str, TaskResult],
    reader: TextReader,
) -> tuple[Flips, ...]:
    """Return what changed in each task that has answers; `SHOWN` of it in words, shared out evenly among the tasks."""
    changed = {
        name: found
        for name, task in tasks.items()
        if isinstance(task, Answering) and (found := task.flips(items[name], before[name], after[name], reader))
    }
    shares = _shares([len(found.order) for found in changed.values()], SHOWN)
    told = set[tuple[str, str, str]]()
    return tuple(
        Flips(name, found.changed, found.answers, found.unit, tuple(islice(_new(found, told), share)))
        for (name, found), share in zip(changed.items(), shares, strict=True)
    )


def _new(found: Changed, told: set[tuple[str, str, str]]) -> Iterator[Flip]:
    """Tell the changed items but those that another task on the same texts has told already; note them in `told`."""
    for flip in map(found.tell, found.order):
        key = flip.input, flip.before, flip.after
        if key not in told:
            told.add(key)
            yield flip


def _shares(wanted: Sequence[int], most: int) -> list[int]:
    """Share `most` out among those who want so many each: evenly, and what some do not need goes to the others."""
    given = [0] * len(wanted)
    for place in sorted(range(len(wanted)), key=lambda place: wanted[place]):
        waiting = sum(1 for other, count in enumerate(wanted) if not given[other] and count)
        given[place] = min(wanted[place], -(-most // waiting)) if waiting else 0
        most -= given[place]
    return given


def changed_classes(
    before: NDArray[Any],
    after: NDArray[Any],
    right: Sequence[int | None],
    asked: Callable[[int], str],
    name: Callable[[int, int], str],
) -> Changed:
    """Compare answers that are numbers of classes or choices.

    Args:
        before: of the source [n]; NaN where it gave no number.
        after: of the model [n].
        right: of each item, None where it is not known.
        asked: says what item i asks.
        name: says what the number k means for item i.
    """
    sides = before, after
    was, now = ([answer == label for answer, label in zip(side, right, strict=True)] for side in sides)
    effect = effects(was, now)

    def tell(index: int) -> Flip:
        first, second = (name(index, int(side[index])) if np.isfinite(side[index]) else "nan" for side in sides)
        label = right[index]
        expected = None if label is None else name(index, label)
        return Flip(index + 1, beginning(asked(index)), first, second, expected, effect[index])

    return changed_items(before != after, effect, tell)


def changed_items(
    is_changed: Sequence[bool] | NDArray[np.bool_], effect: Sequence[Effect], tell: Callable[[int], Flip]
) -> Changed:
    """Return what `tell` tells of the changed items: of those that became worse, then better, then of the others."""
    order = ("worse", "better", "other")
    changed = sorted(np.flatnonzero(is_changed).tolist(), key=lambda index: (order.index(effect[index]), index))
    return Changed(len(changed), len(effect), changed, tell)


def effects(was_right: Sequence[bool], is_right: Sequence[bool]) -> list[Effect]:
    """Return what a change did to each item."""
    words: Mapping[tuple[bool, bool], Effect] = {(True, False): "worse", (False, True): "better"}
    return [words.get((bool(was), bool(now)), "other") for was, now in zip(was_right, is_right, strict=True)]


def beginning(text: str) -> str:
    """Return a text cut to `LONGEST` characters at its end."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def ending(text: str) -> str:
    """Return a text cut to `LONGEST` characters at its beginning."""
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"
