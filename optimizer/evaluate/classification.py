"""Classification of labelled texts: accuracy, macro-F1 or a metric module of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.distributions import Rows
from optimizer.evaluate.flips import Changed, changed_classes
from optimizer.evaluate.items import Item, Texts, TopUp, items_hash, limit_of, majority_share
from optimizer.evaluate.result import TaskResult
from optimizer.gate import Scores
from optimizer.quantities import Drop, check_ranges

if TYPE_CHECKING:
    from optimizer.evaluate.metrics import Metric
    from optimizer.evaluate.text_reader import TextReader
    from optimizer.gate import Budget

SHIPPED_METRICS = ("accuracy", "f1")


@dataclass(frozen=True, kw_only=True)
class ClassificationBudget:
    """How much of its score the model may lose."""

    max_drop: Drop = field(metadata={"help": "largest loss: 1pt is a percentage point, 1% a share of the source's"})

    def __post_init__(self) -> None:
        if not 0 < self.max_drop.value < 1:
            raise ValueError(f"max_drop: got {self.max_drop}, expected above 0 and below 100")

    def limits(self, task: Classification) -> tuple[Budget, ...]:
        """Return the gate's budgets, one per metric."""
        from optimizer.gate import Budget

        compute = None if task.metric in SHIPPED_METRICS else task.compute
        return (Budget(Path(task.metric).stem, self.max_drop.value, self.max_drop.relative, compute=compute),)


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Share of right labels, or macro-F1, over labelled texts; an item is a text."""

    budget: ClassVar[type[ClassificationBudget]] = ClassificationBudget
    kinds: ClassVar[tuple[str, ...]] = ("classifier",)
    needs_labels: ClassVar[bool] = True

    data: str = field(metadata={"help": "entry of `data` that holds texts and labels", "names": "data"})
    metric: str = field(default="accuracy", metadata={"help": "accuracy, f1, or the path of a metric module"})
    trust_metric_code: bool = field(default=False, metadata={"help": "allow a metric module that is not shipped"})
    context: int = field(default=512, metadata={"help": "tokens of a text that are read", "ge": 2})
    items: int | TopUp | None = field(default=None, metadata={"help": "a random sample of so many texts", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.metric not in SHIPPED_METRICS and not self.trust_metric_code:
            shipped = " or ".join(SHIPPED_METRICS)
            raise ValueError(
                f"metric: got {self.metric!r}, expected {shipped}; "
                "a metric module is code: set `trust_metric_code: true` to run it"
            )

    @cached_property
    def module(self) -> Metric:
        """Load the metric; `module.sha256` is what the lock keeps of a module that is not shipped.

        Raises:
            CannotRun: the metric is neither shipped nor a file, or the file holds no metric.
        """
        from optimizer.evaluate.metrics import load_metric

        return load_metric(self.metric, trust=self.trust_metric_code)

    def compute(self, answers: NDArray[np.int64], references: NDArray[np.int64]) -> float:
        """Return the metric's score of class indices [n]; the module is loaded when it is first needed."""
        return self.module.compute(answers, references)

    def identity(self) -> Mapping[str, Any]:
        """Return the fields and, for a metric module that is not shipped, the sha256 of its file."""
        if self.metric in SHIPPED_METRICS:
            return asdict(self)
        return asdict(self) | {"metric_sha256": self.module.sha256}

    @property
    def reading(self) -> Texts:
        """Return how its items are made."""
        return Texts(self.context, limit=limit_of(self.items))

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return the share of the most frequent label."""
        return majority_share(items)

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> ClassificationTally:
        """Return what collects a model's answers; the source's result is not needed."""
        return ClassificationTally(items, items_hash(items, self.context), self.module)

    def flips(self, items: Sequence[Item], before: TaskResult, after: TaskResult, reader: TextReader) -> Changed | None:
        """Return the texts that got another class."""
        was, now = (next(iter(result.scores.values())).values.get("answer") for result in (before, after))
        if was is None or now is None:
            return None
        right = [item.label for item in items[: len(was)]]
        return changed_classes(
            was, now, right, lambda index: reader.decode(items[index].ids), lambda _, number: reader.label(number)
        )


class ClassificationTally:
    """Collects the most likely class of each text; logits that hold NaN make the answer and the score NaN."""

    def __init__(self, items: Sequence[Item], name: str, metric: Metric) -> None:
        self._items, self._name, self._metric = items, name, metric
        self._answers = np.zeros(len(items))  # class indices, or NaN
        labels = [item.label for item in items]
        if None in labels:
            raise ValueError(f"classification: item {labels.index(None)} has no label, expected one for each item")
        self._references = np.array(labels, np.int64)

    def add(self, rows: Rows) -> None:
        """Take the logits of one text, [1, labels]."""
        self._answers[rows.index] = np.nan if np.isnan(rows.log_total[0]) else rows.top[0]

    def result(self) -> TaskResult:
        """Return the metric's score with, per text, its answer and whether it is right (accuracy) or the reference."""
        values: dict[str, NDArray[Any]] = {"reference": self._references, "answer": self._answers}
        is_right = self._answers == self._references
        if np.isnan(self._answers).any():
            point, correct = np.nan, np.where(np.isnan(self._answers), np.nan, is_right)
        else:
            values["answer"] = self._answers.astype(np.int64)
            point, correct = self._metric.compute(values["answer"], self._references), is_right
        if self._metric.name == "accuracy":
            values = {"correct": correct, "answer": values["answer"]}
        groups = tuple(item.group for item in self._items)
        return TaskResult({self._metric.name: Scores(self._metric.name, self._name, groups, values, point)})
