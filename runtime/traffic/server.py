"""An OpenAI-compatible server as a target: `/v1/completions` or `/v1/chat/completions`, streamed."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from runtime.errors import LoadError, ServingError
from runtime.traffic.http_client import HttpClient, Reply
from runtime.traffic.measure import Clock, Heard, Work
from runtime.traffic.workload import Question

BUSY: Final = "optimize_engine_busy_seconds_total"
"""The counter in /metrics of our own server that says how long its engines computed."""


@dataclass(frozen=True)
class Served:
    """What a server says of a model.

    Attributes:
        model: its name.
        vocabulary: its number of token ids; None where the server does not say.
    """

    model: str
    vocabulary: int | None


class Server:
    """Asks a server for streamed, greedy answers of a fixed length; errors are those of the server, in one line."""

    def __init__(self, url: str, *, key: str | None = None, clock: Clock = time.perf_counter) -> None:
        """Take an address, with or without the `/v1` at its end, and an API key.

        Raises:
            LoadError: it is no http or https address, or a key that no header can hold.
        """
        if key and not re.fullmatch("[!-~]+", key):
            raise LoadError("OPENAI_API_KEY: holds a space, a line break or a letter that is not ASCII; set it anew")
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = HttpClient(self._url, headers, clock)
        self._model = ""

    def find(self, model: str | None) -> Served:
        """Choose a model, the server's first if None, and return what the server says of it.

        Raises:
            LoadError: the server wants another key, or has no such model.
            ServingError: it cannot be reached, or does not speak this protocol.
        """
        served = asyncio.run(self._find(model))
        self._model = served.model
        return served

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Close the connections at the end."""
        try:
            yield
        finally:
            self._client.close()

    async def ask(self, question: Question) -> Heard:
        """Return a streamed answer."""
        is_chat = _is_chat(question)
        stream = _Stream(self._url)
        document = {
            "model": self._model,
            "messages" if is_chat else "prompt": question.prompt,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        reply = await self._client.post(path, document, stream.feed)
        if reply.status != 200:
            raise ServingError(f"{self._url}{path}: {_told(reply)}")
        return stream.heard(None if is_chat or isinstance(question.prompt, str) else len(question.prompt))

    async def work(self) -> Work | None:
        """Return the busy seconds that our own server tells in /metrics."""
        try:
            reply = await self._client.get("/metrics")
        except ServingError:
            return None
        values = [_value(line) for line in reply.body.decode(errors="replace").splitlines() if line.startswith(BUSY)]
        return Work(sum(values)) if reply.status == 200 and values else None

    async def _find(self, model: str | None) -> Served:
        try:
            reply = await self._client.get("/v1/models")
        finally:
            self._client.close()
        if reply.status in (401, 403):
            raise LoadError(f"{self._url}: {_told(reply)}; set OPENAI_API_KEY to a key that it takes")
        found = reply.json()
        listed = found.get("data") if isinstance(found, dict) and reply.status == 200 else None
        models = [each for each in listed or () if isinstance(each, dict) and isinstance(each.get("id"), str)]
        if not models:
            if model is not None:
                return Served(model, None)
            raise ServingError(f"{self._url}/v1/models: {_told(reply)}, expected a list of models; name one by --model")
        chosen = next((each for each in models if model in (None, each["id"])), None)
        if chosen is None:
            names = ", ".join(each["id"] for each in models)
            raise LoadError(f"--model: got {model!r}, expected one of {names}")
        return Served(chosen["id"], _vocabulary(chosen))


class _Stream:
    """Reads server-sent events and notes when those came that carry a piece of the answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rest = b""
        self._arrivals: list[float] = []
        self._usage: dict[str, Any] = {}
        self._is_complete = False

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that came now.

        Raises:
            ServingError: an event says that the request failed, or is no JSON.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def heard(self, prompt_tokens: int | None) -> Heard:
        """Return the whole answer; `prompt_tokens` counts where the server does not.

        Raises:
            ServingError: it has no end.
        """
        if not self._is_complete:
            raise ServingError(f"{self._url}: ended a stream without [DONE] or a finish_reason")
        output, given = self._usage.get("completion_tokens"), self._usage.get("prompt_tokens")
        return Heard(
            tuple(self._arrivals),
            output if isinstance(output, int) else len(self._arrivals),
            given if isinstance(given, int) else prompt_tokens,
            is_counted=isinstance(output, int),
        )

    def _take(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._is_complete = True
            return
        try:
            event = json.loads(payload)
        except ValueError:
            raise ServingError(f"{self._url}: sent an event that is no JSON") from None
        if not isinstance(event, dict) or event.get("error"):
            raise ServingError(f"{self._url}: {_message(event)}")
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            self._is_complete |= choice.get("finish_reason") is not None
            if _is_piece(choice):
                self._arrivals.append(now)


def _is_piece(choice: dict[str, Any]) -> bool:
    """Whether a choice of an event carries a token: it has text, or is neither the role before nor the end after it.

    A token whose bytes are no whole character yet has an empty text.
    """
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning")):
        return True
    return "role" not in delta and choice.get("finish_reason") is None


def _is_chat(question: Question) -> bool:
    return not isinstance(question.prompt, str) and isinstance(question.prompt[0], dict)


def _told(reply: Reply) -> str:
    """Return status and message of an answer that is none."""
    return f"answered {reply.status}, {_message(reply.json())}"


def _message(document: Any) -> str:
    """Return the message of an error in OpenAI's shape or another, on one line."""
    error = document.get("error", document) if isinstance(document, dict) else None
    found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(found).split())[:300] if found else "without a message"


def _vocabulary(model: dict[str, Any]) -> int | None:
    """Return the number of token ids that a server tells with a model: ours does, and llama.cpp's."""
    meta = model.get("meta")
    for found in (model.get("vocabulary"), meta.get("n_vocab") if isinstance(meta, dict) else None):
        if isinstance(found, int) and found > 0:
            return found
    return None


def _value(line: str) -> float:
    """Return the number of a line of Prometheus' text format."""
    try:
        return float(line.rpartition(" ")[2])
    except ValueError:
        return 0.0
