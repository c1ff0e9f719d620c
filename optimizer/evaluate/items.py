"""What is evaluated: token ids made once, by the model's own tokenizer, so that every model answers the same thing."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from optimizer.errors import CannotRun
from optimizer.evaluate.data import DataError, Record, Row, read_rows
from optimizer.quantities import check_ranges
from optimizer.source import eos_token_ids, read_object
from passes._kind import first_line, kind_of, vocabulary_size
from passes._sentence import SentenceSettings, context_length, sentence_settings
from runtime.chat_template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from optimizer.evaluate.task import Task
    from optimizer.recipe import DataSource
    from runtime.artifact import Manifest

ENCODE_AT_ONCE = 1024
AnyRow = TypeVar("AnyRow", Row, Record)


@dataclass(frozen=True, kw_only=True)
class TopUp:
    """So many items at most: a gate that fewer have decided asks for no more."""

    most: int = field(metadata={"help": "most items; gates look at an eighth, a quarter, a half and all", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)


def limit_of(items: int | TopUp | None) -> int | None:
    """Return how many items a task takes at most, None for all."""
    return items.most if isinstance(items, TopUp) else items


@dataclass(frozen=True)
class Item:
    """One document, request or labelled text; tasks that need more of it have a subclass.

    Attributes:
        ids: token ids, special tokens included, cut to the task's context.
        group: items of one group are not independent; unique where the data has no groups.
        label: index of the right class or choice, None where there is none.
    """

    ids: tuple[int, ...]
    group: str
    label: int | None = None

    @property
    def first(self) -> int:
        """Return the first position whose logits are asked for."""
        return 0

    @property
    def unit(self) -> int | None:
        """Return which question it belongs to, where several items are scored as one; None where each is by itself."""
        return None

    @property
    def texts(self) -> tuple[tuple[int, ...], ...]:
        """Return the ids of each text that an embedder makes a vector of."""
        return (self.ids,)

    @property
    def types(self) -> tuple[int, ...]:
        """Return which text each token belongs to, 0 or 1; empty where there is one text alone."""
        return ()


@dataclass(frozen=True)
class Document(Item):
    """A text after BOS, for a decoder.

    Attributes:
        ids: BOS, then those of `text`, so that the model is asked for every byte of it.
        text: what the other ids stand for, whole characters.
    """

    text: str = ""


def items_hash(items: Sequence[Item], context: int | None) -> str:
    """Return the sha256, in hexadecimal, of `context` and all that the items hold."""
    digest = hashlib.sha256(f"{context} {len(items)}\n".encode())
    for item in items:
        more = [getattr(item, name) for name in item.__dataclass_fields__ if name not in ("ids", "label", "group")]
        # The header says how many ids follow, so that no two lists of items spell the same bytes.
        digest.update(json.dumps([len(item.ids), item.label, item.group, *more]).encode() + b"\n")
        digest.update(np.asarray(item.ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def tokens_read(tasks: Mapping[str, Task], items: Mapping[str, Sequence[Item]]) -> int:
    """Count the tokens that a model reads and writes to be scored; tasks whose items are equal share one reading."""
    distinct = {items_hash(items[name], 0): items[name] for name in tasks}
    read = sum(len(text) for chosen in distinct.values() for item in chosen for text in item.texts)
    return read + sum(getattr(task, "max_tokens", 0) * len(items[name]) for name, task in tasks.items())


def majority_share(items: Sequence[Item]) -> float | None:
    """Return the share of the most frequent label: what a model that reads nothing gets right. None without labels."""
    labels = Counter(item.label for item in items if item.label is not None)
    return labels.most_common(1)[0][1] / len(items) if labels else None


# ---- from text to ids


@dataclass(frozen=True)
class TextReader:
    """How one model reads text.

    Attributes:
        tokenizer: from the model's `tokenizer.json`.
        truncation: what `tokenizer.json` itself says about cutting, None for nothing.
        kind: "decoder", "classifier", "reranker" or "embedder".
        vocabulary: ids at or above it do not exist.
        context_length: most tokens the model takes.
        bos: beginning-of-sequence id of a decoder, None where it has none.
        sentence: how an embedder reads texts; None for another kind, or where its folder does not say.
        prefix: what a decoder reads before a text without a context: the tokenizer's BOS, else its EOS, else None.
        labels: class name -> index.
        eos: ids that end a decoder's text.
        chat_template: None where the model has none.
    """

    tokenizer: Tokenizer
    truncation: Mapping[str, Any] | None
    kind: str
    vocabulary: int
    context_length: int
    bos: int | None
    labels: Mapping[str, int]
    prefix: int | None = None
    eos: frozenset[int] = frozenset()
    chat_template: ChatTemplate | None = None
    sentence: SentenceSettings | None = None

    @classmethod
    def of(cls, assets: Path, config: Mapping[str, Any]) -> TextReader:
        """Read `assets/tokenizer.json` and the content of the model's `config.json`.

        Raises:
            CannotRun: there is no tokenizer, or it cannot be read.
        """
        return cls._read(
            assets,
            config,
            kind=kind_of(config),
            vocabulary=vocabulary_size(config),
            context_length=context_length(assets, config),
            sentence=sentence_settings(assets, config),
        )

    @classmethod
    def of_artifact(cls, folder: Path, manifest: Manifest) -> TextReader:
        """Read an artifact; its manifest says what a source's files say, without transformers.

        Raises:
            CannotRun: the tokenizer cannot be read.
        """
        said, settings = manifest.sentence, None
        if said is not None:
            pooling = cast(Any, said.pooling)
            settings = SentenceSettings(
                pooling, said.normalized, None, said.lower_case, said.prompts, said.default_prompt
            )
        return cls._read(
            folder,
            read_object(folder / "config.json"),
            kind=manifest.kind,
            vocabulary=manifest.vocabulary,
            context_length=manifest.context_length,
            sentence=settings,
        )

    @classmethod
    def _read(cls, assets: Path, config: Mapping[str, Any], **known: Any) -> TextReader:
        tokenizer, text = load_tokenizer(assets), config.get("text_config", config)
        named = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        return cls(
            tokenizer=tokenizer,
            truncation=tokenizer.truncation,
            bos=text.get("bos_token_id"),
            labels={str(name): int(index) for index, name in named.items()},
            prefix=_prefix(assets, tokenizer, text),
            eos=frozenset(eos_token_ids(assets, config)),
            chat_template=ChatTemplate.load(assets),
            **known,
        )

    def longest(self, context: int | None) -> int | None:
        """Return the most tokens of an item: the smaller of `context` and what the model reads, None for no bound."""
        return min(filter(None, (context, self.context_length)), default=None)

    def ends(self, text: str) -> list[int]:
        """Return, for each token of a whole text, no special ones among them, where its last character ends."""
        self.tokenizer.no_truncation()
        return [end for _, end in self.tokenizer.encode(text, add_special_tokens=False).offsets]

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts as the tokenizer writes them for its model, its special tokens included.

        A text that begins with BOS already, as a chat template's does, gets none besides.

        Raises:
            CannotRun: the tokenizer gives an id that the model does not know.
        """
        self.tokenizer.no_truncation()
        start = "" if self.prefix is None else self.tokenizer.decode([self.prefix], skip_special_tokens=False)
        found = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts))]
        for index, text in enumerate(texts):
            if start and text.startswith(start):
                found[index] = self.tokenizer.encode(text, add_special_tokens=False).ids
        self._require_known(found)
        return found

    def encode_chats(self, questions: Sequence[str]) -> list[list[int]]:
        """Return the ids of conversations that a user opens, each ending where the answer begins.

        Raises:
            CannotRun: the model has no chat template.
            PromptError: the template refuses a question.
        """
        if self.chat_template is None:
            raise CannotRun(
                "tokenizer_config.json: has no chat_template; leave `chat` out, or use a model that has one"
            )
        texts = [self.chat_template.render([{"role": "user", "content": question}]) for question in questions]
        self.tokenizer.no_truncation()
        found = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        self._require_known(found)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, number: int) -> str:
        """Return what one token stands for, the name of a token that stands for no whole characters."""
        text = self.decode([number])
        return text if text and "\ufffd" not in text else self.tokenizer.id_to_token(number) or str(number)

    def label(self, number: int) -> str:
        """Return the name of a class."""
        return next((name for name, index in self.labels.items() if index == number), str(number))

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each (context, continuation), split where the context's own ids end.

        Both are encoded as one text, white space at the context's end as part of the continuation. Without a context
        the continuation follows `prefix`.

        Raises:
            CannotRun: there is neither context nor prefix, or an id that the model does not know.
        """
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + rest) for context, rest in pairs]
        contexts = dict.fromkeys(context for context, _ in moved)
        contexts_ids = dict(zip(contexts, self.encode_whole(list(contexts)), strict=True))
        wholes = self.encode_whole([context + rest for context, rest in moved])
        return [
            (contexts_ids[context], whole[len(contexts_ids[context]) :]) if context else self._after_prefix(rest)
            for (context, rest), whole in zip(moved, wholes, strict=True)
        ]

    def _after_prefix(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.prefix is None:
            raise CannotRun(
                "tokenizer_config.json: names neither bos_token nor eos_token; a text alone needs one first"
            )
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)

    def encode(self, texts: Sequence[str], context: int, *, bos: bool) -> list[tuple[int, ...]]:
        """Return the ids of each text, cut to the shorter of `context` and the model's own context length.

        A decoder's text begins with BOS where `bos` asks for it and the model has one; that token counts. A text for a
        classifier has the special tokens of its tokenizer, and is cut earlier where `tokenizer.json` says so.

        Raises:
            CannotRun: the tokenizer gives an id that the model does not know.
        """
        context = min(context, self.context_length)
        ids = self._decoder_ids(texts, context, bos) if self.kind == "decoder" else self._encoder_ids(texts, context)
        self._require_known(ids)
        return ids

    def encode_for_encoder(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], context: int
    ) -> list[tuple[list[int], list[int]]]:
        """Return ids and types of texts, or of pairs of texts, as the runtime reads them: special tokens included.

        They are cut to the shorter of `context` and what the model reads, of a pair the longer text first;
        `tokenizer.json`'s own limit is not asked, as sentence-transformers does not ask it either.

        Raises:
            CannotRun: the tokenizer gives an id that the model does not know.
        """
        self.tokenizer.enable_truncation(min(context, self.context_length))
        found = [(encoding.ids, encoding.type_ids) for encoding in self.tokenizer.encode_batch(list(texts))]
        self._require_known([ids for ids, _ in found])
        return found

    def _require_known(self, ids: Sequence[Sequence[int]]) -> None:
        highest = max((max(row) for row in ids if row), default=-1)
        if highest >= self.vocabulary:
            raise CannotRun(
                f"tokenizer.json: does not fit the model, got token id {highest}, expected ids below the vocabulary's "
                f"{self.vocabulary}; use the tokenizer the model was trained with"
            )

    def _decoder_ids(self, texts: Sequence[str], context: int, bos: bool) -> list[tuple[int, ...]]:
        start = (self.bos,) if bos and self.bos is not None else ()
        self.tokenizer.no_truncation()
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [(*start, *encoding.ids)[:context] for encoding in found]

    def _encoder_ids(self, texts: Sequence[str], context: int) -> list[tuple[int, ...]]:
        own = self.truncation or {"max_length": context, "direction": "right"}
        self.tokenizer.enable_truncation(min(context, own["max_length"]), direction=own["direction"].lower())
        return [tuple(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(list(texts))]


def load_tokenizer(assets: Path) -> Tokenizer:
    """Read `tokenizer.json` of a folder, without its padding; raise CannotRun where that fails."""
    from tokenizers import Tokenizer

    path = assets / "tokenizer.json"
    if not path.is_file():
        raise CannotRun(f"{path}: is missing; save the model's fast tokenizer there (AutoTokenizer.save_pretrained)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare Exception
        raise CannotRun(f"{path}: is not a tokenizer ({first_line(error)}); save the model's tokenizer again") from None
    tokenizer.no_padding()
    return tokenizer


def _prefix(assets: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> int | None:
    """Return the id of the tokenizer's own BOS, else EOS; what `config.json` says where the tokenizer names neither."""
    settings = read_settings(assets)
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        number = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if number is not None:
            return number
    ids = config.get("bos_token_id"), config.get("eos_token_id")
    return next((number for number in ids if isinstance(number, int)), None)


