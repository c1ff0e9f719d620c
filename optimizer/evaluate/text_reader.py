"""How one model reads text: token ids made by its own tokenizer, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from optimizer.errors import CannotRun
from optimizer.source import eos_token_ids, read_object
from passes._kind import first_line, kind_of, vocabulary_size
from passes._sentence import SentenceSettings, context_length, sentence_settings
from runtime.chat_template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from runtime.artifact import Manifest


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
