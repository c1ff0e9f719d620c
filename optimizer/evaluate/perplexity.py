"""Perplexity of held-out documents: how well the model predicts each next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from optimizer.evaluate.distributions import Rows
from optimizer.evaluate.items import Item, Texts, items_hash
from optimizer.evaluate.result import TaskResult
from optimizer.gate import Scores
from optimizer.quantities import Percent, check_ranges

if TYPE_CHECKING:
    from optimizer.gate import Budget


@dataclass(frozen=True, kw_only=True)
class PerplexityBudget:
    """How much perplexity may rise above the source's."""

    max_increase: Percent = field(metadata={"help": "largest rise, relative to the source's perplexity", "gt": 0})

    def __post_init__(self) -> None:
        check_ranges(self)

    def limits(self, task: Perplexity) -> tuple[Budget, ...]:
        """Return the gate's budgets, one per metric."""
        from optimizer.gate import Budget

        return (Budget("perplexity", float(self.max_increase), relative=True),)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over held-out documents; an item is a document."""

    budget: ClassVar[type[PerplexityBudget]] = PerplexityBudget
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    needs_labels: ClassVar[bool] = False

    data: str = field(metadata={"help": "entry of `data` that holds the documents", "names": "data"})
    context: int = field(default=1024, metadata={"help": "tokens of a document that are scored", "ge": 2})
    bos: bool = field(default=True, metadata={"help": "put the beginning-of-sequence token first, if there is one"})
    items: int | None = field(default=None, metadata={"help": "use a random sample of so many documents", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)

    def identity(self) -> Mapping[str, Any]:
        """Return the fields."""
        return asdict(self)

    @property
    def reading(self) -> Texts:
        """Return how its items are made."""
        return Texts(self.context, self.bos, self.items)

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return None: it has no accuracy."""
        return None

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> PerplexityTally:
        """Return what adds up the loss of a model's logits; the source's result is not needed."""
        return PerplexityTally(items, items_hash(items, self.context))


class PerplexityTally:
    """Adds up -log p(token | the tokens before it) over each document, from its second token on."""

    def __init__(self, items: Sequence[Item], name: str) -> None:
        self._items, self._name = items, name
        self._nll = np.zeros(len(items))  # nats

    def add(self, rows: Rows) -> None:
        """Take logits; the row of position t is asked for token t + 1, the last token's row for nothing."""
        following = self._items[rows.index].ids[rows.first + 1 :][: len(rows.logits)]
        targets = np.zeros((len(rows.logits), 1), np.int64)
        targets[: len(following), 0] = following
        self._nll[rows.index] -= rows.log_probs(targets)[: len(following), 0].sum()

    def result(self) -> TaskResult:
        """Return perplexity = exp(sum of nats / number of tokens)."""
        tokens = np.array([len(item.ids) - 1 for item in self._items])
        with np.errstate(over="ignore"):
            point = float(np.exp(self._nll.sum() / tokens.sum()))
        groups = tuple(item.group for item in self._items)
        values = {"nll": self._nll, "tokens": tokens}
        return TaskResult({"perplexity": Scores("perplexity", self._name, groups, values, point)})
