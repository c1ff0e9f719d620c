"""An engine on a thread of its own, for everybody else to call from asyncio.

    async with AsyncEngine(Engine.load("artifacts/stdlib-llama-int4")) as served:
        ticket = served.add(served.engine.read("def main():", max_tokens=64))
        async for pieces in ticket:         # all that came since the last look
            print("".join(piece.text for piece in pieces), end="")

Requests and cancellations reach the engine between two steps, and each step wakes the event loop once, for all answers
together (`worker`). A reader that is slow finds its pieces in a list, which `max_tokens` bounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from runtime.engine import Engine, Ticket
from runtime.errors import ServingError
from runtime.request import Completion, Piece, Request
from runtime.worker import NAP_S, Worker


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


class AsyncEngine(Worker):
    """Runs an engine on its own thread, between `async with` and its end.

    Attributes:
        engine: for what any thread may do: `read`, and what never changes.
    """

    def __init__(self, engine: Engine, *, nap_s: float = NAP_S) -> None:
        """Take an engine, which is its alone from then on; `nap_s` is how often its thread shows life without work."""
        super().__init__("engine", nap_s)
        self.engine = engine
        self._served: dict[int, AsyncTicket] = {}  # by the number of the engine's ticket; the thread's alone
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._busy_s = 0.0
        self._stats = self._measured()

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

    @property
    def _has_work(self) -> bool:
        return self.engine.has_work

    def _turn(self) -> None:
        news = self._step() if self.engine.has_work else []
        self._stats = self._measured()
        self._report(news)

    def _fail(self, error: ServingError) -> None:
        self._report([_News(ticket, [], error=error) for ticket in self._served.values()])

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
            self._report([_News(ticket, [], error=error) for ticket in tickets])
            return
        for ticket, inner in zip(tickets, added, strict=True):
            ticket.inner = inner
            self._served[inner.number] = ticket

    def _cancel(self, ticket: AsyncTicket) -> None:
        if ticket.inner is not None and self.error is None:
            self._served.pop(ticket.inner.number, None)
            ticket.inner.cancel()

    def _close(self) -> None:
        super()._close()
        for ticket in self._served.values():
            assert ticket.inner is not None
            ticket.inner.cancel()

    def _report(self, news: list[_News]) -> None:
        if news:
            self._tell(_hand_out, news)

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
