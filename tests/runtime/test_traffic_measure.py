"""Closed and open loops, by a clock that only moves when told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

import pytest

from runtime.errors import LoadError, ServingError
from runtime.traffic.measure import Heard, Load, Measured, Measurement, Work
from runtime.traffic.workload import Question, Range, Workload, arrivals

WORKLOAD = Workload(Range(4, 4), Range(3, 3))


class Time:
    """Sleepers wake in order, each at its moment exactly; nothing else takes time."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int]] = []
        self._changes = 0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self._changes += 1
        mine = (self.now + seconds, self._changes)
        self._sleepers.append(mine)
        seen = -1
        while seen != self._changes or mine != min(self._sleepers):
            seen = self._changes
            for _ in range(10):  # whoever else has something to do now does it first
                await asyncio.sleep(0)
        self._sleepers.remove(mine)
        self.now = mine[0]
        self._changes += 1


class Answers:
    """Answers each question after so many seconds, at most `at_once` together; some fail."""

    def __init__(self, time: Time, seconds: float, at_once: int = 1000, failing: Any = ()) -> None:
        self.asked: list[int] = []
        self.most = self._under_way = 0
        self._time, self._seconds, self._failing = time, seconds, failing
        self._free = asyncio.Semaphore(at_once)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        yield

    async def ask(self, question: Question) -> Heard:
        self.asked.append(question.number)
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        try:
            async with self._free:
                await self._time.sleep(self._seconds)
        finally:
            self._under_way -= 1
        if question.number in self._failing:
            raise ServingError(f"question {question.number} failed")
        return Heard((self._time.now,), question.max_tokens, 4)

    async def work(self) -> Work | None:
        return Work(self._time.now)


def measured(load: Load, seconds: float, **about: Any) -> tuple[Measured, Answers]:
    time = Time()
    target = Answers(time, seconds, **about)
    return asyncio.run(Measurement(target, WORKLOAD, load, clock=time, sleep=time.sleep).run()), target


def test_a_closed_loop_keeps_as_many_under_way_as_there_are_clients() -> None:
    found, target = measured(Load(concurrency=3, requests=9), seconds=2.0)
    assert target.most == 3 and target.asked == list(range(9))
    assert [record.planned_s for record in found.records] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert all(record.e2e_s == 2.0 and record.sent_s == record.planned_s for record in found.records)
    assert found.is_complete and found.duration_s == 6.0 and found.work == Work(6.0)


def test_seconds_end_the_asking_and_not_what_is_under_way() -> None:
    found, target = measured(Load(concurrency=2, seconds=5.0), seconds=2.0)
    assert target.asked == list(range(6))  # at 0, 2 and 4 s
    assert found.duration_s == 6.0


def test_an_open_loop_asks_when_planned_whatever_is_under_way() -> None:
    found, target = measured(Load(rate=2.0, requests=20), seconds=50.0)
    want = list(islice(arrivals(2.0, WORKLOAD.seed), 20))
    assert [record.planned_s for record in found.records] == pytest.approx(want)
    assert target.most == 20 and all(record.e2e_s == pytest.approx(50.0) for record in found.records)


def test_an_open_loop_of_seconds_asks_all_that_arrive_in_them() -> None:
    found, _ = measured(Load(rate=4.0, seconds=10.0), seconds=0.1)
    assert len(found.records) == sum(at < 10 for at in islice(arrivals(4.0, WORKLOAD.seed), 200)) > 20


def test_waiting_behind_a_slow_answer_counts_from_the_planned_arrival() -> None:
    found, _ = measured(Load(rate=1.0, requests=10), seconds=3.0, at_once=1)
    ends = [0.0]
    for arrival in islice(arrivals(1.0, WORKLOAD.seed), 10):
        ends.append(max(ends[-1], arrival) + 3.0)  # one server, first come, first served
    assert [record.planned_s + record.e2e_s for record in found.records] == pytest.approx(ends[1:])
    assert found.records[-1].e2e_s > 10  # what a clock started at the sending would call 3


def test_what_warms_up_is_asked_before_and_not_counted() -> None:
    found, target = measured(Load(concurrency=2, requests=3, warm_up=4), seconds=1.0)
    assert target.asked == [-1, -2, -3, -4, 0, 1, 2]
    assert [record.number for record in found.records] == [0, 1, 2]
    assert found.records[0].planned_s == 0.0 and found.work == Work(2.0)


def test_failures_are_kept_with_their_reason_and_the_rest_goes_on() -> None:
    found, _ = measured(Load(concurrency=2, requests=4, warm_up=2), seconds=1.0, failing={1, -1})
    assert {record.number: record.error for record in found.records} == {
        0: None, 1: "question 1 failed", 2: None, 3: None
    }  # fmt: skip


def test_a_warm_up_without_an_answer_ends_the_run() -> None:
    with pytest.raises(ServingError, match="question -1 failed"):
        measured(Load(concurrency=2, requests=4, warm_up=2), seconds=1.0, failing={-1, -2})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"requests": 1}, "one of --concurrency"),
        ({"requests": 1, "concurrency": 1, "rate": 1.0}, "one of --concurrency"),
        ({"rate": 1.0}, "one of --requests"),
        ({"rate": 1.0, "requests": 1, "seconds": 1.0}, "one of --requests"),
    ],
)
def test_a_load_says_how_and_how_long(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        Load(**wrong)
