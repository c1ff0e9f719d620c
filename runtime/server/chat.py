"""`POST /v1/chat/completions`: a conversation through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from runtime.request import FinishReason, Options, Piece
from runtime.request import Request as Asked
from runtime.server.answering import Answered, Usage
from runtime.server.framing import Frame, encoded, encoded_text
from runtime.server.generating import generate
from runtime.server.protocol import ChatBody
from runtime.server.service import Served, Service
from runtime.server.token_logprobs import chat_logprobs
from runtime.tokenizer import Tokenizer


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        name, served = service.find(body.model, ("decoder",))

        def read() -> list[Asked]:
            ids = served.tokenizer.encode_chat(body.conversation, **body.chat_template_kwargs)
            return [served.engine.engine.read(ids, **_options(body, served, len(ids)))]

        def shape(_: Sequence[Asked]) -> ChatShape:
            return ChatShape(body, name, served)

        return await generate(service, name, served, body, request, answers=body.n, read=read, shape=shape)

    return routes


def _options(body: ChatBody, served: Served, prompt_tokens: int) -> Options:
    options = body.options(served.sampling)
    options["logprobs"] = body.top_logprobs if body.logprobs else None
    room = max(served.engine.engine.longest - prompt_tokens, 1)
    options["max_tokens"] = room if body.most_tokens is None else body.most_tokens
    return options


class ChatShape:
    """Writes answers as OpenAI's `chat.completion` and its chunks."""

    def __init__(self, body: ChatBody, name: str, served: Served) -> None:
        usage = body.stream_options
        self._frame = Frame(
            "chatcmpl",
            "chat.completion.chunk" if body.stream else "chat.completion",
            name,
            served.manifest.digest,
            includes_usage=usage.include_usage,
            is_continuous=usage.continuous_usage_stats,
        )
        self._tokenizer: Tokenizer | None = served.tokenizer if body.logprobs else None

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """Return the body of a response."""
        choices = [self._choice(index, answered) for index, answered in enumerate(answers)]
        return self._frame.head | {"choices": choices, "usage": usage.content}

    def _choice(self, index: int, answered: Answered) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answered.text, "refusal": None},
            "logprobs": self._logprobs(answered.pieces),
            "finish_reason": answered.reason,
            "stop_reason": answered.completion.stop_reason if answered.completion else None,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self._tokenizer is None:
            return None
        return chat_logprobs(self._tokenizer, [each for piece in pieces for each in piece.logprobs])

    def begin(self, index: int, usage: Usage) -> bytes:
        """Return the event that says who speaks."""
        return self._chunk(index, b'{"role":"assistant","content":""}', b"null", b"null", usage)

    def grow(self, index: int, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """Return the event of new pieces."""
        text = "".join([piece.text for piece in pieces])
        if not text and self._tokenizer is None:
            return b""
        delta = b'{"content":' + encoded_text(text) + b"}"
        return self._chunk(index, delta, encoded(self._logprobs(pieces)), b"null", usage)

    def end(self, index: int, reason: FinishReason, usage: Usage) -> bytes:
        """Return the event that ends an answer."""
        return self._chunk(index, b"{}", b"null", encoded(reason), usage)

    def close(self, usage: Usage) -> bytes:
        """Return the event of the tokens that were read and written."""
        return self._frame.close(usage)

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, reason: bytes, usage: Usage) -> bytes:
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, reason)
        return self._frame.chunk(choice, usage)
