"""What a task is: a frozen dataclass whose fields are recipe keys, and that turns passing logits into scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from optimizer.evaluate.distributions import Rows
    from optimizer.evaluate.items import Item, OwnReading, Reading
    from optimizer.evaluate.result import TaskResult
    from optimizer.evaluate.scorers import Scorer
    from optimizer.evaluate.text_reader import TextReader
    from passes.base import Progress

Phase = Literal["prefill", "decode"]
"""How a decoder reads a text: in chunks, as prompts are read, or token by token, as answers are written."""


def phase_of(task: Task) -> Phase:
    """Return the phase in which a task has its items read."""
    phase: Phase = getattr(task, "phase", "prefill")
    return phase


class Watcher(Protocol):
    """Sees logits pass by."""

    def add(self, rows: Rows) -> None:
        """Take the next rows: each position of each item comes once, those of one item in order."""


class Tally(Watcher, Protocol):
    """Counts what a task wants to know while the logits pass by."""

    def result(self) -> TaskResult:
        """Return the scores, once all rows have come."""


@runtime_checkable
class Inquiry(Protocol):
    """Asks a model by itself, where logits that pass by are not the answer."""

    def ask(self, scorer: Scorer, reader: TextReader | None, progress: Progress) -> None:
        """Ask the model; `reader` turns ids into text and is there where tasks of a recipe are scored."""

    def result(self) -> TaskResult:
        """Return the scores, once the model has answered."""


class TaskBudget(Protocol):
    """What a task may lose; its fields are recipe keys."""

    def limits(self, task: Any) -> tuple[Any, ...]:
        """Return the `gate.Budget` of each metric of the task."""


class Task(Protocol):
    """One way to score a model.

    Attributes:
        budget: the class of its entry in the recipe's `gate`.
        kinds: the kinds of model it can score.
        needs_labels: whether each row of its data must have a class.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    budget: ClassVar[type[Any]]
    kinds: ClassVar[tuple[str, ...]]
    needs_labels: ClassVar[bool]

    @property
    def data(self) -> str:
        """Return the entry of the recipe's `data` that the task reads; empty where it knows its own."""

    @property
    def reading(self) -> Reading | OwnReading:
        """Return how its items are made of the data."""

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return the accuracy of a model that understands nothing; None where there is no such thing."""

    def identity(self) -> Mapping[str, Any]:
        """Return what decides its scores besides model and items: its fields, and a hash of the user's own code."""

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> Tally | Inquiry:
        """Start counting for a model of this kind; `source` is None for the source itself."""