def read_settings(assets: Path) -> Mapping[str, Any]:
    """Return what `special_tokens_map.json` and, before it, `tokenizer_config.json` say."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (assets / name).is_file():
            settings |= {key: value for key, value in read_object(assets / name).items() if value}
    return settings


# ---- from files to items


class Reading(Protocol):
    """How items are made of data; equal readings of one source make the same items."""

    def __hash__(self) -> int:
        """Return a hash of what decides the items."""

    def load(self, source: DataSource, reader: TextReader) -> list[Item]:
        """Read the files and return the items.

        Raises:
            DataError: a file cannot be used.
            CannotRun: the tokenizer does not fit the model.
        """


@runtime_checkable
class OwnReading(Protocol):
    """How items are made where the task itself knows its data."""

    def __hash__(self) -> int:
        """Return a hash of what decides the items."""

    def load_own(self, reader: TextReader) -> list[Item]:
        """Return the items; raise CannotRun where that fails."""


@dataclass(frozen=True)
class Texts:
    """Documents, or texts with labels: one item for each row.

    Attributes:
        context: most tokens of an item.
        bos: whether a decoder's text begins with BOS.
        limit: most items; they are a random sample.
    """

    context: int
    bos: bool = False
    limit: int | None = None

    def load(self, source: DataSource, reader: TextReader) -> list[Item]:
        """Read the rows, draw the sample, encode the texts."""
        rows = read_rows(source)
        chosen = rows if self.limit is None else shuffled(rows)
        return make_items(chosen, reader, self.context, bos=self.bos, limit=self.limit)


def load_items(tasks: Mapping[str, Task], data: Mapping[str, DataSource], reader: TextReader) -> dict[str, list[Item]]:
    """Return the items of every task; tasks that read the same data the same way get the same list.

    Raises:
        DataError: a file cannot be used.
        CannotRun: the tokenizer does not fit the model, or a task cannot score this kind of model.
    """
    made: dict[tuple[str, Reading | OwnReading], list[Item]] = {}
    result = {}
    for name, task in tasks.items():
        _check_fit(name, task, data, reader)
        reading = task.reading
        key = (task.data, reading)
        if key not in made:
            if isinstance(reading, OwnReading):
                made[key] = reading.load_own(reader)
            else:
                made[key] = reading.load(data[task.data], reader)
        result[name] = made[key]
    return result


def _check_fit(name: str, task: Task, data: Mapping[str, DataSource], reader: TextReader) -> None:
    if reader.kind not in task.kinds:
        wanted = " or ".join(task.kinds)
        raise CannotRun(f"evaluate.{name}: cannot score this kind of model, got {reader.kind}, expected {wanted}")
    if task.needs_labels and data[task.data].label is None:
        raise DataError(f"evaluate.{name}: data.{task.data} names no label column; add `label: COLUMN` to it")


def shuffled(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Return rows in the order of a hash of their group, else text: the first few are a sample of whole groups."""

    def place(row: AnyRow) -> tuple[str, str]:
        group = row.text if row.group is None else row.group
        return hashlib.sha256(group.encode()).hexdigest(), group

    return sorted(rows, key=place)


