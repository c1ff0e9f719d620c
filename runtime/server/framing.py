"""Events of a stream, built from parts that are encoded once: a token costs the encoding of its text."""

from __future__ import annotations

import json
import secrets
import time
from json.encoder import encode_basestring
from typing import Any, Final

from runtime.server.answering import Usage

_END: Final = b"}\n\n"
_BREAKS: Final = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


class Frame:
    """What all chunks and the whole of one answer have in common.

    Attributes:
        head: id, kind, time, model and fingerprint, as JSON has them.
    """

    def __init__(
        self,
        prefix: str,
        kind: str,
        model: str,
        digest: str,
        *,
        includes_usage: bool = False,
        is_continuous: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            prefix: of its id.
            kind: what OpenAI calls such an object.
            model: the name it was asked by.
            digest: identity of the artifact: the answer's fingerprint.
            includes_usage: whether a stream ends with the tokens that were read and written.
            is_continuous: whether each chunk tells them.
        """
        self.head: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{digest[:12]}",
        }
        self._includes_usage, self._is_continuous = includes_usage, is_continuous
        self._start = b"data: " + encoded(self.head)[:-1] + b',"choices":['
        self._end = b"]" + (b',"usage":null' if includes_usage else b"") + _END

    def chunk(self, choice: bytes, usage: Usage) -> bytes:
        """Return the event of one choice, which is JSON already."""
        if self._is_continuous:
            return self._start + choice + b'],"usage":' + encoded(usage.content) + _END
        return self._start + choice + self._end

    def close(self, usage: Usage) -> bytes:
        """Return the event after all choices, if there is one."""
        if not self._includes_usage:
            return b""
        return self._start + b'],"usage":' + encoded(usage.content) + _END


def encoded_text(text: str) -> bytes:
    """Return a text as a JSON string that has no line break in anybody's eyes."""
    return _one_line(encode_basestring(text))


def encoded(value: object) -> bytes:
    """Return a value as JSON that has no line break in anybody's eyes."""
    return _one_line(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _one_line(content: str) -> bytes:
    """Escape what only some readers of lines take for an end of one: an event is cut at newlines, says its standard."""
    return (content if content.isascii() else content.translate(_BREAKS)).encode()
