"""An engine on a thread of its own, for everybody else to call from asyncio.

    async with AsyncEngine(Engine.load("artifacts/stdlib-llama-int4")) as served:
        ticket = served.add(served.engine.read("def main():", max_tokens=64))
        async for pieces in ticket:         # all that came since the last look
            print("".join(piece.text for piece in pieces), end="")

Only that thread touches the engine: requests and cancellations reach it through a queue, between two steps, and each
step wakes the event loop once, for all answers together. A reader that is slow finds its pieces in a list, which
`max_tokens` bounds. With nothing to do the thread sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from runtime.engine import Engine, Ticket
from runtime.errors import ServingError, SessionError
from runtime.request import Completion, Piece, Request

NAP_S: Final = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stats:
    """What an engine has done and how full it is, as of its last step.

    Attributes:
        waiting: requests that were not admitted yet.
        running: requests that were.
        slots: most that can run.
        reserved_tokens: of the cache, which the running ones may come to need.
        budget_tokens: which all of them together may reserve.
        prompt_tokens: of the requests that got a first token, or ended without one.
        generated_tokens: of all answers, finished or not.
        steps: taken.
        busy_s: seconds spent in steps.
    """

    waiting: int
    running: int
    slots: int
    reserved_tokens: int
    budget_tokens: int
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class _News:
    """What one step did to one answer; it has ended with one of the last two."""

    ticket: AsyncTicket
    pieces: list[Piece]
    completion: Completion | None = None
    error: ServingError | None = None


class AsyncEngine:
    """Runs an engine on its own thread, between `async with` and its end.

    Attributes:
        engine: for what any thread may do: `read`, and what never changes.
        error: why it stopped; None while it is well. It never starts again.
    """

    def __init__(self, engine: Engine, *, nap_s: float = NAP_S) -> None:
        """Take an engine, which is its alone from then on; `nap_s` is how often its thread shows life without work."""
        self.engine = engine
        self.error: ServingError | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._served: dict[int, AsyncTicket] = {}  # by the number of the engine's ticket; the thread's alone
        self._nap_s = nap_s
        self._is_closing = False
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._busy_s = 0.0
        self._stats = self._measured()
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine")

    async def __aenter__(self) -> AsyncEngine:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._commands.put(self._close)
        await asyncio.to_thread(self._thread.join)

    @property
    def heartbeat_s(self) -> float:
        """Seconds since the thread last showed life; it does after each step and each nap."""
        return time.monotonic() - self._alive_at

    def stats(self) -> Stats:
        """Return what it has done so far."""
        return self._stats

    def add(self, request: Request, bell: asyncio.Event | None = None, *, is_quiet: bool = False) -> AsyncTicket:
        """Queue what `engine.read` returned; a request that can never be admitted fails its ticket.

        Args:
            request: what to answer.
            bell: set whenever there is news of the ticket; several tickets may share one.
            is_quiet: set it at the first token and at the end only, for a reader who wants the whole.
        """
        return self.add_many(request, 1, bell or asyncio.Event(), is_quiet=is_quiet)[0]

    def add_many(self, request: Request, n: int, bell: asyncio.Event, *, is_quiet: bool = False) -> list[AsyncTicket]:
        """Queue n requests of one prompt, as `Engine.add_many` does; they share the bell."""
        tickets = [AsyncTicket(self, request, bell, is_quiet=is_quiet) for _ in range(n)]
        self._commands.put(lambda: self._add(tickets))
        if self.error is not None:  # asked last: the thread sets it first and then empties the queue
            for ticket in tickets:
                ticket.end(self.error)
        return tickets

    def cancel(self, ticket: AsyncTicket) -> None:
        """End a request wherever it is; its slot is free before the next step."""
        if not ticket.is_finished:
            ticket.end(ServingError("request: was cancelled; ask again"))
            self._commands.put(lambda: self._cancel(ticket))

    # ---- on the thread

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._obey()
                news = self._step() if self.engine.has_work else []
                self._stats = self._measured()
                self._alive_at = time.monotonic()
                self._tell(news)
            self.error = ServingError("engine: is closed; ask again later")
        except Exception as error:
            _log.exception("the engine has stopped")
            self.error = SessionError(f"engine: has stopped after {type(error).__name__}: {error}; restart the server")
        self._tell([_News(ticket, [], error=self.error) for ticket in self._served.values()])
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _obey(self) -> None:
        """Carry out what was asked since the last step; wait for something when there is no work."""
        with contextlib.suppress(queue.Empty):
            if not self.engine.has_work:
                self._commands.get(timeout=self._nap_s)()
            while True:
                self._commands.get_nowait()()

    def _step(self) -> list[_News]:
        begin = time.perf_counter()
        tickets = self.engine.step()
        news = [self._news(ticket) for ticket in tickets if ticket.number in self._served]
        self._steps += 1
        self._busy_s += time.perf_counter() - begin
        return news

    def _news(self, ticket: Ticket) -> _News:
        served, pieces = self._served[ticket.number], ticket.take_pieces()
        if not served.is_counted and (pieces or ticket.is_finished):
            served.is_counted = True
            self._prompt_tokens += len(served.request.ids)
        self._generated_tokens += sum(len(piece.token_ids) for piece in pieces)
        if not ticket.is_finished:
            return _News(served, pieces)
        del self._served[ticket.number]
        try:
            return _News(served, pieces, ticket.completion)
        except ServingError as error:
            return _News(served, pieces, error=error)

    def _add(self, tickets: Sequence[AsyncTicket]) -> None:
        try:
            if self.error is not None:
                raise self.error
            added = self.engine.add_many(tickets[0].request, len(tickets))
        except ServingError as error:
            self._tell([_News(ticket, [], error=error) for ticket in tickets])
            return
        for ticket, inner in zip(tickets, added, strict=True):
            ticket.inner = inner
            self._served[inner.number] = ticket

    def _cancel(self, ticket: AsyncTicket) -> None:
        if ticket.inner is not None and self.error is None:
            self._served.pop(ticket.inner.number, None)
            ticket.inner.cancel()

    def _close(self) -> None:
        self._is_closing = True
        for ticket in self._served.values():
            assert ticket.inner is not None
            ticket.inner.cancel()

    def _tell(self, news: list[_News]) -> None:
        if not news:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(_hand_out, news)

    def _measured(self) -> Stats:
        now = self.engine.occupancy
        return Stats(
            waiting=now.waiting,
            running=now.running,
            slots=self.engine.session.slots,
            reserved_tokens=now.reserved_tokens,
            budget_tokens=now.budget_tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            busy_s=self._busy_s,
        )


class AsyncTicket(AsyncIterator[list[Piece]]):
    """An answer in the making, for one reader in the event loop: iterate over its pieces, or ask for `finished`.

    Attributes:
        request: what was asked.
        completion: the whole answer, once it is there.
        error: why there will be none: a `ServingError`.
        has_begun: whether its first token was chosen.
        inner: the engine's own ticket; the engine's thread alone looks at it.
        is_counted: whether its prompt is among those of `Stats`; the thread's as well.
    """

    def __init__(self, engine: AsyncEngine, request: Request, bell: asyncio.Event, *, is_quiet: bool) -> None:
        self.request = request
        self.completion: Completion | None = None
        self.error: ServingError | None = None
        self.has_begun = False
        self.inner: Ticket | None = None
        self.is_counted = False
        self._engine = engine
        self._bell = bell
        self._is_quiet = is_quiet
        self._pieces: list[Piece] = []

    async def __anext__(self) -> list[Piece]:
        while not self._pieces and not self.is_finished:
            await self._news()
        if self._pieces:
            return self.take_pieces()
        if self.error is not None:
            raise self.error
        raise StopAsyncIteration

    @property
    def is_finished(self) -> bool:
        """Whether nothing more is to come."""
        return self.completion is not None or self.error is not None

    def take_pieces(self) -> list[Piece]:
        """Return what came since the last look, without waiting."""
        pieces, self._pieces = self._pieces, []
        return pieces

    async def finished(self) -> Completion:
        """Wait for the end and return the whole answer.

        Raises:
            ServingError: it was cancelled or failed.
        """
        while not self.is_finished:
            await self._news()
        if self.completion is None:
            assert self.error is not None
            raise self.error
        return self.completion

    def cancel(self) -> None:
        """End the request, as `AsyncEngine.cancel` does."""
        self._engine.cancel(self)

    def grow(self, news: _News) -> None:
        """Take what a step brought; nothing once it has ended."""
        if self.is_finished:
            return
        is_first = not self.has_begun
        self.has_begun = self.has_begun or bool(news.pieces) or news.completion is not None
        self._pieces += news.pieces
        self.completion, self.error = news.completion, news.error
        if is_first or self.is_finished or not self._is_quiet:
            self._bell.set()

    def end(self, error: ServingError) -> None:
        """Fail, unless it has ended."""
        self.grow(_News(self, [], error=error))

    async def _news(self) -> None:
        await self._bell.wait()
        self._bell.clear()


def _hand_out(news: list[_News]) -> None:
    for each in news:
        each.ticket.grow(each)
