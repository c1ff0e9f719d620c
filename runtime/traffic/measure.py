"""Ask, by a closed or an open loop, and keep when what came.

Closed: so many clients, each asks again when its answer is complete; what waits is never more than they are. Open:
requests come when they come, whatever the others wait for, and an answer's time counts from the planned arrival: a
stall shows in all that should have begun meanwhile (else "coordinated omission": Tene 2013, "How not to measure
latency").
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import count, islice, takewhile
from typing import Final, Protocol

from runtime.errors import LoadError, ServingError
from runtime.traffic.workload import Question, Workload, arrivals

Clock = Callable[[], float]
GIVE_UP_S: Final = 600.0
"""A request that has no complete answer after so long has failed."""


@dataclass(frozen=True)
class Load:
    """How questions are asked; one of `concurrency` and `rate`, one of `requests` and `seconds`.

    Attributes:
        concurrency: clients of a closed loop.
        rate: arrivals per second of an open loop.
        requests: how many are asked.
        seconds: for how long new ones are asked; those under way are waited for.
        warm_up: how many are asked before, by a closed loop, and not counted.
    """

    concurrency: int | None = None
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    warm_up: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise LoadError("load: expected one of --concurrency (closed loop) and --rate (open loop)")
        if (self.requests is None) == (self.seconds is None):
            raise LoadError("load: expected one of --requests and --seconds")


@dataclass(frozen=True)
class Heard:
    """An answer as it came in.

    Attributes:
        arrivals_s: by the clock, when each piece of it came; a token each, if the target sends one at a time.
        output_tokens: in all of them.
        input_tokens: of the prompt; None where the target does not say.
        is_counted: whether the target said how many tokens it sent; if not, each piece counts as one.
    """

    arrivals_s: tuple[float, ...]
    output_tokens: int
    input_tokens: int | None
    is_counted: bool = True


@dataclass(frozen=True)
class Work:
    """What a target did, as far as it tells; None for what it does not.

    Attributes:
        busy_s: seconds in which it computed.
        prefill_s: of these, for prompts.
        decode_s: of these, for tokens after the first.
        decode_bytes: weights and cache that decode steps read.
    """

    busy_s: float
    prefill_s: float | None = None
    decode_s: float | None = None
    decode_bytes: int | None = None

    def since(self, before: Work) -> Work:
        """Return what was done after `before`."""
        return Work(
            self.busy_s - before.busy_s,
            _difference(self.prefill_s, before.prefill_s),
            _difference(self.decode_s, before.decode_s),
            None if self.decode_bytes is None else self.decode_bytes - (before.decode_bytes or 0),
        )


class Target(Protocol):
    """What questions are put to."""

    def opened(self) -> AbstractAsyncContextManager[None]:
        """Make it ready for questions while the context lasts."""

    async def ask(self, question: Question) -> Heard:
        """Return the answer to one of several questions at a time.

        Raises:
            ServingError: one line that says why there is none.
        """

    async def work(self) -> Work | None:
        """Return what it did so far; None if it does not tell."""


@dataclass(frozen=True)
class Record:
    """One request; times in seconds since the load began.

    Attributes:
        number: of the question.
        planned_s: when it was to be sent: the arrival of an open loop, the moment a client of a closed loop was free.
        sent_s: when it was.
        ended_s: when its end was known.
        arrivals_s: of its pieces; empty where it failed.
        input_tokens: of the prompt; None where the target does not say.
        output_tokens: of the answer.
        asked_tokens: how many the answer was to have.
        error: why there is none; None where there is one.
    """

    number: int
    planned_s: float
    sent_s: float
    ended_s: float
    arrivals_s: tuple[float, ...]
    input_tokens: int | None
    output_tokens: int
    asked_tokens: int
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From the plan to the first piece; there must be one."""
        return self.arrivals_s[0] - self.planned_s

    @property
    def e2e_s(self) -> float:
        """From the plan to the last piece."""
        return self.arrivals_s[-1] - self.planned_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of the tokens after the first: (E2E - TTFT) / (n - 1); None without any."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Seconds between each piece and the next."""
        return tuple(b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))


