"""Agreement with the source model: how often the most likely next token changes, and by how much the distribution.

Of a decoder's source the 64 most likely tokens of each position are kept, and all others as one bin. The KL divergence
between two distributions lumped that way is at most the one between the whole distributions (the data-processing
inequality: Cover & Thomas 2006, Elements of Information Theory, section 2.8): what is reported is a lower bound. Of a
classifier's source all classes are kept, and the divergence is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.distributions import Rows, kl_divergence
from optimizer.evaluate.flips import Changed, changed_classes, ending
from optimizer.evaluate.items import Item, Texts, TopUp, items_hash, limit_of
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.task import Phase
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Scores
from optimizer.quantities import Percent, check_ranges
from optimizer.record import Flip

if TYPE_CHECKING:
    from optimizer.gate import Budget

TOP = 64
"""Tokens of a position that are compared one by one."""


@dataclass(frozen=True, kw_only=True)
class AgreementBudget:
    """How far the model may leave its source; at least one of the two."""

    max_flips: Percent | None = field(
        default=None, metadata={"help": "largest share of positions whose most likely token changed", "gt": 0}
    )
    max_kl: float | None = field(
        default=None, metadata={"help": "largest mean KL divergence from the source, nats per token", "gt": 0}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_flips is None and self.max_kl is None:
            raise ValueError("got neither, expected max_flips, max_kl or both")

    def limits(self, task: Agreement) -> tuple[Budget, ...]:
        """Return the gate's budgets, one per metric."""
        from optimizer.gate import Budget

        flips = () if self.max_flips is None else (Budget("flips", float(self.max_flips)),)
        kl = () if self.max_kl is None else (Budget("kl", self.max_kl),)
        return (*flips, *kl)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Flip rate and KL divergence against the source; needs no labels; an item is a document."""

    budget: ClassVar[type[AgreementBudget]] = AgreementBudget
    kinds: ClassVar[tuple[str, ...]] = ("decoder", "classifier")
    needs_labels: ClassVar[bool] = False

    data: str = field(metadata={"help": "entry of `data` that holds the documents", "names": "data"})
    context: int = field(default=1024, metadata={"help": "tokens of a document that are compared", "ge": 2})
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

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> SourceTally | CandidateTally:
        """Return what records the source (`source` is None) or compares a model with its record."""
        name = items_hash(items, self.context)
        if source is None:
            return SourceTally(items, name, kind)
        if source.scores["flips"].items != name:
            raise ValueError("agreement: the source was scored on other items; score it on these first")
        return CandidateTally(items, name, kind, source.reference)

    def flips(self, items: Sequence[Item], before: TaskResult, after: TaskResult, reader: TextReader) -> Changed | None:
        """Return the texts whose class changed; of a decoder's documents the changed token the source was surest of."""
        values, top = after.scores["flips"].values, before.reference.get("top")
        if top is None or "answer" not in values:
            return None
        answers, places = values["answer"], values["place"]
        if reader.kind != "decoder":
            unknown = [None] * len(top)
            return changed_classes(
                top,
                answers,
                unknown,
                lambda index: reader.decode(items[index].ids),
                lambda _, number: reader.label(number),
            )
        starts = np.cumsum(values["tokens"]) - values["tokens"]

        def tell(index: int) -> Flip:
            place = int(places[index])
            text = ending(reader.decode(items[index].ids[: place + 1]))
            was, now = int(top[starts[index] + place]), int(answers[index])
            return Flip(index + 1, text, reader.token(was), reader.token(now), None, "other")

        order = [index for index in np.argsort(-values["sureness"], kind="stable").tolist() if places[index] >= 0]
        return Changed(int(np.nansum(values["flips"])), int(values["tokens"].sum()), order, tell, "next tokens")


class _Places:
    """Where the positions of each item lie in arrays over all positions; a classifier's item has one."""

    def __init__(self, items: Sequence[Item], kind: str) -> None:
        self.tokens = np.array([len(item.ids) if kind == "decoder" else 1 for item in items])
        self._starts = np.cumsum(self.tokens) - self.tokens

    def of(self, rows: Rows) -> slice:
        start = int(self._starts[rows.index]) + rows.first
        return slice(start, start + len(rows.logits))


