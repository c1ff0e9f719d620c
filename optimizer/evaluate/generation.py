"""Greedy answers to prompts, right or wrong; an item is a prompt.

An answer that was still going on at `max_tokens` is *truncated*, one in which the number or the pattern is not found is
*unparsable*: both count as wrong and are reported apart, for they ask for another `max_tokens`, `stop` or prompt rather
than for another model. We differ from lm-evaluation-harness there: it scores what stands in a truncated answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import CannotRun
from optimizer.evaluate.data import DataError, Record, read_records
from optimizer.evaluate.flips import Changed, beginning, changed_items, effects, ending
from optimizer.evaluate.items import Item, TopUp, items_hash, limit_of, shuffled
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.templates import cell, check_named, columns_of, render
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Scores
from optimizer.quantities import Drop, check_ranges
from optimizer.record import Flip
from passes.base import Progress

if TYPE_CHECKING:
    from optimizer.evaluate.greedy import Answer
    from optimizer.evaluate.scorers import Scorer
    from optimizer.gate import Budget
    from optimizer.recipe import DataSource

_NUMBER = re.compile(r"(?<!\d)(?P<sign>-?)\$?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?")
_REFERENCE_MARK = "####"
"""What stands before the number at the end of a GSM8K reference (Cobbe et al. 2021, arXiv:2110.14168)."""


@dataclass(frozen=True)
class Prompt(Item):
    """What is to be continued, and what should come out.

    Attributes:
        ids: of the prompt, cut on the left so that the answer fits.
        reference: the right answer: a text, or a number without separators.
        is_cut: whether the prompt lost tokens.
    """

    reference: str = ""
    is_cut: bool = False


@dataclass(frozen=True)
class Stop:
    """Says when an answer has ended: at an id that ends a text, or at a string."""

    reader: TextReader
    strings: tuple[str, ...] = ()

    def __call__(self, ids: Sequence[int]) -> bool:
        """Say whether the ids generated so far, at least one, are a whole answer."""
        if ids[-1] in self.reader.eos:
            return True
        return bool(self.strings) and any(string in self.reader.decode(ids) for string in self.strings)

    def text(self, ids: Sequence[int]) -> str:
        """Return the answer as text, without special tokens and what ended it."""
        text = self.reader.decode(ids)
        for string in self.strings:
            text = text.partition(string)[0]
        return text


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, thousands separators and a dollar sign dropped; None without one."""
    found = None
    for match in _NUMBER.finditer(text):
        if match["digits"] or match["decimals"]:
            found = match
    if found is None:
        return None
    return Decimal(f"{found['sign']}{(found['digits'] or '0').replace(',', '')}{found['decimals'] or ''}")


