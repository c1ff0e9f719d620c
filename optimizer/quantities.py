"""Numbers a recipe writes with a unit, and the ranges a dataclass field may state in its metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

NUMBER = r"\d+(?:\.\d+)?"


class Percent(float):
    """A fraction written as a percentage: `1%` is 0.01."""

    pattern = rf"^{NUMBER} ?%$"
    expected = "a percentage such as 1%"

    @classmethod
    def parse(cls, text: str) -> Percent:
        """Read `1%`; raise ValueError for anything else, a bare number included."""
        if not re.fullmatch(cls.pattern, text):
            raise ValueError(cls.expected)
        return cls(float(text.rstrip("% ")) / 100)


@dataclass(frozen=True)
class Drop:
    """A loss of score: `1pt` is one percentage point, `1%` one per cent of the source's score.

    Attributes:
        value: the fraction, 0.01 for both.
        relative: whether it is a share of the source's score.
    """

    value: float
    relative: bool

    pattern = rf"^{NUMBER} ?(pt|%)$"
    expected = "a drop such as 1pt (percentage points) or 1% (of the source's score)"

    @classmethod
    def parse(cls, text: str) -> Drop:
        """Read `1pt` or `1%`; raise ValueError for anything else, a bare number included."""
        if not re.fullmatch(cls.pattern, text):
            raise ValueError(cls.expected)
        return cls(float(text.rstrip("pt% ")) / 100, relative=text.endswith("%"))

    def __str__(self) -> str:
        return f"{self.value * 100:g}{'%' if self.relative else 'pt'}"


def range_mistake(value: Any, metadata: Any) -> str | None:
    """Say what is expected when `value` leaves the range in a field's metadata (ge, gt, le, lt), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    allowed = [
        value >= metadata.get("ge", value),
        value <= metadata.get("le", value),
        "gt" not in metadata or value > metadata["gt"],
        "lt" not in metadata or value < metadata["lt"],
    ]
    return None if all(allowed) else describe_range(metadata)


def describe_range(metadata: Any) -> str:
    """Say a field's range in words: `at least 2`, `above 0 and below 0.5`."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{word} {metadata[key]}" for key, word in words.items() if key in metadata)


def check_ranges(spec: Any) -> None:
    """Raise ValueError `field: got X, expected Y` for the first field outside the range its metadata states."""
    for option in fields(spec):
        value = getattr(spec, option.name)
        expected = range_mistake(value, option.metadata)
        if expected:
            raise ValueError(f"{option.name}: got {value}, expected {expected}")
