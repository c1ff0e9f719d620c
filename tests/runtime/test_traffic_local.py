"""Artifacts under load in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.engine import Engine
from runtime.errors import LoadError, SessionError
from runtime.traffic.bandwidth import read_bandwidth
from runtime.traffic.bench import Settings, run
from runtime.traffic.local import LocalEngine
from runtime.traffic.measure import Heard, Load
from runtime.traffic.workload import Question, Range

KV_BYTES = 2 * 2 * 2 * 16 * 4  # of a token: layers, sides, heads, width, bytes of a number


def settings(**about: Any) -> Settings:
    about = {"load": Load(concurrency=3, requests=7, warm_up=1), "threads": 1} | about
    return Settings(**{"input_tokens": Range(4, 9), "output_tokens": Range(5, 8)} | about)


@pytest.fixture(scope="module", autouse=True)
def short_reads() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.traffic.bandwidth.BYTES", 1 << 20)
        yield


def test_an_engine_answers_every_question_at_its_length(decoder_folder: Path) -> None:
    done = run(str(decoder_folder), settings(limits={"ttft_ms": 1e6}, dollars_per_hour=1.0))
    assert (done.kind, done.is_complete, done.is_counted) == ("decoder", True, True)
    assert len(done.requests) == 7 and done.summary.errors == done.summary.short == 0
    for record in done.requests:
        assert record.output_tokens == record.asked_tokens == len(record.arrivals_s)
        assert record.input_tokens is not None and 4 <= record.input_tokens <= 9
        assert record.planned_s <= record.arrivals_s[0] <= record.arrivals_s[-1] <= record.ended_s
    assert done.summary.busy_s is not None and 0 < done.summary.busy_s <= done.summary.duration_s
    assert done.summary.goodput_per_s == pytest.approx(done.summary.requests_per_s)
    assert done.memory_bytes_per_s and done.summary.read_bytes_per_s and done.summary.busy
    document = json.loads(done.to_json())
    assert document["format"] == 1 and document["settings"]["prompts"] == 0
    assert [len(each["arrivals_s"]) for each in document["requests"]] == [r.output_tokens for r in done.requests]


class Ticks:
    """A clock that moves by one with each look: a step takes one second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def asked(engine: Engine, *questions: Question) -> tuple[list[Heard | BaseException], LocalEngine]:
    target = LocalEngine(engine, weight_bytes=1000, clock=Ticks())

    async def ask_all() -> list[Heard | BaseException]:
        async with target.opened():
            return await asyncio.gather(*map(target.ask, questions), return_exceptions=True)

    return asyncio.run(ask_all()), target


def test_seconds_and_bytes_of_decodes_are_those_of_its_steps(decoder_folder: Path) -> None:
    engine = Engine.load(decoder_folder, slots=2, threads=1)
    _, target = asked(engine, Question(0, [5, 6, 7], 4), Question(1, [5, 6], 1))
    work = asyncio.run(target.work())
    # Each prompt is one chunk. The first answer has 3 tokens after its first; a decode reads the weights, and the cache
    # up to and with the token that runs: 4, 5 and 6 of them.
    assert (work.prefill_s, work.decode_s, work.busy_s) == (2.0, 3.0, 5.0)
    assert work.decode_bytes == 3 * 1000 + (4 + 5 + 6) * KV_BYTES


def test_a_step_that_fails_is_told_to_those_who_wait(decoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(decoder_folder, slots=2, threads=1)

    def fail() -> Any:
        raise SessionError("the graph is broken")

    monkeypatch.setattr(engine, "step", fail)
    (error,), _ = asked(engine, Question(0, [5], 3))
    assert isinstance(error, SessionError) and not engine.has_work


@pytest.mark.parametrize("form", ["ids", "text"])
@pytest.mark.parametrize("folder", ["classifier_folder", "embedder_folder", "reranker_folder"])
def test_an_encoder_has_one_latency_and_no_output(folder: str, form: Any, request: pytest.FixtureRequest) -> None:
    done = run(str(request.getfixturevalue(folder)), settings(form=form))
    assert done.kind == folder.removesuffix("_folder") and not done.is_generating
    assert (done.summary.requests, done.summary.errors, done.summary.short) == (7, 0, 0)
    assert (done.summary.output_tokens, done.summary.tpot_ms, done.summary.itl_ms) == (0, None, None)
    assert done.summary.e2e_ms is not None and done.summary.e2e_ms.n == 7


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"input_tokens": Range(1, 200)}, "got up to 208 tokens, expected at most the context of 128"),
        ({"model": "m"}, "--model: is for a server"),
    ],
)
def test_what_an_artifact_cannot_do_is_refused(decoder_folder: Path, about: Any, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        run(str(decoder_folder), settings(**about))


def test_a_chat_with_an_encoder_is_refused(classifier_folder: Path) -> None:
    with pytest.raises(LoadError, match=r"--chat: .* expected a decoder"):
        run(str(classifier_folder), settings(form="chat"))


def test_threads_of_a_server_are_refused() -> None:
    pytest.importorskip("httptools", reason="needs the extra serve")
    with pytest.raises(LoadError, match=r"--threads: is for an artifact's folder"):
        run("http://127.0.0.1:9", settings())


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_by_as_many_threads(threads: int) -> None:
    assert read_bandwidth(threads) > 0
