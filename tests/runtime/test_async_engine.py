"""The engine on its own thread: answers reach asyncio, cancels reach the engine, and a broken one fails everybody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.async_engine import AsyncEngine, AsyncTicket
from runtime.engine import Engine, Ticket
from runtime.errors import PromptError, ServingError, SessionError
from runtime.generation import TextGenerator

PROMPTS = ["def main():", "日本", "x", "the quick brown fox"]
LONG: Any = {"max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def engine(decoder_folder: Path) -> Engine:
    return Engine.load(decoder_folder, threads=1, slots=4)


def serve(engine: Engine, work: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as served:
            await asyncio.wait_for(work(served), 60)

    asyncio.run(main())


def ask(served: AsyncEngine, prompt: str, **options: Any) -> AsyncTicket:
    return served.add(served.engine.read(prompt, **options))


async def text_of(ticket: AsyncTicket) -> str:
    return "".join([piece.text async for pieces in ticket for piece in pieces])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_answers_are_those_of_one_request_at_a_time(engine: Engine, generator: TextGenerator) -> None:
    async def work(served: AsyncEngine) -> None:
        tickets = [ask(served, prompt, max_tokens=20, ignore_eos=True) for prompt in PROMPTS * 2]
        texts = await asyncio.gather(*map(text_of, tickets))
        for ticket, text, prompt in zip(tickets, texts, PROMPTS * 2, strict=True):
            want = generator.generate(prompt, max_tokens=20, ignore_eos=True)
            assert text == want.text == (await ticket.finished()).text
            assert ticket.completion is not None and ticket.completion.token_ids == want.token_ids
        stats = served.stats()
        assert (stats.generated_tokens, stats.waiting, stats.running, stats.slots) == (160, 0, 0, 4)
        assert stats.prompt_tokens == sum(len(ticket.request.ids) for ticket in tickets)
        assert stats.steps >= 20 and stats.busy_s > 0 and stats.reserved_tokens == 0

    serve(engine, work)
    assert not engine.has_work


def test_each_step_wakes_the_loop_once_for_all_answers(engine: Engine) -> None:
    calls = []

    async def work(served: AsyncEngine) -> None:
        loop = asyncio.get_running_loop()
        inner = loop.call_soon_threadsafe

        def counted(*args: Any, **options: Any) -> Any:
            if threading.current_thread().name == "engine":
                calls.append(args)
            return inner(*args, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        await asyncio.gather(*(ask(served, prompt, max_tokens=20, ignore_eos=True).finished() for prompt in PROMPTS))
        assert len(calls) <= served.stats().steps

    serve(engine, work)


def test_a_shared_bell_tells_of_several_answers_and_only_of_beginning_and_end_if_asked(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        bell, rings = asyncio.Event(), 0
        request = served.engine.read("x", max_tokens=30, ignore_eos=True)
        tickets = [served.add(request, bell, is_quiet=True) for _ in range(2)]
        while not all(ticket.is_finished for ticket in tickets):
            await bell.wait()
            bell.clear()
            rings += 1
        assert rings <= 4
        assert all(len(ticket.take_pieces()) == 30 for ticket in tickets)

    serve(engine, work)


def test_a_slow_reader_finds_everything_in_a_list(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        ticket = ask(served, "the", max_tokens=30, ignore_eos=True)
        await ticket.finished()
        batches = [pieces async for pieces in ticket]
        assert [len(pieces) for pieces in batches] == [30]

    serve(engine, work)


def test_a_cancel_reaches_requests_that_run_and_that_wait(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        tickets = [ask(served, "the", **LONG) for _ in range(6)]
        await until(lambda: served.stats().running == 4 and served.stats().waiting == 2)
        tickets[5].cancel()
        tickets[0].cancel()
        for cancelled in (tickets[0], tickets[5]):
            with pytest.raises(ServingError, match="was cancelled"):
                await cancelled.finished()
        tickets[0].cancel()  # once more does nothing
        for ticket in tickets[1:5]:
            assert len((await ticket.finished()).token_ids) == 100
        await until(lambda: served.stats().running == 0)
        assert served.stats().reserved_tokens == 0

    serve(engine, work)
    assert not engine.has_work


def test_what_can_never_run_fails_its_ticket_alone(decoder_folder: Path) -> None:
    async def work(served: AsyncEngine) -> None:
        ticket = ask(served, "x", **LONG)
        with pytest.raises(PromptError, match="expected at most 64"):
            await text_of(ticket)
        assert (await ask(served, "x", max_tokens=2).finished()).finish_reason is not None

    engine = Engine.load(decoder_folder, threads=1, slots=2, kv_memory=64 * 256 * 2)
    assert engine.occupancy.budget_tokens == 64
    serve(engine, work)


def test_the_end_fails_what_is_left(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as served:
            tickets = [ask(served, "the", **LONG) for _ in range(6)]
            await anext(tickets[0])
        late = ask(served, "the")
        for ticket in (*tickets, late):
            with pytest.raises(ServingError, match="is closed"):
                await text_of(ticket)

    asyncio.run(main())
    assert not engine.has_work


def test_it_shows_life_without_work(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine, nap_s=0.01) as served:
            for _ in range(3):
                await until(lambda: served.heartbeat_s > 0.005)
                await until(lambda: served.heartbeat_s < 0.005)

    asyncio.run(asyncio.wait_for(main(), 60))


class Breaking(Engine):
    def step(self) -> list[Ticket]:
        tickets = super().step()
        if any(len(ticket.answer.ids) == 3 for ticket in tickets):
            raise RuntimeError("the kernel is gone")
        return tickets


def test_an_engine_that_breaks_fails_everybody_and_says_so(decoder_folder: Path) -> None:
    async def work(served: AsyncEngine) -> None:
        tickets = [ask(served, "x", **LONG) for _ in range(3)]
        for ticket in tickets:
            with pytest.raises(SessionError, match="stopped after RuntimeError: the kernel is gone; restart"):
                await ticket.finished()
        assert served.error is not None
        with pytest.raises(SessionError, match="restart"):
            await ask(served, "x").finished()

    serve(Breaking.load(decoder_folder, threads=1, slots=2), work)
