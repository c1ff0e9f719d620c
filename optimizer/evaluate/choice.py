"""Multiple choice by log-likelihood: the model's answer is the continuation it finds most likely; nothing is generated.

Prompts, token ids and scores are those of EleutherAI's lm-evaluation-harness (0.4.13: `TemplateLM._encode_pair`,
`HFLM._loglikelihood_tokens`, `ConfigurableTask.process_results`), so that a score means what the field's tables mean:
`accuracy` is its `acc` (sum of log-probabilities), `accuracy_norm` its `acc_norm` (that sum over the number of
characters of the choice, the space before it not counted). The layouts' prompts are those of its zero-shot tasks.
We differ: sums are float64, which moves a log-probability by about 1e-5; ties go to the first choice in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.data import DataError, Record, read_records
from optimizer.evaluate.distributions import Rows
from optimizer.evaluate.flips import Changed, changed_classes, ending
from optimizer.evaluate.items import Item, TopUp, items_hash, limit_of, majority_share, shuffled
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.templates import cell, check_named, columns_of, render_all
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Scores
from optimizer.quantities import Drop, check_ranges

if TYPE_CHECKING:
    from optimizer.gate import Budget
    from optimizer.recipe import DataSource

METRICS = ("accuracy", "accuracy_norm")
SEPARATOR = " "
"""What stands between prompt and choice."""


# ---- layouts


@dataclass(frozen=True)
class Layout:
    """Where a row has its prompt, its choices and its answer; templates as in `templates.py`.

    Attributes:
        prompt: one template for all choices, or what gives one prompt for each.
        choices: what gives one text for each choice, or one template where the prompts differ.
        answer: columns that may hold the answer, the first one that is there; or the index of the right choice.
        names: what gives the name under which the answer column knows each choice; None: see `answer_index`.
        prepare: makes the cells that the templates name of those of the row.
        columns: what `prepare` reads.
    """

    prompt: str | tuple[str, ...]
    choices: str | tuple[str, ...]
    answer: tuple[str, ...] | int
    names: str | tuple[str, ...] | None = None
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    columns: tuple[str, ...] = ()

    def answer_column(self, present: Sequence[str]) -> str | None:
        """Return the column with the answer, None where no row has one."""
        if isinstance(self.answer, int):
            return None
        return next((name for name in self.answer if name in present), self.answer[0])

    def wanted(self, present: Sequence[str]) -> Iterable[tuple[str, str]]:
        """Yield what the layout reads of a file with the columns `present`: (what for, column)."""
        parts = (("prompt", self.prompt), ("choices", self.choices), ("names of the choices", self.names or ()))
        if self.columns:
            yield from (("question", column) for column in self.columns)
        else:
            for part, templates in parts:
                for template in (templates,) if isinstance(templates, str) else templates:
                    yield from ((part, column) for column in columns_of(template, present))
        answer = self.answer_column(present)
        if answer is not None:
            yield "answer", answer


def _split_at_blank(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Cut a WinoGrande sentence at its blank: what follows is scored after each filling (Trinh & Le, 1806.02847)."""
    before, _, after = str(cells["sentence"]).partition("_")
    return {**cells, "before": before, "after": after.strip()}


