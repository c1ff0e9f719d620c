"""Queue, deadline, disconnect, drain and a broken engine: every request that is let in ends validly and leaves nothing.

The engine's steps are let go one by one, so that each moment can be looked at.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.artifact import verify
from runtime.async_engine import AsyncEngine
from runtime.engine import Engine, Ticket
from runtime.server.app import create_app
from runtime.server.errors import ApiError
from runtime.server.service import STUCK_S, Served
from runtime.server.settings import Settings

LONG = {"prompt": "the", "max_tokens": 100, "temperature": 0, "ignore_eos": True}


class Gated(Engine):
    """Takes a step only when it is let."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.permits = threading.Semaphore(0)
        self.fault: Exception | None = None

    def step(self) -> list[Ticket]:
        self.permits.acquire()
        if self.fault is not None:
            raise self.fault
        return super().step()


class Visit:
    """One request to an application, whose client may leave."""

    def __init__(self, app: Any, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        self.sent: list[Any] = []
        self.news = asyncio.Event()
        self._left = asyncio.Event()
        self._body: list[bytes] = [json.dumps(body).encode()]
        named = {"host": "localhost", "content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "method": "GET" if body is None else "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "query_string": b"",
            "root_path": "",
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self.news.set()

    def leave(self) -> None:
        self._left.set()

    async def end(self) -> tuple[int, dict[str, str], str]:
        await asyncio.wait_for(self.task, 30)
        return self.status, self.headers, self.text

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


class Server:
    """An application with a gated engine of two slots."""

    def __init__(self, app: Any, engine: Gated) -> None:
        self.app, self.engine = app, engine
        self.service = app.state.service
        self.admission = self.service.admission

    def ask(self, path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: Any) -> Visit:
        return Visit(self.app, path, {**LONG, **body}, headers)

    async def get(self, path: str) -> tuple[int, str]:
        status, _, text = await Visit(self.app, path, None).end()
        return status, text

    def let(self, steps: int) -> None:
        if steps:
            self.engine.permits.release(steps)

    async def begin(self, requests: int) -> None:
        """Let so many have their first token."""
        await self.until(lambda: self.admission.running == requests)
        while self.admission.waiting:
            self.let(1)
            await asyncio.sleep(0.001)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(folder: Path, settings: Settings) -> AsyncIterator[Server]:
    engine = Gated.load(folder, threads=1, slots=2)
    served = Served(verify(folder), engine.tokenizer, AsyncEngine(engine, nap_s=0.01))
    app = create_app({"m": served}, settings)
    async with app.router.lifespan_context(app):
        server = Server(app, engine)
        try:
            yield server
            assert (server.admission.running, server.admission.waiting, server.admission.waiting_tokens) == (0, 0, 0)
        finally:
            server.let(100_000)
    assert not engine.has_work or engine.fault


Scene = Callable[[Server], Awaitable[None]]


@pytest.fixture
def play(decoder_folder: Path) -> Callable[..., None]:
    def run(scene: Scene, **settings: Any) -> None:
        async def main() -> None:
            async with serving(decoder_folder, Settings(**settings)) as server:
                await scene(server)

        asyncio.run(main())

    return run


def error(text: str) -> dict[str, Any]:
    return dict(json.loads(text)["error"])


def events(text: str) -> list[Any]:
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_full_queue_sends_away_with_a_time_to_come_again(play: Any) -> None:
    async def scene(server: Server) -> None:
        first = server.ask()
        server.let(5)
        await server.until(lambda: server.admission.running == 1 and server.admission.waiting == 0)
        waiting = [server.ask() for _ in range(2)]
        await server.until(lambda: server.admission.waiting == 2)
        status, headers, text = await server.ask().end()
        assert status == 429 and error(text)["code"] == "queue_full" and int(headers["retry-after"]) >= 1
        server.let(1000)
        assert [(await visit.end())[0] for visit in (first, *waiting)] == [200, 200, 200]

    play(scene, queue=2)


def test_long_prompts_fill_the_queue_sooner_but_one_alone_may_always_wait(play: Any) -> None:
    async def scene(server: Server) -> None:
        long = server.ask(prompt=[5] * 60, max_tokens=2)
        await server.until(lambda: server.admission.waiting_tokens == 60)
        status, _, text = await server.ask(prompt=[5] * 2).end()
        assert status == 429 and "prompts of 60 tokens wait, expected at most 50" in error(text)["message"]
        server.let(1000)
        assert (await long.end())[0] == 200

    play(scene, queue_tokens=50)


def test_answers_of_one_request_count_each(play: Any) -> None:
    async def scene(server: Server) -> None:
        visit = server.ask(prompt=["a", "b"], n=2, max_tokens=2)
        await server.until(lambda: server.admission.waiting == 4)
        assert (await server.ask().end())[0] == 429
        server.let(1000)
        assert (await visit.end())[0] == 200

    play(scene, queue=3)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_client_that_leaves_frees_its_place(play: Any, is_stream: bool, steps: int) -> None:
    async def scene(server: Server) -> None:
        visit = server.ask(stream=is_stream)
        server.let(steps)
        await server.until(lambda: server.admission.running == 1 and server.engine.has_work)
        visit.leave()
        await visit.task
        assert server.admission.running == 0
        assert not (visit.sent and visit.sent[-1].get("more_body") is False)
        server.let(1)
        await server.until(lambda: not server.engine.has_work)
        other = server.ask(max_tokens=2)
        server.let(1000)
        assert (await other.end())[0] == 200

    play(scene)


def test_a_deadline_before_the_first_token_is_an_error_and_later_ends_the_answer(play: Any) -> None:
    async def scene(server: Server) -> None:
        for is_stream in (True, False):
            status, _, text = await server.ask(stream=is_stream, headers={"x-timeout-s": "0.05"}).end()
            assert status == 504 and error(text)["type"] == "timeout"
        whole, stream = server.ask(), server.ask(stream=True)
        await server.begin(2)
        for job in server.service._jobs:
            job.expire(ApiError(504, "late"))
        status, _, text = await whole.end()
        choice = json.loads(text)["choices"][0]
        assert status == 200 and choice["finish_reason"] == "length" and choice["text"]
        found = events((await stream.end())[2])
        assert found[-1]["choices"][0]["finish_reason"] == "length" and found[0]["choices"][0]["text"]

    play(scene)


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf"])
def test_a_deadline_must_be_seconds(play: Any, given: str) -> None:
    async def scene(server: Server) -> None:
        status, _, text = await server.ask(headers={"x-timeout-s": given}).end()
        assert status == 400 and error(text)["param"] == "x-timeout-s"

    play(scene)


def test_a_server_that_drains_lets_nobody_in_and_ends_what_runs(play: Any) -> None:
    async def scene(server: Server) -> None:
        visits = [server.ask(stream=True), server.ask()]
        await server.begin(2)
        visits.append(server.ask(stream=True))  # finds no slot
        await server.until(lambda: server.admission.waiting == 1)
        server.admission.is_draining = True
        status, text = await server.get("/readyz")
        assert status == 503 and "shutting down" in error(text)["message"]
        assert (await server.get("/livez"))[0] == 200
        status, headers, text = await server.ask().end()
        assert status == 503 and "retry-after" in headers
        server.service.expire_all()
        assert events((await visits[0].end())[2])[-1]["choices"][0]["finish_reason"] == "length"
        assert json.loads((await visits[1].end())[2])["choices"][0]["finish_reason"] == "length"
        status, _, text = await visits[2].end()
        assert status == 503 and "shutting down" in error(text)["message"]
        assert server.admission.running == 0

    play(scene)


def test_an_engine_that_breaks_ends_all_answers_and_turns_the_server_red(play: Any) -> None:
    async def scene(server: Server) -> None:
        assert (await server.get("/readyz"))[0] == (await server.get("/livez"))[0] == 200
        assert (await server.get("/health"))[0] == 200  # what vLLM's clients ask before they begin
        stream, whole = server.ask(stream=True), server.ask()
        await server.begin(2)
        server.engine.fault = RuntimeError("the kernel is gone")
        server.let(1)
        *_, last = events((await stream.end())[2])
        assert "has stopped after RuntimeError" in last["error"]["message"]
        assert (await whole.end())[0] == 500
        status, _, text = await server.ask().end()
        assert status == 503 and "restart the server" in error(text)["message"]
        assert (await server.get("/livez"))[0] == (await server.get("/readyz"))[0] == 503

    play(scene)


def test_a_worker_without_a_sign_of_life_needs_a_restart(play: Any) -> None:
    async def scene(server: Server) -> None:
        worker = server.service.models["m"].worker
        visit = server.ask(max_tokens=2)
        await server.until(lambda: server.engine.has_work)
        worker._alive_at -= STUCK_S + 1
        status, text = await server.get("/readyz")
        assert status == 503 and "has shown no life for 12" in error(text)["message"]
        assert (await server.get("/livez"))[0] == 503
        server.let(100)
        await visit.end()
        assert (await server.get("/livez"))[0] == 200

    play(scene)


def test_a_step_is_one_write_for_all_answers_of_a_stream(play: Any) -> None:
    async def scene(server: Server) -> None:
        visit = server.ask(stream=True, n=2, max_tokens=20)
        for _ in range(13):
            server.let(1)
            await asyncio.sleep(0.01)
        assert 2 < len(visit.sent) <= 1 + 13  # the status, and a write for each step at most
        server.let(100)
        await visit.end()

    play(scene)


def test_what_can_never_be_admitted_is_refused_before_a_stream_begins(play: Any) -> None:
    async def scene(server: Server) -> None:
        visit = server.ask(stream=True, prompt=[5] * 128)
        assert (await visit.end())[0] == 400

    play(scene)