class SourceTally:
    """Records what the source answers; its own flips and KL are zero, or NaN where its logits hold NaN."""

    def __init__(self, items: Sequence[Item], name: str, kind: str) -> None:
        self._items, self._name, self._kind = items, name, kind
        self._places = _Places(items, kind)
        self._values = np.zeros(len(items))
        self._reference: dict[str, NDArray[Any]] = {}

    def add(self, rows: Rows) -> None:
        """Record the most likely tokens of each position and their log-probabilities."""
        width = rows.logits.shape[1]
        ids = rows.most_likely(TOP if self._kind == "decoder" else width)
        if not self._reference:
            count = int(self._places.tokens.sum())
            self._reference = {
                "top": np.zeros(count, np.int32),
                "ids": np.zeros((count, ids.shape[1]), np.int32),
                "log_probs": np.zeros((count, ids.shape[1] + 1), np.float32),
            }
        place = self._places.of(rows)
        self._reference["top"][place] = rows.top
        self._reference["ids"][place] = ids
        self._reference["log_probs"][place] = rows.log_probs_and_rest(ids)
        self._values[rows.index] += np.where(np.isnan(rows.log_total), np.nan, 0.0).sum()

    def result(self) -> TaskResult:
        """Return zeros, and the record that other models are compared with."""
        scores = _scores(self._items, self._name, self._places.tokens, self._values, self._values)
        return TaskResult(scores, self._reference)


class CandidateTally:
    """Compares a model with the source's record, position by position."""

    def __init__(self, items: Sequence[Item], name: str, kind: str, reference: Mapping[str, NDArray[Any]]) -> None:
        self._items, self._name, self._kind, self._reference = items, name, kind, reference
        self._places = _Places(items, kind)
        self._flips = np.zeros(len(items))
        self._kl = np.zeros(len(items))  # nats
        self._changed = {"place": np.full(len(items), -1), "answer": np.full(len(items), -1)}
        self._sureness = np.full(len(items), -np.inf)  # the source's log-probability of what it says at `place`

    def add(self, rows: Rows) -> None:
        """Count the positions whose most likely token differs, and sum KL(source || model)."""
        place = self._places.of(rows)
        before = self._reference["log_probs"][place]
        after = rows.log_probs_and_rest(self._reference["ids"][place])
        is_unknown = np.isnan(before).any(axis=1) | np.isnan(rows.log_total)
        is_other = rows.top != self._reference["top"][place]
        self._flips[rows.index] += np.where(is_unknown, np.nan, is_other).sum()
        self._kl[rows.index] += kl_divergence(before, after).sum()
        self._note(rows, is_other & ~is_unknown, before[:, 0])

    def _note(self, rows: Rows, is_other: NDArray[np.bool_], sureness: NDArray[np.float32]) -> None:
        """Keep a classifier's answer; of a decoder the changed token that the source was surest of, and its place."""
        place, answer, index = self._changed["place"], self._changed["answer"], rows.index
        if self._kind != "decoder":
            answer[index] = rows.top[0]
            return
        surest = int(np.argmax(np.where(is_other, sureness, -np.inf)))
        if is_other[surest] and sureness[surest] > self._sureness[index]:
            self._sureness[index] = sureness[surest]
            place[index], answer[index] = rows.first + surest, rows.top[surest]

    def result(self) -> TaskResult:
        """Return flip rate and mean KL; the flips' `place` is -1 where no position changed."""
        scores = _scores(self._items, self._name, self._places.tokens, self._flips, self._kl)
        flips = scores["flips"]
        told = {**self._changed, "sureness": self._sureness} if self._kind == "decoder" else self._changed
        return TaskResult(scores | {"flips": replace(flips, values={**flips.values, **told})})


def _scores(
    items: Sequence[Item], name: str, tokens: NDArray[np.int64], flips: NDArray[np.float64], kl: NDArray[np.float64]
) -> dict[str, Scores]:
    groups = tuple(item.group for item in items)
    return {
        metric: Scores(metric, name, groups, {metric: sums, "tokens": tokens}, float(sums.sum() / tokens.sum()))
        for metric, sums in (("flips", flips), ("kl", kl))
    }
