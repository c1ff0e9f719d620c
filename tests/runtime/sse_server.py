"""A server of scripted answers, whose delays move a clock instead of taking time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Event = tuple[float, object]
"""Seconds since the last one, and a document, or a text to be sent as it is."""


class StepClock:
    """Tells a time that moves only by `pass_by`; counts how often it was asked."""

    def __init__(self) -> None:
        self.now, self.reads = 50.0, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class Script:
    """What the server answers, and what it was asked.

    Attributes:
        events: of every stream.
        models: of /v1/models.
        status, error: an answer instead of a stream.
        metrics: of /metrics; None has no such page.
        key: asked for.
        is_framed: False ends a body by closing the connection.
        cut_after: events after which the connection breaks.
        closes: whether each connection serves one request, without a word of it beforehand.
    """

    def __init__(self, events: Sequence[Event] = (), **about: Any) -> None:
        self.events = list(events)
        self.models: object = {"object": "list", "data": [{"id": "m"}, {"id": "n", "meta": {"n_vocab": 77}}]}
        self.status, self.error = 200, {}
        self.metrics: str | None = None
        self.key: str | None = None
        self.is_framed, self.closes = True, False
        self.cut_after: int | None = None
        self.__dict__.update(about)
        self.asked: list[tuple[str, Any]] = []
        self.connections = 0


def token(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


@contextmanager
def served(script: Script, clock: StepClock | None = None) -> Iterator[str]:
    """Run the server in a thread; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            script.connections += 1
            super().setup()

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            if script.key and self.headers["authorization"] != f"Bearer {script.key}":
                self._answer(401, json.dumps({"error": {"message": "wrong\nAPI key"}}))
            elif self.path == "/v1/models":
                self._answer(200, script.models if isinstance(script.models, str) else json.dumps(script.models))
            elif self.path == "/metrics" and script.metrics is not None:
                self._answer(200, script.metrics)
            else:
                self._answer(404, "")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            script.asked.append((self.path, body))
            if script.status != 200:
                self._answer(script.status, json.dumps(script.error))
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            if script.is_framed:
                self.send_header("transfer-encoding", "chunked")
            before = clock.reads if clock else 0
            self.end_headers()
            self._wait(before)
            for number, (seconds, event) in enumerate(script.events):
                if number == script.cut_after:
                    self.close_connection = True
                    return
                self._send(seconds, event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n")
            if script.is_framed:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = not script.is_framed or script.closes

        def _send(self, seconds: float, text: str) -> None:
            data = text.encode()
            before = clock.reads if clock else 0
            if clock:
                clock.pass_by(seconds)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if script.is_framed else data)
            self._wait(before)

        def _wait(self, before: int) -> None:
            """Return when the client has looked at the clock for what was sent."""
            deadline = time.monotonic() + 10
            while clock and clock.reads == before and time.monotonic() < deadline:
                time.sleep(1e-4)

        def _answer(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
