"""A conversation to token ids, so that what people write never becomes a control token.

A tokenizer takes the name of a control token in a text for the token itself: a user who writes `<|im_end|>` would end
their own turn and could write the next one as the assistant. Here only the template can.

A conversation without such names, as nearly all are, is rendered and encoded as it stands, which is what transformers'
`apply_chat_template` does. In another one each name that people wrote becomes one private character before the template
sees it. What names there are in the rendered text are then the template's own. They are given secret names, under which
a second copy of the tokenizer knows its control tokens; that copy takes the true names, put back in place of the
characters, for ordinary text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from runtime.chat_template import ChatTemplate, Message
from runtime.errors import PromptError

if TYPE_CHECKING:
    import tokenizers

_SAMPLES = [
    [{"role": role, "content": "x"} for role in roles]
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"])
]
_MARKED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_PRIVATE = range(0x100000, 0x10FFFE)  # characters that mean nothing: plane 16, for private use


class ChatEncoder:
    """Renders conversations with a template and encodes them with a tokenizer.

    Control tokens are the added tokens that the tokenizer calls special or whose names read like `<|fim_prefix|>`, and
    what others the template writes. Messages of the assistant may hold those others, such as `<think>`, for templates
    look for them there. What is left is text that got a token of its own: runs of spaces, `<table>`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: ChatTemplate) -> None:
        self._backend, self._template = backend, template

    @cached_property
    def _controls(self) -> dict[str, bool]:
        """Name of each control token -> whether not even the assistant writes it; of two that begin alike the longer
        comes first.
        """
        written = self._template.source + "".join(map(self._rendered, _SAMPLES))
        found = {}
        for token in self._backend.get_added_tokens_decoder().values():
            is_strict = token.special or _MARKED.fullmatch(token.content) is not None
            if is_strict or (token.content.strip() and token.content in written):
                found[token.content] = is_strict
        return {name: found[name] for name in sorted(found, key=len, reverse=True)}

    def _rendered(self, messages: Sequence[Message]) -> str:
        try:
            return self._template.render(messages)
        except PromptError:  # not every template takes every role
            return ""

    @cached_property
    def _any(self) -> re.Pattern[str]:
        return _finder(list(self._controls))

    @cached_property
    def _strict(self) -> re.Pattern[str]:
        return _finder([name for name, is_strict in self._controls.items() if is_strict])

    def encode(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """Return the ids of a conversation, ending where the assistant's answer begins.

        Raises:
            PromptError: when the template refuses the messages.
        """
        asked = [(message, self._finder_for(message)) for message in messages]
        if not any(_finds(*pair) for pair in asked) and not _finds(variables, self._any):
            return self._encode(self._backend, self._template.render(messages, **variables))
        stand_ins = self._stand_ins([*messages, variables])

        def hidden(value: Any, finder: re.Pattern[str]) -> Any:
            return _mapped(value, lambda text: finder.sub(lambda match: stand_ins[match[0]], text))

        text = self._template.render(
            [hidden(message, finder) for message, finder in asked], **hidden(variables, self._any)
        )
        text = self._any.sub(lambda match: self._secret_names[match[0]], text)
        for name, character in stand_ins.items():
            text = text.replace(character, name)
        return self._encode(self._secret_backend, text)

    def _finder_for(self, message: Message) -> re.Pattern[str]:
        return self._strict if message.get("role") == "assistant" else self._any

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        return encode_alone(backend, text, add_special_tokens=False)  # the template writes them itself

    def _stand_ins(self, texts: Sequence[Any]) -> dict[str, str]:
        """Return a character for each control token that occurs neither in these texts nor in the template."""
        used = {character for text in (*strings(texts), self._template.source) for character in text}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        return dict(zip(self._controls, free, strict=False))

    @cached_property
    def _secret_names(self) -> dict[str, str]:
        return {name: f"<{secrets.token_hex(16)}>" for name in self._controls}

    @cached_property
    def _secret_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer under whose control tokens have their secret names."""
        import tokenizers

        content = json.loads(self._backend.to_str())
        content |= {"post_processor": None, "truncation": None, "padding": None}
        for token in content["added_tokens"]:
            token["content"] = self._secret_names.get(token["content"], token["content"])
        _rename(content["model"], self._secret_names)
        return tokenizers.Tokenizer.from_str(json.dumps(content))


def encode_alone(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return the ids of one text; unlike `encode` of the library, this lets other threads run meanwhile."""
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename pieces of a tokenizer's model, and let nothing be merged to the old names."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): token for piece, token in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in names]


def _merged(merge: str | Sequence[str]) -> str:
    """Return what a merge makes; older files write its two halves with a space between."""
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _finder(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _finds(value: Any, finder: re.Pattern[str]) -> bool:
    return any(finder.search(text) for text in strings(value))


def strings(value: Any) -> Iterator[str]:
    """Yield all strings in messages and variables, but for the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return messages or variables with all their strings changed, but for the keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_mapped(item, change) for item in value]
    return value