@dataclass
class Measured:
    """What came of a load; it grows while the load lasts, and stays usable when that is interrupted.

    Attributes:
        records: of all requests that ended.
        work: what the target did meanwhile; None where it does not tell.
        is_complete: whether all that was to be asked was.
        is_counted: whether the target counted all output tokens.
    """

    records: list[Record] = field(default_factory=list)
    work: Work | None = None
    is_complete: bool = False
    is_counted: bool = True

    @property
    def duration_s(self) -> float:
        """Seconds from the beginning of the load to the end of its last request."""
        return max((record.ended_s for record in self.records), default=0.0)


class Measurement:
    """Asks the questions of a workload as a load says."""

    def __init__(
        self,
        target: Target,
        workload: Workload,
        load: Load,
        *,
        clock: Clock = time.perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._target, self._workload, self._load = target, workload, load
        self._clock, self._sleep = clock, sleep
        self._started = 0.0
        self.measured = Measured()

    async def run(self) -> Measured:
        """Warm up, ask all, wait for what is under way.

        Raises:
            ServingError: the target cannot be used, or no request of the warm-up got an answer.
        """
        async with self._target.opened():
            await self._warm_up()
            before = await self._target.work()
            self._started = self._clock()
            await (self._closed(self._numbers()) if self._load.concurrency else self._open())
            after = await self._target.work()
        self.measured.work = after.since(before) if after and before else None
        self.measured.is_complete = True
        return self.measured

    async def _warm_up(self) -> None:
        counted, self.measured = self.measured, Measured()
        try:
            await self._closed(iter(range(-1, -1 - self._load.warm_up, -1)), self._load.concurrency or 8)
            errors = [record.error for record in self.measured.records if record.error]
        finally:
            self.measured = counted
        if errors and len(errors) == self._load.warm_up:
            raise ServingError(errors[0])

    def _numbers(self) -> Iterator[int]:
        if self._load.requests is not None:
            return iter(range(self._load.requests))
        return takewhile(lambda _: self._clock() - self._started < (self._load.seconds or 0), count())

    async def _closed(self, numbers: Iterator[int], concurrency: int | None = None) -> None:
        async def client() -> None:
            for number in numbers:
                await self._ask(number, self._clock())

        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency or self._load.concurrency or 1):
                clients.create_task(client())

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as under_way:
            async for number, planned in self._arrivals():
                under_way.create_task(self._ask(number, planned))

    async def _arrivals(self) -> AsyncIterator[tuple[int, float]]:
        assert self._load.rate is not None
        times = arrivals(self._load.rate, self._workload.seed)
        limited = islice(times, self._load.requests) if self._load.requests is not None else times
        for number, at in enumerate(limited):
            if self._load.seconds is not None and at >= self._load.seconds:
                return
            await self._sleep(max(0.0, self._started + at - self._clock()))
            yield number, self._started + at

    async def _ask(self, number: int, planned: float) -> None:
        question = self._workload.question(number)
        sent, error = self._clock(), None
        heard = Heard((), 0, None)
        try:
            async with asyncio.timeout(GIVE_UP_S):
                heard = await self._target.ask(question)
        except TimeoutError:
            error = f"no complete answer within {GIVE_UP_S:.0f} s"
        except ServingError as refusal:
            error = str(refusal)
        self.measured.is_counted &= heard.is_counted
        self.measured.records.append(
            Record(
                number,
                planned - self._started,
                sent - self._started,
                self._clock() - self._started,
                tuple(at - self._started for at in heard.arrivals_s),
                heard.input_tokens,
                heard.output_tokens,
                question.max_tokens,
                error,
            )
        )


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