@dataclass(frozen=True, kw_only=True)
class GenerationBudget:
    """How much of its score the model may lose."""

    max_drop: Drop = field(metadata={"help": "largest loss: 1pt is a percentage point, 1% a share of the source's"})

    def __post_init__(self) -> None:
        if not 0 < self.max_drop.value < 1:
            raise ValueError(f"max_drop: got {self.max_drop}, expected above 0 and below 100")

    def limits(self, task: Generation) -> tuple[Budget, ...]:
        """Return the gate's budget."""
        from optimizer.gate import Budget

        return (Budget("accuracy", self.max_drop.value, relative=self.max_drop.relative),)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Share of prompts that are answered right, decoding greedily; an item is a prompt."""

    budget: ClassVar[type[GenerationBudget]] = GenerationBudget
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    needs_labels: ClassVar[bool] = False

    data: str = field(metadata={"help": "entry of `data` that holds prompts and answers", "names": "data"})
    prompt: str = field(default="{prompt}", metadata={"help": "what is answered; {column} stands for a cell"})
    answer: str = field(default="answer", metadata={"help": "column with the right answer"})
    score: Literal["exact", "numeric", "regex"] = field(
        default="exact",
        metadata={"help": "compare the whole text, its last number (in a reference: the one after ####), or a pattern"},
    )
    pattern: str | None = field(
        default=None, metadata={"help": "with regex: its one group, where it is first found, is compared"}
    )
    stop: tuple[str, ...] = field(
        default=(), metadata={"help": "texts that end an answer, besides the model's own end"}
    )
    max_tokens: int = field(default=256, metadata={"help": "most tokens of an answer", "ge": 1})
    chat: bool = field(default=False, metadata={"help": "ask through the model's chat template"})
    context: int | None = field(
        default=None, metadata={"help": "tokens of prompt and answer; longer prompts are cut on the left", "ge": 2}
    )
    items: int | TopUp | None = field(default=None, metadata={"help": "a random sample of so many prompts", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)
        check_named("prompt", self.prompt)
        if not all(self.stop):
            raise ValueError("stop: got an empty text, expected what ends an answer")
        if (self.score == "regex") != (self.pattern is not None):
            got = "none" if self.pattern is None else repr(self.pattern)
            raise ValueError(f"pattern: got {got} with score {self.score}, expected one with regex and only there")
        if self.pattern is not None:
            _check_pattern(self.pattern)

    def identity(self) -> Mapping[str, Any]:
        """Return the fields."""
        return asdict(self)

    @property
    def reading(self) -> Generation:
        """Return the task itself: nearly every field decides its items."""
        return self

    def load(self, source: DataSource, reader: TextReader) -> list[Item]:
        """Read the prompts, draw the sample, encode them."""
        records = read_records(source, self._wanted)
        chosen = records if self.items is None else shuffled(records)[: limit_of(self.items)]
        texts = [render(self.prompt, record.cells, record.where) for record in chosen]
        encoded = reader.encode_chats(texts) if self.chat else reader.encode_whole(texts)
        longest = self._longest(reader)
        return [
            Prompt(
                ids=tuple(ids[-longest:] if longest else ids),
                group=str(number) if record.group is None else record.group,
                reference=self._reference(record),
                is_cut=bool(longest and len(ids) > longest),
            )
            for number, (record, ids) in enumerate(zip(chosen, self._required(chosen, encoded), strict=True))
        ]

    def _wanted(self, present: Sequence[str]) -> Iterable[tuple[str, str]]:
        yield from (("prompt", column) for column in columns_of(self.prompt, present))
        yield "answer", self.answer

    def _longest(self, reader: TextReader) -> int | None:
        """Return the most tokens of a prompt."""
        whole = reader.longest(self.context)
        if whole is not None and whole <= self.max_tokens:
            raise CannotRun(
                f"generation: max_tokens: got {self.max_tokens}, expected below the context of {whole} tokens"
            )
        return whole and whole - self.max_tokens

    def _required(self, records: Sequence[Record], encoded: list[list[int]]) -> list[list[int]]:
        for record, ids in zip(records, encoded, strict=True):
            if not ids:
                raise DataError(f"{record.where}: got a prompt without tokens, expected a text")
        return encoded

    def _reference(self, record: Record) -> str:
        value = cell(self.answer, record.cells, record.where)
        if not isinstance(value, str | int | float) or value == "":
            raise DataError(f"{record.where}: {self.answer}: got {value!r:.60}, expected a text or a number")
        text = str(value)
        if self.score != "numeric":
            found = self._found(text)
            return text.strip() if found is None else found
        number = last_number(text.rpartition(_REFERENCE_MARK)[2])
        if number is None:
            raise DataError(f"{record.where}: {self.answer}: got {text!r:.60}, expected a number in it")
        return str(number)

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return 0: who understands nothing answers nothing right."""
        return 0.0

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> GenerationInquiry:
        """Return what asks a model; the source's result is not needed."""
        return GenerationInquiry(self, items, items_hash(items, self.context))

    def flips(self, items: Sequence[Item], before: TaskResult, after: TaskResult, reader: TextReader) -> Changed | None:
        """Return the prompts whose answer became right, wrong or another text."""
        was, now = (result.scores["accuracy"].values for result in (before, after))
        texts = [[answer.decode(errors="replace") for answer in side["answer"]] for side in (was, now)]
        effect = effects(was["correct"] == 1, now["correct"] == 1)

        def tell(index: int) -> Flip:
            item, (first, second) = items[index], (beginning(side[index]) for side in texts)
            expected = item.reference if isinstance(item, Prompt) else None
            return Flip(index + 1, ending(reader.decode(item.ids)), first, second, expected, effect[index])

        is_changed = [first != second for first, second in zip(*texts, strict=True)]
        return changed_items(is_changed, effect, tell)

    def is_right(self, text: str, reference: str) -> bool | None:
        """Say whether an answer is right; None where what should be compared is not in it."""
        if self.score == "numeric":
            number = last_number(text)
            return None if number is None else number == Decimal(reference)
        found = self._found(text)
        return None if found is None else found == reference

    def _found(self, text: str) -> str | None:
        """Return what is compared of a text: all of it, or the pattern's group."""
        if self.pattern is None:
            return text.strip()
        found = re.search(self.pattern, text)
        return None if found is None or found[1] is None else found[1].strip()


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"pattern: got {pattern!r}, which is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"pattern: got {groups} groups in {pattern!r}, expected one; (?:...) groups without being one")


class GenerationInquiry:
    """Asks a model every prompt and compares what it answers."""

    def __init__(self, task: Generation, items: Sequence[Item], name: str) -> None:
        self._task, self._name = task, name
        self._items = [item for item in items if isinstance(item, Prompt)]
        self._answers: dict[int, Answer] = {}
        self._texts: dict[int, str] = {}

    def ask(self, scorer: Scorer, reader: TextReader | None, progress: Progress) -> None:
        """Let the model answer every prompt."""
        if reader is None:
            raise ValueError("generation: got no reader, expected the model's own to turn ids into text")
        stop = Stop(reader, self._task.stop)
        for index, answer in scorer.generate(self._items, self._task.max_tokens, stop):
            self._answers[index] = answer
            self._texts[index] = stop.text(answer.ids)
            progress(len(self._answers), len(self._items), "answer")

    def result(self) -> TaskResult:
        """Return the share of right answers, of truncated, unparsable ones and of prompts that were cut."""
        order = range(len(self._items))
        answers, texts = [self._answers[index] for index in order], [self._texts[index] for index in order]
        is_truncated = np.array([answer.is_finite and not answer.is_complete for answer in answers])
        found = [self._task.is_right(text, item.reference) for text, item in zip(texts, self._items, strict=True)]
        is_unparsable = np.array([right is None for right in found]) & ~is_truncated
        is_right = np.array([bool(right) for right in found]) & ~is_truncated
        is_finite = np.array([answer.is_finite for answer in answers])
        correct: NDArray[Any] = is_right if is_finite.all() else np.where(is_finite, is_right, np.nan)
        # As bytes: the arrays of a result hold no objects.
        encoded = np.array([text.encode() for text in texts], dtype=np.bytes_)
        values = {"correct": correct, "answer": encoded, "truncated": is_truncated}
        groups = tuple(item.group for item in self._items)
        scores = {"accuracy": Scores("accuracy", self._name, groups, values, float(np.mean(correct)))}
        is_cut = np.array([item.is_cut for item in self._items])
        shares = {"truncated": is_truncated, "unparsable": is_unparsable} | ({"cut": is_cut} if is_cut.any() else {})
        for name, is_so in shares.items():
            scores[name] = Scores(name, self._name, groups, {name: is_so}, float(is_so.mean()))
        return TaskResult(scores)
