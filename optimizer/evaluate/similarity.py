"""How well a model orders pairs of texts by similarity: Spearman's rank correlation.

An embedder's similarity is the cosine of its two vectors, a reranker's is its logit. Where the data holds scores of
people (as STS does), the correlation is with those; else with the source model's own similarities, which needs no
labels and says how much of the order survives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.distributions import Rows
from optimizer.evaluate.items import Item, TopUp, items_hash, limit_of
from optimizer.evaluate.pairs import PairItem, Pairs
from optimizer.evaluate.result import TaskResult
from optimizer.gate import Scores
from optimizer.quantities import Drop, check_ranges
from optimizer.statistics.spearman import spearman

if TYPE_CHECKING:
    from optimizer.gate import Budget

METRIC = "spearman"


@dataclass(frozen=True, kw_only=True)
class SimilarityBudget:
    """How much of its rank correlation the model may lose."""

    max_drop: Drop = field(
        metadata={"help": "largest loss of Spearman's correlation: 1pt is 0.01, 1% a share of the source's"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.max_drop.value < 1:
            raise ValueError(f"max_drop: got {self.max_drop}, expected above 0 and below 100")

    def limits(self, task: Similarity) -> tuple[Budget, ...]:
        """Return the gate's budget."""
        from optimizer.gate import Budget

        return (Budget(METRIC, self.max_drop.value, relative=self.max_drop.relative),)


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Spearman correlation of similarities with scores of the data, else with the source's; an item is a pair."""

    budget: ClassVar[type[SimilarityBudget]] = SimilarityBudget
    kinds: ClassVar[tuple[str, ...]] = ("embedder", "reranker")
    needs_labels: ClassVar[bool] = False
    reads_pairs: ClassVar[bool] = True

    data: str = field(metadata={"help": "entry of `data` that holds the texts", "names": "data"})
    context: int = field(default=512, metadata={"help": "tokens of a text that are read", "ge": 2})
    items: int | TopUp | None = field(default=None, metadata={"help": "a random sample of so many pairs", "ge": 2})

    def __post_init__(self) -> None:
        check_ranges(self)

    def identity(self) -> Mapping[str, Any]:
        """Return the fields."""
        return asdict(self)

    @property
    def reading(self) -> Pairs:
        """Return how its items are made."""
        return Pairs(self.context, limit_of(self.items))

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return None: it has no accuracy."""
        return None

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> SimilarityTally:
        """Return what collects a model's similarities; the source's are the reference where the data has no scores."""
        name = items_hash(items, self.context)
        scores = [item.score if isinstance(item, PairItem) else None for item in items]
        if None not in scores:
            return SimilarityTally(items, name, np.array(scores, np.float64))
        if source is None:
            return SimilarityTally(items, name, None)
        if source.scores[METRIC].items != name:
            raise ValueError("similarity: the source was scored on other items; score it on these first")
        return SimilarityTally(items, name, np.asarray(source.scores[METRIC].values["answer"], np.float64))


class SimilarityTally:
    """Collects the similarity of each pair; nan where a vector is zero or not finite."""

    def __init__(self, items: Sequence[Item], name: str, reference: NDArray[np.float64] | None) -> None:
        self._items, self._name, self._reference = items, name, reference
        self._answers = np.full(len(items), np.nan)

    def add(self, rows: Rows) -> None:
        """Take an embedder's two vectors [2, width], or a reranker's logit [1, 1]."""
        numbers = rows.logits.astype(np.float64)
        self._answers[rows.index] = _cosine(*numbers) if len(numbers) == 2 else numbers[0, 0]

    def result(self) -> TaskResult:
        """Return the correlation with, per pair, what was expected and what the model gave."""
        reference = self._answers if self._reference is None else self._reference
        values = {"reference": reference, "answer": self._answers}
        groups = tuple(item.group for item in self._items)
        return TaskResult({METRIC: Scores(METRIC, self._name, groups, values, spearman(reference, self._answers))})


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length > 0 else np.nan
