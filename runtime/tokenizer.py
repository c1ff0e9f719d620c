"""Text to token ids and back, by the artifact's own `tokenizer.json`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from runtime.chat_template import ChatTemplate, Message
from runtime.chat_tokens import ChatEncoder, encode_alone, strings
from runtime.errors import ArtifactError, PromptError

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Encoded(NamedTuple):
    """A text, or a pair of texts, as a model reads it.

    Attributes:
        ids: its tokens.
        types: of each token, 0 for the first text and 1 for the second.
        is_cut: whether tokens were left out, for the model reads no more.
    """

    ids: list[int]
    types: list[int]
    is_cut: bool


class Tokenizer:
    """The tokenizer of an artifact, with padding off and truncation only where it was asked for."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self._backend = backend
        self._chat = ChatEncoder(backend, chat_template) if chat_template is not None else None
        bytes_written_out = (backend.token_to_id(f"<0x{value:02X}>") for value in range(256))
        self._byte_ids = frozenset(token for token in bytes_written_out if token is not None)
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, content in self._added.items() if content.special)
        self._is_byte_level = backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()

    @classmethod
    def load(cls, folder: str | os.PathLike[str], max_tokens: int | None = None) -> Tokenizer:
        """Read `tokenizer.json` and the chat template, if there is one.

        Args:
            folder: an artifact, or any folder with these files.
            max_tokens: cut longer texts to so many ids, special ones kept; None never cuts.

        Raises:
            ArtifactError: when a file is missing or cannot be read.
        """
        import tokenizers

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{path}: is missing; build the artifact again")
        try:
            backend = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises Exception itself
            raise ArtifactError(f"{path}: cannot be read: {error}; build the artifact again") from None
        backend.no_padding()
        backend.no_truncation()
        if max_tokens is not None:
            backend.enable_truncation(max_tokens)
        return cls(backend, ChatTemplate.load(Path(folder)))

    @property
    def vocabulary(self) -> int:
        """Number of ids with a text; a graph may have more, rounded up to a convenient size."""
        return self._backend.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be used."""
        return self._chat is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with the special tokens that the model expects around it unless told otherwise."""
        return encode_alone(self._backend, _unicode(text), add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Return each text as `encode` does, and whether it was cut."""
        return self._encode_each([_unicode(text) for text in texts])

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Return each pair of texts in one sequence; where it is cut, the longer of the two texts is cut first."""
        return self._encode_each([(_unicode(first), _unicode(second)) for first, second in pairs])

    def _encode_each(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[Encoded]:
        encodings = self._backend.encode_batch(list(texts))
        return [Encoded(each.ids, each.type_ids, bool(each.overflowing)) for each in encodings]

    def encode_chat(self, messages: Sequence[Message], /, **variables: Any) -> list[int]:
        """Return the ids of a conversation, ending where the assistant's answer begins.

        Names of control tokens in the messages are ordinary text.

        Raises:
            PromptError: when there is no chat template or it refuses the messages.
        """
        if self._chat is None:
            raise PromptError("messages: this artifact has no chat template; give a plain prompt instead")
        for text in strings([messages, variables]):
            _unicode(text)
        return self._chat.encode(messages, variables)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids, special tokens left out unless told otherwise."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self) -> Detokenizer:
        """Return a fresh incremental decoder."""
        return Detokenizer(self)

    def token_bytes(self, token: int) -> bytes:
        """Return what one id stands for, a special token's name too; a part of a character is a part of its bytes.

        What only the neighbours decide is left out: a space that is stripped at the beginning of a text is there.
        """
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        if token in self._added:
            return self._added[token].content.encode()
        if token in self._byte_ids:
            return bytes([int(text[3:5], 16)])
        if self._is_byte_level:
            return bytes(_BYTES.get(character, ord("?")) for character in text)
        return text.replace("▁", " ").encode()

    def joins_bytes(self, token: int, before: bool) -> bool:
        """Whether the text of the ids up to `token` may still change with the next one, `before` being the last answer.

        Tokens written `<0xE2>` are decoded together, a run of them at a time; special tokens are left out and so do
        not end a run.
        """
        return token in self._byte_ids or (before and token in self._special_ids)


class Detokenizer:
    """Turns a growing list of ids into pieces of text that are final.

    No piece ends within a character, and the pieces joined equal `Tokenizer.decode` of all ids. Only the ids since the
    last but one piece are decoded again, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last piece's ids, for decoders that look one token back, then those since
        self._context = 0  # how many of them are the last piece's
        self._sent = 0  # characters of their text that were returned already
        self._in_bytes = False

    def add(self, token: int) -> str:
        """Take one id and return the text it completes, often empty."""
        self._ids.append(token)
        self._in_bytes = self._tokenizer.joins_bytes(token, self._in_bytes)
        if self._in_bytes:
            return ""
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_REPLACEMENT):  # bytes of a character whose rest may follow
            return self._take(text[:-1])
        piece = self._take(text)
        if piece:
            del self._ids[: self._context]
            self._context = len(self._ids)
            self._sent = len(self._tokenizer.decode(self._ids))
        return piece

    def finish(self) -> str:
        """Return what is left: bytes that never became a character read as U+FFFD."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, final: str) -> str:
        piece = final[self._sent :]
        self._sent = max(self._sent, len(final))
        return piece


def _byte_alphabet() -> dict[str, int]:
    """Return the characters that byte-level vocabularies write bytes as (GPT-2's: printable ones as themselves)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES: Final = _byte_alphabet()


def _unicode(text: str) -> str:
    """Return the text, or say that it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompt: is not valid Unicode at character {error.start}; remove that character") from None
    return text
