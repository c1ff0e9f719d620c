"""Texts that run together: who is next, what company changes (nothing), and what happens when things end early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import load
from runtime.encoder import TextEncoder
from runtime.encoder_batcher import AsyncEncoder, Waiting
from runtime.errors import PromptError, ServingError, SessionError
from runtime.reranking import TextReranker
from runtime.tokenizer import Encoded

WORDS = "the quick brown fox jumps over a lazy dog while it rains in the north"
TEXTS = [" ".join(WORDS.split()[start : start + size]) for size in (1, 2, 3, 5, 9) for start in range(8)] + ["", "日本"]


def drained(waiting: Waiting) -> list[list[tuple[int, int]]]:
    batches = []
    while batch := waiting.take():
        batches.append(batch)
    return batches


def test_texts_of_one_length_run_together_whoever_asked() -> None:
    waiting = Waiting(tokens=100)
    waiting.add(0, [5, 7])
    waiting.add(1, [7, 5, 5])
    assert len(waiting) == 5
    assert drained(waiting) == [[(0, 0), (1, 1), (1, 2)], [(0, 1), (1, 0)]]
    assert len(waiting) == 0 and waiting.take() == []


def test_a_batch_has_no_more_tokens_than_allowed_or_a_single_text() -> None:
    waiting = Waiting(tokens=10)
    waiting.add(0, [5, 5, 5, 30])
    assert drained(waiting) == [[(0, 0), (0, 1)], [(0, 2)], [(0, 3)]]


def test_by_turns_the_oldest_job_is_next_and_the_one_with_the_fewest_tokens_left() -> None:
    waiting = Waiting(tokens=10)
    waiting.add(0, [10] * 4)
    waiting.add(1, [10] * 3)
    waiting.add(2, [9])
    assert drained(waiting) == [[(0, 0)], [(2, 0)], [(0, 1)], [(0, 2)], [(0, 3)], [(1, 0)], [(1, 1)], [(1, 2)]]


def test_a_text_that_is_next_runs_before_older_ones_of_its_length() -> None:
    waiting = Waiting(tokens=10)
    waiting.add(0, [5] * 4)
    waiting.add(1, [5])
    assert drained(waiting) == [[(0, 0), (0, 1)], [(1, 0), (0, 2)], [(0, 3)]]


def test_what_is_left_of_a_dropped_job_does_not_run() -> None:
    waiting = Waiting(tokens=5)
    waiting.add(0, [5, 5, 6])
    waiting.add(1, [6])
    assert waiting.take() == [(0, 0)]
    waiting.drop(0)
    waiting.drop(0)
    assert drained(waiting) == [[(1, 0)]]


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), max_size=6), st.integers(1, 30))
def test_every_text_runs_once_in_a_batch_of_one_length(jobs: list[list[int]], tokens: int) -> None:
    waiting = Waiting(tokens)
    for number, lengths in enumerate(jobs):
        waiting.add(number, lengths)
    batches = drained(waiting)
    places = [place for batch in batches for place in batch]
    assert sorted(places) == [(job, text) for job, lengths in enumerate(jobs) for text in range(len(lengths))]
    for batch in batches:
        (length,) = {jobs[job][text] for job, text in batch}
        assert len(batch) == 1 or len(batch) * length <= tokens


@pytest.fixture(scope="module", params=["classifier_folder", "embedder_folder", "reranker_folder"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    made = load(request.getfixturevalue(request.param), threads=1)
    assert isinstance(made, TextEncoder)
    return made


def encoded(encoder: TextEncoder, texts: list[str]) -> list[Encoded]:
    if isinstance(encoder, TextReranker):
        return encoder.tokenizer.encode_pairs([("the fox", text) for text in texts])
    return encoder.tokenizer.encode_batch(texts)


def serve(encoder: TextEncoder, work: Callable[[AsyncEncoder], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncEncoder(encoder) as served:
            await asyncio.wait_for(work(served), 60)

    asyncio.run(main())


class Gate:
    """Holds the thread in a run until it is opened, and keeps how many texts each run had."""

    def __init__(self, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        inner = encoder.session.run

        def run(batch: Any, types: Any = None) -> Any:
            self.sizes.append(len(batch))
            self.entered.set()
            assert self.opened.wait(10)
            return inner(batch, types)

        monkeypatch.setattr(encoder.session, "run", run)

    async def is_reached(self) -> None:
        await asyncio.to_thread(self.entered.wait, 10)


def test_an_answer_is_the_same_to_the_last_bit_alone_and_in_company(encoder: TextEncoder) -> None:
    texts = encoded(encoder, TEXTS)

    async def work(served: AsyncEncoder) -> None:
        alone = [await served.run([text]) for text in texts]
        assert served.stats().batches == len(texts)
        whole = await served.run(texts)
        pieces = await asyncio.gather(*(served.run(texts[at : at + 3]) for at in range(0, len(texts), 3)))
        assert np.array_equal(whole, np.concatenate(alone))
        assert np.array_equal(whole, np.concatenate(pieces))
        stats = served.stats()
        assert (stats.waiting, stats.texts) == (0, 3 * len(texts))
        assert stats.tokens == 3 * sum(len(text.ids) for text in texts)
        assert stats.batches < 3 * len(texts) and stats.busy_s > 0
        assert served.is_exact

    serve(encoder, work)


def test_a_text_that_rounds_differently_alone_runs_beside_a_copy(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = encoder.session.run

    def run(batch: Any, types: Any = None) -> Any:
        rows = inner(batch, types)
        return np.nextafter(rows, np.float32(np.inf)) if len(batch) == 1 else rows

    monkeypatch.setattr(encoder.session, "run", run)
    (text,) = encoded(encoder, ["a lazy fox"])

    async def work(served: AsyncEncoder) -> None:
        assert served.is_exact
        assert np.array_equal((await served.run([text]))[0], (await served.run([text] * 2))[0])
        assert (served.stats().texts, served.stats().batches) == (3, 2)

    serve(encoder, work)


def test_a_graph_that_rounds_by_the_number_of_texts_promises_nothing(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = encoder.session.run
    monkeypatch.setattr(encoder.session, "run", lambda batch, types=None: inner(batch, types) + len(batch))

    async def work(served: AsyncEncoder) -> None:
        assert not served.is_exact

    serve(encoder, work)


def test_what_comes_while_a_batch_runs_is_the_next_one(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    text = encoded(encoder, ["fox"])

    async def work(served: AsyncEncoder) -> None:
        gate = Gate(encoder, monkeypatch)
        first = asyncio.create_task(served.run(text))
        await gate.is_reached()  # it did not wait for company
        rest = [asyncio.create_task(served.run(text)) for _ in range(5)]
        await asyncio.sleep(0)
        gate.opened.set()
        rows = await asyncio.gather(first, *rest)
        assert all(np.array_equal(row, rows[0]) for row in rows)
        assert gate.sizes[0] <= 2 and gate.sizes[1:] == [5]  # the first beside a copy, where the graph needs it

    serve(encoder, work)


def test_who_stops_waiting_takes_what_did_not_run_along(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = encoded(encoder, ["fox"]), encoded(encoder, ["the fox is lazy"])

    async def work(served: AsyncEncoder) -> None:
        gate = Gate(encoder, monkeypatch)
        first = asyncio.create_task(served.run(short))
        await gate.is_reached()
        given_up = asyncio.create_task(served.run(long * 3))
        after = asyncio.create_task(served.run(short))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(first, after)
        assert given_up.cancelled() and len(gate.sizes) == 2 and max(gate.sizes) <= 2

    serve(encoder, work)


def test_nothing_to_do_is_refused(encoder: TextEncoder) -> None:
    async def work(served: AsyncEncoder) -> None:
        with pytest.raises(PromptError, match="texts: got none, expected at least one"):
            await served.run([])

    serve(encoder, work)


def test_a_broken_graph_fails_all_who_wait_and_all_who_come(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(batch: Any, types: Any = None) -> Any:
        raise RuntimeError("out of order")

    texts = encoded(encoder, TEXTS[:3])

    async def work(served: AsyncEncoder) -> None:
        monkeypatch.setattr(encoder.session, "run", fail)
        answers = await asyncio.gather(*(served.run(texts) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(answer, SessionError) for answer in answers)
        assert "encoder: has stopped after RuntimeError: out of order; restart the server" in str(answers[0])
        with pytest.raises(SessionError, match="has stopped"):
            await served.run(texts)
        assert isinstance(served.error, SessionError)

    serve(encoder, work)


def test_the_end_fails_who_still_waits(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncEncoder(encoder) as served:
            gate = Gate(encoder, monkeypatch)
            waiting = [asyncio.create_task(served.run(encoded(encoder, [text]))) for text in ("fox", "the fox jumps")]
            await gate.is_reached()
            threading.Timer(0.05, gate.opened.set).start()
        first, second = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(second, ServingError) and "encoder: is closed" in str(second)
        assert not isinstance(first, BaseException)

    asyncio.run(main())


def test_life_shows_without_work(classifier_folder: Path) -> None:
    async def main() -> None:
        classifier = load(classifier_folder, threads=1)
        assert isinstance(classifier, TextEncoder)
        async with AsyncEncoder(classifier, nap_s=0.01) as served:
            first = served._alive_at
            while served._alive_at == first:
                await asyncio.sleep(0.005)
            assert served.heartbeat_s < 10

    asyncio.run(main())
