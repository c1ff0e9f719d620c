"""One request's life once its prompt is read: its tickets, its deadline and its client, until the last byte is written.

The status is decided with the first token, so whatever goes wrong before it has a status of its own; what goes wrong
later is an error event in the stream. An answer that meets its deadline, or the end of the server, ends where it is
with the finish reason "length".
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.async_engine import AsyncEngine, AsyncTicket
from runtime.errors import ServingError
from runtime.request import Completion, FinishReason, Piece, Request
from runtime.server.admission import Entry
from runtime.server.errors import ApiError
from runtime.server.log import note
from runtime.server.service import Service

DONE: Final = b"data: [DONE]\n\n"
LATE: Final = ApiError(504, "request: its time ran out before its answer began; ask again later")
"""What a request is told whose deadline came first."""


@dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def content(self) -> dict[str, int]:
        """As JSON has it."""
        both = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return both | {"total_tokens": sum(both.values())}


@dataclass(frozen=True)
class Answered:
    """One whole answer.

    Attributes:
        pieces: all of it.
        reason: why it ended.
        completion: the engine's own account; None where the answer was ended early.
    """

    pieces: Sequence[Piece]
    reason: FinishReason
    completion: Completion | None

    @property
    def text(self) -> str:
        """What is to be shown."""
        return "".join(piece.text for piece in self.pieces)


class Shape(Protocol):
    """How a route writes answers, whole or as events of a stream; `index` is the place of one among them."""

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """Return the body of a response."""

    def begin(self, index: int, usage: Usage) -> bytes:
        """Return the events before the first piece."""

    def grow(self, index: int, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """Return the event of new pieces; nothing where they show nothing."""

    def end(self, index: int, reason: FinishReason, usage: Usage) -> bytes:
        """Return the event that ends an answer."""

    def close(self, usage: Usage) -> bytes:
        """Return the events after all answers, but for the last line."""


@dataclass
class _Choice:
    """One answer on its way out."""

    ticket: AsyncTicket
    tokens: int = 0
    has_begun: bool = False
    is_closed: bool = False


class Answering(Response):
    """The response to a request for one or several answers."""

    def __init__(
        self,
        service: Service,
        entry: Entry,
        name: str,
        engine: AsyncEngine,
        prompts: Sequence[Request],
        n: int,
        shape: Shape,
        *,
        prompt_tokens: int,
        is_stream: bool,
        timeout_s: float,
        headers: Mapping[str, str],
    ) -> None:
        """Prepare to answer.

        Args:
            service: that it belongs to.
            entry: its place in the queue, which it leaves at the end.
            name: of the model.
            engine: who answers.
            prompts: what to answer.
            n: answers to each prompt.
            shape: how they are written.
            prompt_tokens: of all prompts, a prompt with several answers counted once.
            is_stream: whether pieces are sent as they come.
            timeout_s: seconds until it ends where it is.
            headers: of the response, beside its kind and length.
        """
        super().__init__()
        self._added = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._service, self._entry, self._name, self._engine = service, entry, name, engine
        self._prompts, self._n, self._shape = prompts, n, shape
        self._prompt_tokens, self._is_stream, self._timeout_s = prompt_tokens, is_stream, timeout_s
        self._bell = asyncio.Event()
        self._choices: list[_Choice] = []
        self._expired: ApiError | None = None
        self._is_gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and leave nothing behind however that ends."""
        loop = asyncio.get_running_loop()
        watcher = loop.create_task(self._watch(receive))
        timer = loop.call_later(self._timeout_s, self.expire, LATE)
        self._service.attend(self)
        try:
            for prompt in self._prompts:
                tickets = self._engine.add_many(prompt, self._n, self._bell, is_quiet=not self._is_stream)
                self._choices += map(_Choice, tickets)
            await self._answer(send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except _ClientGone:
            note(scope, finish="disconnect")
        finally:
            timer.cancel()
            watcher.cancel()
            self._service.dismiss(self)
            for choice in self._choices:
                choice.ticket.cancel()
                self._service.metrics.ended(self._name, choice.ticket.request, choice.ticket.completion)
            self._entry.leave()
            note(scope, **self._usage().content)

    def expire(self, error: ApiError) -> None:
        """End all answers where they are; with an error if none has begun."""
        self._expired = error
        for choice in self._choices:
            choice.ticket.cancel()
        self._bell.set()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._bell.set()

    async def _news(self) -> None:
        await self._bell.wait()
        self._bell.clear()
        if self._is_gone:
            raise _ClientGone

    async def _answer(self, send: Send) -> None:
        await self._news()
        self._check()
        self._entry.start()
        if self._is_stream:
            await self._send_stream(send)
        else:
            await self._send_whole(send)

    def _check(self) -> None:
        """Raise what is to be answered instead of tokens."""
        if self._expired is not None:
            if not any(choice.ticket.has_begun for choice in self._choices):
                raise self._expired
        elif error := self._error():
            raise ApiError.of(error)

    def _error(self) -> ServingError | None:
        return next((choice.ticket.error for choice in self._choices if choice.ticket.error), None)

    def _reason(self, ticket: AsyncTicket) -> FinishReason | None:
        """Return why an answer has ended; None while it goes on."""
        if ticket.completion is not None:
            return ticket.completion.finish_reason
        return "length" if self._expired else None

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))

    async def _send_whole(self, send: Send) -> None:
        while not all(choice.ticket.is_finished for choice in self._choices):
            await self._news()
            self._check()
        self._check()
        answers = []
        for choice in self._choices:
            pieces, reason = choice.ticket.take_pieces(), self._reason(choice.ticket)
            assert reason is not None
            choice.tokens = sum(len(piece.token_ids) for piece in pieces)
            answers.append(Answered(pieces, reason, choice.ticket.completion))
        body = await self._service.read(lambda: self._written(answers))
        length = str(len(body)).encode()
        await self._start(send, [(b"content-type", b"application/json"), (b"content-length", length)])
        await send({"type": "http.response.body", "body": body})

    def _written(self, answers: Sequence[Answered]) -> bytes:
        """Return the body of the whole; on a thread, for logprobs of many tokens take seconds."""
        content = self._shape.whole(answers, self._usage())
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()

    async def _send_stream(self, send: Send) -> None:
        await self._start(send, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")])
        while True:
            body = b"".join(self._events())
            if all(choice.is_closed for choice in self._choices):
                body += self._shape.close(self._usage()) + DONE
                break
            if self._expired is None and (error := self._error()):
                body += b"data: " + ApiError.of(error).body + b"\n\n" + DONE
                break
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await self._news()
        await send({"type": "http.response.body", "body": body})

    def _events(self) -> Iterator[bytes]:
        """Yield what came of each answer since the last time."""
        for index, choice in enumerate(self._choices):
            pieces, reason = choice.ticket.take_pieces(), self._reason(choice.ticket)
            if choice.is_closed or not (pieces or reason):
                continue
            if not choice.has_begun:
                choice.has_begun = True
                yield self._shape.begin(index, self._usage())
            choice.tokens += sum(len(piece.token_ids) for piece in pieces)
            yield self._shape.grow(index, pieces, self._usage())
            if reason is not None:
                choice.is_closed = True
                yield self._shape.end(index, reason, self._usage())

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers + self._added})


class _ClientGone(Exception):
    """Nobody is left to answer."""
