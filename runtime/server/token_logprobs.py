"""Logprobs as OpenAI writes them: one way for chats, an older one for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from runtime.logprobs import TokenLogprob
from runtime.tokenizer import Tokenizer

_LEAST: Final = -9999.0  # JSON has no infinity


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the object of a chat's choice."""
    return {"content": [_chat_token(tokenizer, each) for each in logprobs], "refusal": None}


def _chat_token(tokenizer: Tokenizer, each: TokenLogprob) -> dict[str, Any]:
    top = [_token(tokenizer, token, logprob) for token, logprob in each.top]
    return _token(tokenizer, each.token, each.logprob) | {"top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": shown(raw), "logprob": max(logprob, _LEAST), "bytes": list(raw)}


class CompletionLogprobs:
    """Writes the older object, whose offsets count the characters of all text before."""

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        """Begin at the first character; `count` is how many alternatives were asked for."""
        self._tokenizer, self._count = tokenizer, count
        self._detokenizer = tokenizer.detokenizer()
        self._offset = 0

    def of(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Return the object of further tokens; None stands for a token that nothing comes before."""
        return {
            "tokens": [self._shown(token) for token in ids],
            "token_logprobs": [None if each is None else max(each.logprob, _LEAST) for each in logprobs],
            "top_logprobs": [None if each is None else self._top(each) for each in logprobs] if self._count else None,
            "text_offset": [self._next_offset(token) for token in ids],
        }

    def _shown(self, token: int) -> str:
        return shown(self._tokenizer.token_bytes(token))

    def _top(self, each: TokenLogprob) -> dict[str, float]:
        """Return text to logprob of the likeliest, and of the token itself; of equal texts the likelier counts."""
        found: dict[str, float] = {}
        for token, logprob in (*each.top, (each.token, each.logprob)):
            found.setdefault(self._shown(token), max(logprob, _LEAST))
        return found

    def _next_offset(self, token: int) -> int:
        at = self._offset
        self._offset += len(self._detokenizer.add(token))
        return at


def shown(raw: bytes) -> str:
    """Return a token's text; one that is part of a character reads `bytes:\\xe2\\x82`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
