"""Items of two texts: for an embedder two vectors to compare, for a reranker one text that holds both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimizer.errors import CannotRun
from optimizer.evaluate.data import DataError, Record, read_records
from optimizer.evaluate.items import Item, shuffled
from optimizer.evaluate.text_reader import TextReader

if TYPE_CHECKING:
    from optimizer.recipe import DataSource


@dataclass(frozen=True)
class PairItem(Item):
    """Two texts.

    Attributes:
        second: an embedder's: token ids of the second text; `ids` are those of the first.
        kinds: a reranker's: which text each token of `ids` belongs to, 0 or 1.
        score: how similar they are, by the data; None where it does not say.
    """

    second: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()
    score: float | None = None

    @property
    def texts(self) -> tuple[tuple[int, ...], ...]:
        """Return the ids of both texts of an embedder's pair."""
        return (self.ids, self.second)

    @property
    def types(self) -> tuple[int, ...]:
        """Return which text each token belongs to."""
        return self.kinds


@dataclass(frozen=True)
class Pair:
    """Two texts of the data; `where` names file and row, for messages."""

    where: str
    first: str
    second: str
    group: str
    score: float | None


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts: of two columns, or of one column's texts two by two in the order of their hashes.

    Attributes:
        context: most tokens of a text; of a reranker's pair.
        limit: most items; they are a random sample.
    """

    context: int
    limit: int | None = None

    def load(self, source: DataSource, reader: TextReader) -> list[Item]:
        """Read the rows, draw the sample, encode the texts.

        Raises:
            DataError: a file cannot be used, or holds fewer than two pairs.
            CannotRun: the model does not say how it makes vectors, or its tokenizer does not fit.
        """
        named = {"text": source.text, "second text": source.pair, "score": source.score}
        columns = [(part, column) for part, column in named.items() if column is not None]
        records = read_records(source, lambda _: columns)
        pairs = list(_given(records, source, self.limit) if source.pair else _made(records, source))[: self.limit]
        if len(pairs) < 2:
            raise DataError(f"{source.files[0]}: got {len(pairs)} pairs of texts, expected at least 2 to be ordered")
        if source.score is not None and len({pair.score for pair in pairs}) == 1:
            got = f"the same number {pairs[0].score:g} for all {len(pairs)} pairs"
            raise DataError(f"{source.files[0]}: {source.score}: got {got}, expected numbers to order them by")
        return _joint(pairs, reader, self.context) if reader.kind == "reranker" else _two(pairs, reader, self.context)


def _given(records: Sequence[Record], source: DataSource, limit: int | None) -> Iterator[Pair]:
    assert source.pair is not None
    for number, record in enumerate(records if limit is None else shuffled(records)):
        first, second = (_text(record, column) for column in (source.text, source.pair))
        group = str(number) if record.group is None else record.group
        yield Pair(record.where, first, second, group, None if source.score is None else _score(record, source.score))


def _made(records: Sequence[Record], source: DataSource) -> Iterator[Pair]:
    """Pair texts that stand beside each other in the order of their hashes; each text is in one pair."""
    if source.group is not None:
        raise DataError(
            f"{source.files[0]}: got groups of texts without pairs; pairs made of them would tie groups together, "
            "expected `pair: COLUMN` with the second text, or no group"
        )
    mixed = shuffled(records)
    for number, (one, other) in enumerate(zip(mixed[::2], mixed[1::2], strict=False)):
        yield Pair(one.where, _text(one, source.text), _text(other, source.text), str(number), None)


def _text(record: Record, column: str) -> str:
    text = record.cells[column]
    if not isinstance(text, str):
        raise DataError(f"{record.where}: {column}: got {text!r:.60}, expected a text")
    return text


def _score(record: Record, column: str) -> float:
    value = record.cells[column]
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{record.where}: {column}: got {value!r:.60}, expected a number")
    return score


def _two(pairs: Sequence[Pair], reader: TextReader, context: int) -> list[Item]:
    """Return items for an embedder, which reads each text by itself."""
    settings = reader.sentence
    if settings is None:
        raise CannotRun(
            "evaluate: got an encoder without modules.json of sentence-transformers, expected one that says how tokens "
            "become one vector"
        )
    start = settings.prompts[settings.default_prompt] if settings.default_prompt is not None else ""
    texts = [start + text for pair in pairs for text in (pair.first, pair.second)]
    ids = reader.encode_for_encoder([text.lower() for text in texts] if settings.lower_case else texts, context)
    _require_tokens(
        pairs, [min(first, second, key=len) for (first, _), (second, _) in zip(ids[::2], ids[1::2], strict=True)]
    )
    return [
        PairItem(tuple(first), pair.group, second=tuple(second), score=pair.score)
        for pair, (first, _), (second, _) in zip(pairs, ids[::2], ids[1::2], strict=True)
    ]


def _joint(pairs: Sequence[Pair], reader: TextReader, context: int) -> list[Item]:
    """Return items for a reranker, which reads both texts at once."""
    encoded = reader.encode_for_encoder([(pair.first, pair.second) for pair in pairs], context)
    _require_tokens(pairs, [ids for ids, _ in encoded])
    return [
        PairItem(tuple(ids), pair.group, kinds=tuple(types), score=pair.score)
        for pair, (ids, types) in zip(pairs, encoded, strict=True)
    ]


def _require_tokens(pairs: Sequence[Pair], ids: Sequence[Sequence[int]]) -> None:
    for pair, tokens in zip(pairs, ids, strict=True):
        if not tokens:
            raise DataError(f"{pair.where}: got a text without tokens, expected at least one")