def _strip_question(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {**cells, "question": str(cells["question"]).strip()}


LAYOUTS: Mapping[str, Layout] = {
    "blimp": Layout("", ("{sentence_good}", "{sentence_bad}"), 0),
    "arc": Layout("Question: {question}\nAnswer:", "{choices.text}", ("answerKey",), "{choices.label}"),
    "piqa": Layout("Question: {goal}\nAnswer:", ("{sol1}", "{sol2}"), ("label",)),
    "boolq": Layout("{passage}\nQuestion: {question}?\nAnswer:", ("no", "yes"), ("label", "answer")),
    "winogrande": Layout(
        ("{before}{option1}", "{before}{option2}"),
        "{after}",
        ("answer",),
        ("1", "2"),
        _split_at_blank,
        ("sentence", "option1", "option2"),
    ),
    "mmlu": Layout(
        "{question}\nA. {choices.0}\nB. {choices.1}\nC. {choices.2}\nD. {choices.3}\nAnswer:",
        ("A", "B", "C", "D"),
        ("answer",),
        prepare=_strip_question,
        columns=("question", "choices"),
    ),
}


@dataclass(frozen=True)
class Question:
    """One row as texts.

    Attributes:
        record: where it came from.
        pairs: (prompt, choice) for each choice, without the separator.
        answer: index of the right one.
    """

    record: Record
    pairs: tuple[tuple[str, str], ...]
    answer: int


def read_question(record: Record, layout: Layout) -> Question:
    """Return a row's question.

    Raises:
        DataError: the row is not laid out that way; names it.
    """
    where, cells = record.where, layout.prepare(record.cells)
    prompts, choices = render_all(layout.prompt, cells, where), render_all(layout.choices, cells, where)
    count = max(len(prompts), len(choices))
    if {len(prompts), len(choices)} - {1, count} or count < 2:
        got = f"{len(prompts)} prompts and {len(choices)} choices"
        raise DataError(f"{where}: got {got}, expected two choices or more, and one prompt for all or for each")
    pairs = tuple(zip(_spread(prompts, count), _spread(choices, count), strict=True))
    if any(not choice for _, choice in pairs):
        raise DataError(f"{where}: got an empty choice, expected a text; fill it in or remove the row")
    answer = layout.answer_column(list(record.cells))
    if answer is None:
        assert isinstance(layout.answer, int)
        return Question(record, pairs, layout.answer)
    names = None if layout.names is None else render_all(layout.names, cells, where)
    if names is not None and len(names) != count:
        raise DataError(f"{where}: got {len(names)} names for {count} choices, expected one for each")
    texts = choices if len(choices) == count else prompts
    return Question(record, pairs, answer_index(cell(answer, record.cells, where), names, texts, f"{where}: {answer}"))


def _spread(texts: list[str], count: int) -> list[str]:
    return texts * count if len(texts) == 1 else texts


def answer_index(value: object, names: Sequence[str] | None, choices: Sequence[str], where: str) -> int:
    """Return the index of the right choice.

    With `names` the answer is one of them. Without, it is an index from 0, true (1) or false (0), the text of a choice,
    or a letter from A on.

    Raises:
        DataError: it is none of that.
    """
    if names is not None:
        if str(value) in names:
            return list(names).index(str(value))
        raise DataError(f"{where}: got {value!r:.60}, expected one of {', '.join(names)}")
    if isinstance(value, str):
        found = _written_index(value, choices)
    else:
        found = int(value) if isinstance(value, int) else -1
    if not 0 <= found < len(choices):
        expected = f"a number from 0 to {len(choices) - 1}, a letter from A on, or the text of a choice"
        raise DataError(f"{where}: got {value!r:.60}, expected {expected}; `names` may say what else stands there")
    return found


def _written_index(text: str, choices: Sequence[str]) -> int:
    if text in choices:
        return list(choices).index(text)
    text = text.strip()
    if text.isdecimal():
        return int(text)
    return ord(text.upper()) - ord("A") if len(text) == 1 and text.isascii() and text.isalpha() else -1


# ---- items


@dataclass(frozen=True)
class Continuation(Item):
    """One choice of a question, as what the model reads and what it is asked for.

    Attributes:
        ids: all tokens but the last: each row of logits from `first` on is asked for the token after it.
        label: index of the question's right choice.
        targets: token ids of the choice.
        question: number of the question it belongs to; a question's choices follow each other.
        characters: length of the choice's text.
        is_cut: whether the prompt lost tokens on its left, so that the request fits.
    """

    targets: tuple[int, ...] = ()
    question: int = 0
    characters: int = 1
    is_cut: bool = False

    @property
    def first(self) -> int:
        """Return the position whose logits are asked for the first token of the choice."""
        return len(self.ids) - len(self.targets)

    @property
    def unit(self) -> int:
        """Return the number of its question."""
        return self.question


def continuation_parts(
    context: Sequence[int], targets: Sequence[int], longest: int | None
) -> tuple[tuple[int, ...], bool]:
    """Return the ids the model reads (all but the last), cut on the left to `longest`, and whether they were cut."""
    whole = (*context, *targets)[:-1]
    is_cut = longest is not None and len(whole) > longest
    return (whole[-longest:] if is_cut and longest else whole), is_cut


def make_questions(questions: Sequence[Question], reader: TextReader, context: int | None) -> list[Item]:
    """Turn questions into continuations, those of one question after another.

    Raises:
        DataError: a choice has no tokens, or more than the model reads.
        CannotRun: the tokenizer does not fit the model.
    """
    longest = reader.longest(context)
    texts = [(prompt, SEPARATOR + choice) for question in questions for prompt, choice in question.pairs]
    encoded = iter(reader.encode_pairs(texts))
    items: list[Item] = []
    for number, question in enumerate(questions):
        group = question.record.group
        for (_, choice), (before, targets) in zip(question.pairs, encoded, strict=False):
            if not targets or (longest is not None and len(targets) > longest):
                expected = f"1 to {longest}" if longest else "at least 1"
                raise DataError(f"{question.record.where}: got a choice of {len(targets)} tokens, expected {expected}")
            ids, is_cut = continuation_parts(before, targets, longest)
            items.append(
                Continuation(
                    ids=ids,
                    group=str(number) if group is None else group,
                    label=question.answer,
                    targets=tuple(targets),
                    question=number,
                    characters=len(choice),
                    is_cut=is_cut,
                )
            )
    return items


# ---- the task


@dataclass(frozen=True, kw_only=True)
class ChoiceBudget:
    """How much of its score the model may lose."""

    max_drop: Drop = field(metadata={"help": "largest loss: 1pt is a percentage point, 1% a share of the source's"})
    metric: Literal["accuracy", "accuracy_norm"] = field(
        default="accuracy", metadata={"help": "by the sum of log-probabilities, or by that sum per character"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.max_drop.value < 1:
            raise ValueError(f"max_drop: got {self.max_drop}, expected above 0 and below 100")

    def limits(self, task: Choice) -> tuple[Budget, ...]:
        """Return the gate's budget."""
        from optimizer.gate import Budget

        return (Budget("accuracy", self.max_drop.value, relative=self.max_drop.relative, score=self.metric),)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Share of questions whose right choice the model finds most likely; an item is a question."""

    budget: ClassVar[type[ChoiceBudget]] = ChoiceBudget
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    needs_labels: ClassVar[bool] = False

    data: str = field(metadata={"help": "entry of `data` that holds the questions", "names": "data"})
    layout: Literal["blimp", "arc", "piqa", "boolq", "winogrande", "mmlu"] | None = field(
        default=None, metadata={"help": "layout of a published data set; without, columns of your own"}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "text before each choice; {column} stands for a cell; {prompt} if not given"}
    )
    choices: str | tuple[str, ...] | None = field(
        default=None,
        metadata={"help": "{column} that holds a list of choices, or a list of texts; {choices} if not given"},
    )
    answer: str | None = field(
        default=None,
        metadata={"help": "column with the answer: number from 0, letter or text of a choice; answer if not given"},
    )
    names: str | tuple[str, ...] | None = field(
        default=None, metadata={"help": "what the answer column calls each choice: {column} of a list, or a list"}
    )
    context: int | None = field(
        default=None, metadata={"help": "tokens of a request; longer prompts are cut on the left", "ge": 2}
    )
    items: int | TopUp | None = field(default=None, metadata={"help": "a random sample of so many questions", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)
        own = [name for name in ("prompt", "choices", "answer", "names") if getattr(self, name) is not None]
        if self.layout and own:
            raise ValueError(f"{own[0]}: the layout {self.layout} says it already, expected one of layout and {own[0]}")
        for name in ("prompt", "choices", "names"):
            value = getattr(self, name) or ()
            for template in (value,) if isinstance(value, str) else value:
                check_named(name, template)

    def identity(self) -> Mapping[str, Any]:
        """Return the fields."""
        return asdict(self)

    @property
    def reading(self) -> Choice:
        """Return the task itself: every field decides its items."""
        return self

    def load(self, source: DataSource, reader: TextReader) -> list[Item]:
        """Read the questions, draw the sample, encode the requests."""
        layout = self._layout()
        records = read_records(source, layout.wanted)
        chosen = records if self.items is None else shuffled(records)[: limit_of(self.items)]
        return make_questions([read_question(record, layout) for record in chosen], reader, self.context)

    def _layout(self) -> Layout:
        if self.layout:
            return LAYOUTS[self.layout]
        prompt = "{prompt}" if self.prompt is None else self.prompt
        return Layout(prompt, self.choices or "{choices}", (self.answer or "answer",), self.names)

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return what guessing gets right: one in the number of choices, or more where one choice is often right.

        The second counts only where the choices are the same texts for all questions (BoolQ, letters): elsewhere their
        order says nothing, and BLiMP's right one always comes first.
        """
        firsts, choices = _first_of_each(items)
        blind = float(np.mean(1 / np.diff([*firsts, len(items)])))
        is_shared = len(set(choices)) == 1 and len(firsts) > 1
        return max(blind, majority_share([items[first] for first in firsts]) or 0.0) if is_shared else blind

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> ChoiceTally:
        """Return what sums up log-probabilities; the source's result is not needed."""
        return ChoiceTally(items, items_hash(items, self.context))

    def flips(self, items: Sequence[Item], before: TaskResult, after: TaskResult, reader: TextReader) -> Changed | None:
        """Return the questions that got another answer, by the sum of log-probabilities."""
        was, now = (result.scores["accuracy"].values.get("answer") for result in (before, after))
        if was is None or now is None:
            return None
        starts, choices = _first_of_each(items)
        right = [items[start].label for start in starts[: len(was)]]

        def asked(index: int) -> str:
            item = items[starts[index]]
            return ending(reader.decode(item.ids[: item.first + 1]))

        return changed_classes(was, now, right, asked, lambda index, number: reader.decode(choices[index][number]))


def _continuations(items: Sequence[Item]) -> list[Continuation]:
    return [item for item in items if isinstance(item, Continuation)]


def _first_of_each(items: Sequence[Item]) -> tuple[list[int], list[tuple[tuple[int, ...], ...]]]:
    """Return where each question begins, and the token ids of its choices."""
    asked = _continuations(items)
    firsts = [index for index, item in enumerate(asked) if index == 0 or item.question != asked[index - 1].question]
    ends = [*firsts[1:], len(asked)]
    pairs = zip(firsts, ends, strict=True)
    return firsts, [tuple(item.targets for item in asked[start:end]) for start, end in pairs]


class LikelihoodTally:
    """Sums the log-probabilities of each item's targets, and sees whether each was the most likely token."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = _continuations(items)
        self.sums = np.zeros(len(items))  # nats; NaN where a row holds NaN
        self.is_greedy = np.ones(len(items), bool)

    def add(self, rows: Rows) -> None:
        """Take logits; the row of position `first + i` is asked for target i."""
        item = self.items[rows.index]
        targets = item.targets[rows.first - item.first :][: len(rows.logits)]
        wanted = np.array(targets, np.int64)
        self.sums[rows.index] += rows.log_probs(wanted[:, None])[:, 0].sum()
        self.is_greedy[rows.index] &= bool(np.array_equal(rows.top, wanted))


class ChoiceTally(LikelihoodTally):
    """Answers each question with its most likely choice."""

    def __init__(self, items: Sequence[Item], name: str) -> None:
        super().__init__(items)
        self._name = name

    def result(self) -> TaskResult:
        """Return the share of right answers by sum and by sum per character, and of questions whose prompt was cut."""
        starts, _ = _first_of_each(self.items)
        groups = tuple(self.items[start].group for start in starts)
        lengths = np.array([item.characters for item in self.items])
        scores = {}
        for metric, values in (("accuracy", self.sums), ("accuracy_norm", self.sums / lengths)):
            answer, correct = self._answers(values, starts)
            told = {"correct": correct, "answer": answer}
            scores[metric] = Scores("accuracy", self._name, groups, told, float(np.mean(correct)))
        is_cut = np.array([any(item.is_cut for item in part) for part in self._by_question(self.items, starts)])
        if is_cut.any():
            scores["cut"] = Scores("cut", self._name, groups, {"cut": is_cut}, float(is_cut.mean()))
        return TaskResult(scores)

    def _answers(self, values: NDArray[np.float64], starts: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the choice with each question's largest value, and whether it is right; NaN where one value is NaN."""
        parts = self._by_question(values, starts)
        answer = np.array([int(np.argmax(part)) for part in parts])
        right = answer == np.array([self.items[start].label for start in starts])
        is_unknown = np.array([bool(np.isnan(part).any()) for part in parts])
        if not is_unknown.any():
            return answer, right
        return np.where(is_unknown, np.nan, answer), np.where(is_unknown, np.nan, right)

    def _by_question(self, values: Any, starts: Sequence[int]) -> list[Any]:
        return [values[start:end] for start, end in zip(starts, [*starts[1:], len(self.items)], strict=True)]
