"""Which items a gate may use, and in what portions it asks for them. Groups and questions stay whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from optimizer.evaluate.items import Item
from optimizer.gate import looks

SEARCH_SHARE = 0.25


@dataclass(frozen=True)
class Part:
    """Items of one evaluation that one kind of decision may use, in the portions in which it asks for them."""

    portions: tuple[tuple[Item, ...], ...]

    @property
    def items(self) -> list[Item]:
        """Return all items."""
        return [item for portion in self.portions for item in portion]

    @property
    def units(self) -> int:
        """Return how many scores all items make."""
        return count_units(self.items)


def whole(items: Sequence[Item]) -> Part:
    """Return all items as one portion."""
    return Part((tuple(items),))


def topped_up(items: Sequence[Item]) -> Part:
    """Return items in portions that end where a gate may look, each moved to the end of a group.

    Args:
        items: in a random order of their groups, so that the first few are a random sample of groups.
    """
    portions: list[tuple[Item, ...]] = []
    current: list[Item] = []
    done, ends = 0, list(looks(count_units(items)))
    for group in _groups(items):
        current += group
        done += count_units(group)
        if done >= ends[0]:
            portions.append(tuple(current))
            current = []
            ends = [end for end in ends if end > done]
    return Part(tuple(portions))


def halves(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Split items into those that choose and those that judge: a quarter of the groups, by a hash of their names."""
    groups = sorted(
        {item.group for item in items}, key=lambda group: hashlib.sha256(f"search {group}".encode()).digest()
    )
    chosen = set(groups[: round(SEARCH_SHARE * len(groups))])
    return [item for item in items if item.group in chosen], [item for item in items if item.group not in chosen]


def count_units(items: Sequence[Item]) -> int:
    """Return how many scores the items make: several items of one question make one."""
    return sum(
        item.unit is None or index == 0 or item.unit != items[index - 1].unit for index, item in enumerate(items)
    )


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Yield runs of items of one group."""
    for _, run in groupby(items, key=lambda item: item.group):
        yield list(run)
