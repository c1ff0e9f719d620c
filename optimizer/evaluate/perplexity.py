"""Perplexity of held-out documents: how well the model predicts each next token.

Models of different vocabularies predict different tokens of the same text: `nats_per_byte`, the loss over the UTF-8
bytes of the text, can be compared all the same, document by document (`items.encoded_again` makes the second model's
items). A tokenizer that loses characters predicts less than its text; there the measure flatters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from optimizer.evaluate.distributions import Rows
from optimizer.evaluate.items import Document, Item, Texts, TopUp, items_hash, limit_of
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.task import Phase
from optimizer.gate import Scores
from optimizer.quantities import Percent, check_ranges

if TYPE_CHECKING:
    from optimizer.gate import Budget


@dataclass(frozen=True, kw_only=True)
class PerplexityBudget:
    """How much perplexity may rise above the source's; at least one of the two."""

    max_increase: Percent | None = field(
        default=None, metadata={"help": "largest rise, relative to the source's perplexity", "gt": 0}
    )
    max_increase_per_byte: Percent | None = field(
        default=None,
        metadata={"help": "largest rise of nats per byte, relative to the source's; for another vocabulary", "gt": 0},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_increase is None and self.max_increase_per_byte is None:
            raise ValueError("got neither, expected max_increase, max_increase_per_byte or both")

    def limits(self, task: Perplexity) -> tuple[Budget, ...]:
        """Return the gate's budgets, one per metric.

        Raises:
            ValueError: bytes are to be compared, and the task does not ask the model for all of them.
        """
        from optimizer.gate import Budget

        if self.max_increase_per_byte is not None and not task.bos:
            raise ValueError("max_increase_per_byte: needs `bos: true`, else the first token is not predicted")
        tokens, in_bytes = self.max_increase, self.max_increase_per_byte
        by_token = () if tokens is None else (Budget("perplexity", float(tokens), relative=True),)
        by_byte = () if in_bytes is None else (Budget("nats_per_byte", float(in_bytes), relative=True),)
        return (*by_token, *by_byte)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over held-out documents; an item is a document."""

    budget: ClassVar[type[PerplexityBudget]] = PerplexityBudget
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    needs_labels: ClassVar[bool] = False

    data: str = field(metadata={"help": "entry of `data` that holds the documents", "names": "data"})
    context: int = field(default=1024, metadata={"help": "tokens of a document that are scored", "ge": 2})
    phase: Phase = field(
        default="prefill",
        metadata={"help": "read texts as prompts are, or decode: token by token, as answers are written; slower"},
    )
    bos: bool = field(default=True, metadata={"help": "put the beginning-of-sequence token first, if there is one"})
    items: int | TopUp | None = field(default=None, metadata={"help": "a random sample of so many documents", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)

    def identity(self) -> Mapping[str, Any]:
        """Return the fields."""
        return asdict(self)

    @property
    def reading(self) -> Texts:
        """Return how its items are made."""
        return Texts(self.context, self.bos, limit_of(self.items))

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
        """Return perplexity = exp(sum of nats / number of tokens) and, where every byte is predicted, nats per byte."""
        tokens = np.array([len(item.ids) - 1 for item in self._items])
        with np.errstate(over="ignore"):
            point = float(np.exp(self._nll.sum() / tokens.sum()))
        groups = tuple(item.group for item in self._items)
        values = {"nll": self._nll, "tokens": tokens}
        scores = {"perplexity": Scores("perplexity", self._name, groups, values, point)}
        texts = [item.text for item in self._items if isinstance(item, Document)]
        if len(texts) == len(self._items):
            sizes = np.array([len(text.encode()) for text in texts])
            per_byte = {"nll": self._nll, "bytes": sizes}
            point = float(self._nll.sum() / sizes.sum())
            scores["nats_per_byte"] = Scores("nats_per_byte", _texts_hash(texts), groups, per_byte, point)
        return TaskResult(scores)


def _texts_hash(texts: Sequence[str]) -> str:
    """Return the sha256 of texts: what two tokenizations of the same documents have in common."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(f"{len(content)}\n".encode() + content)
    return digest.hexdigest()
