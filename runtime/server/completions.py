"""`POST /v1/completions`: prompts as text or token ids, several at once, echoed if asked."""

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
from runtime.server.protocol import CompletionBody
from runtime.server.service import Served, Service
from runtime.server.token_logprobs import CompletionLogprobs


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionBody, request: Request) -> Response:
        name, served = service.find(body.model, ("decoder",))

        def read() -> list[Asked]:
            options = _options(body, served)
            return [served.engine.engine.read(prompt, **options) for prompt in body.prompts]

        def shape(prompts: Sequence[Asked]) -> CompletionShape:
            return CompletionShape(body, name, served, prompts)

        return await generate(
            service, name, served, body, request, answers=len(body.prompts) * body.n, read=read, shape=shape
        )

    return routes


def _options(body: CompletionBody, served: Served) -> Options:
    options = body.options(served.sampling)
    options["max_tokens"] = body.max_tokens
    options["logprobs"] = body.logprobs
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        options["prompt_logprobs"] = body.logprobs or 0
    if body.echo and body.logprobs is not None and body.max_tokens == 1:
        options["ignore_eos"] = True  # who scores a prompt counts on one token after it, be it EOS
    return options


class CompletionShape:
    """Writes answers as OpenAI's `text_completion`."""

    def __init__(self, body: CompletionBody, name: str, served: Served, prompts: Sequence[Asked]) -> None:
        usage = body.stream_options
        self._frame = Frame(
            "cmpl",
            "text_completion",
            name,
            served.manifest.digest,
            includes_usage=usage.include_usage,
            is_continuous=usage.continuous_usage_stats,
        )
        self._body, self._tokenizer, self._prompts = body, served.tokenizer, prompts
        count = body.logprobs
        answers = len(prompts) * body.n
        self._logprobs = (
            None if count is None else [CompletionLogprobs(served.tokenizer, count) for _ in range(answers)]
        )

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """Return the body of a response."""
        choices = [self._choice(index, answered) for index, answered in enumerate(answers)]
        return self._frame.head | {"choices": choices, "usage": usage.content}

    def _choice(self, index: int, answered: Answered) -> dict[str, Any]:
        ids = [token for piece in answered.pieces for token in piece.token_ids]
        logprobs: list[Any] = [each for piece in answered.pieces for each in piece.logprobs]
        text = answered.text
        if self._body.echo:
            text = self._prompt(index) + text
            ids = [*self._prompts[index // self._body.n].ids.tolist(), *ids]
            logprobs = [*self._prompt_logprobs(answered), *logprobs]
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._logprobs is None else self._logprobs[index].of(ids, logprobs),
            "finish_reason": answered.reason,
            "stop_reason": answered.completion.stop_reason if answered.completion else None,
        }

    def _prompt_logprobs(self, answered: Answered) -> Sequence[Any]:
        return () if answered.completion is None else answered.completion.prompt_logprobs or ()

    def _prompt(self, index: int) -> str:
        prompt = self._body.prompts[index // self._body.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def begin(self, index: int, usage: Usage) -> bytes:
        """Return the echo, if there is to be one."""
        if not self._body.echo:
            return b""
        return self._chunk(index, self._prompt(index), b"null", b"null", usage)

    def grow(self, index: int, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """Return the event of new pieces."""
        text = "".join([piece.text for piece in pieces])
        logprobs = b"null"
        if self._logprobs is not None:
            ids = [token for piece in pieces for token in piece.token_ids]
            logprobs = encoded(self._logprobs[index].of(ids, [each for piece in pieces for each in piece.logprobs]))
        elif not text:
            return b""
        return self._chunk(index, text, logprobs, b"null", usage)

    def end(self, index: int, reason: FinishReason, usage: Usage) -> bytes:
        """Return the event that ends an answer."""
        return self._chunk(index, "", b"null", encoded(reason), usage)

    def close(self, usage: Usage) -> bytes:
        """Return the event of the tokens that were read and written."""
        return self._frame.close(usage)

    def _chunk(self, index: int, text: str, logprobs: bytes, reason: bytes, usage: Usage) -> bytes:
        choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (
            index,
            encoded_text(text),
            logprobs,
            reason,
        )
        return self._frame.chunk(choice, usage)