def make_items(
    rows: Sequence[Row], reader: TextReader, context: int, *, bos: bool = False, limit: int | None = None
) -> list[Item]:
    """Turn rows into at most `limit` items. A decoder's text of fewer than two tokens predicts nothing and is left out.

    Raises:
        DataError: a label is not one of the model's, or nothing is left.
    """
    items: list[Item] = []
    for start in range(0, len(rows), ENCODE_AT_ONCE):
        chunk = rows[start : start + ENCODE_AT_ONCE]
        encoded = reader.encode([row.text for row in chunk], context, bos=bos)
        for number, (row, ids) in enumerate(zip(chunk, encoded, strict=True), start):
            if reader.kind == "decoder" and len(ids) < 2:
                continue
            if not ids:
                raise DataError(f"{row.where}: got a text without tokens, expected at least one")
            is_labelled = reader.kind == "classifier" and row.label is not None
            label = _label_index(row.where, row.label, reader.labels) if is_labelled else None
            group = str(number) if row.group is None else row.group
            if reader.kind == "decoder" and bos and reader.bos is not None:
                items.append(_document(row.text, ids, group, reader, reader.longest(context) or context))
            else:
                items.append(Item(ids, group, label))
        if limit is not None and len(items) >= limit:
            return items[:limit]
    if not items:
        raise DataError(f"{rows[0].where} and the rest: got no text of two tokens or more, expected documents")
    return items


def _document(text: str, ids: tuple[int, ...], group: str, reader: TextReader, context: int) -> Document:
    """Return a document that begins with BOS, and its text; a cut within a character is moved before it."""
    if len(ids) < context:
        return Document(ids, group, text=text)
    ends, kept = reader.ends(text), len(ids) - 1
    if kept == len(ends):
        return Document(ids, group, text=text)
    while kept > 1 and ends[kept] == ends[kept - 1]:
        kept -= 1
    return Document(ids[: kept + 1], group, text=text[: ends[kept - 1]])


def encoded_again(items: Sequence[Item], reader: TextReader) -> list[Document]:
    """Return the same documents in the ids of another tokenizer, so that models of two vocabularies can be compared.

    Raises:
        ValueError: a document does not begin with BOS, or is longer than the model reads.
    """
    found = []
    for index, item in enumerate(items):
        if not isinstance(item, Document) or reader.bos is None:
            raise ValueError(f"items: item {index}: does not begin with BOS, so that its first token is not predicted")
        (ids,) = reader.encode([item.text], sys.maxsize, bos=True)
        if len(reader.ends(item.text)) + 1 != len(ids):
            raise ValueError(
                f"items: item {index}: got more than the {len(ids)} tokens the model reads; cut it shorter"
            )
        found.append(Document(ids, item.group, text=item.text))
    return found


def _label_index(where: str, value: object, labels: Mapping[str, int]) -> int:
    """Return the index of a class given by name or number."""
    index = labels.get(str(value))
    if index is None and str(value).isdecimal():
        index = int(str(value))
    if index is None or not 0 <= index < len(labels):
        close = difflib.get_close_matches(str(value), labels, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = f"a name of the model's id2label or a number from 0 to {len(labels) - 1}"
        raise DataError(f"{where}: unknown label, got {value!r}, expected {known}{hint}")
    return index
