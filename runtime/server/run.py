"""Run an application until it is told to end, and end it well.

The first SIGTERM or Ctrl-C drains: `/readyz` turns red and new requests get a 503, while the answers under way go on;
those that still run after `drain_s` end where they are, validly. The second ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from runtime.errors import SettingsError
from runtime.server import log
from runtime.server.service import Service
from runtime.server.settings import Settings

HEADERS_TIMEOUT_S: Final = 30.0
MAX_HEAD_BYTES: Final = 1 << 16
KEEP_ALIVE_S: Final = 65  # longer than the minute that proxies keep theirs: who closes first must not be asked
MAX_CONNECTIONS: Final = 1000  # within the 1,024 files that systems let a process open
_LOOK_S: Final = 0.05
_LAST_WORDS_S: Final = 5.0  # for answers that were ended to be written


def run(app: FastAPI, settings: Settings, bound: socket.socket, announce: Callable[[str], None]) -> None:
    """Serve until a signal comes; return once all is ended.

    Args:
        app: of `create_app`.
        settings: the same as the application's.
        bound: where it listens, of `bind`.
        announce: called with the server's address once it does.
    """
    log.set_up()
    server_of(app, settings, lambda: announce(_address(bound))).run([bound])


def server_of(app: FastAPI, settings: Settings, announce: Callable[[], None]) -> Server:
    """Return a server for an application; its `run` takes the sockets to listen at."""
    config = uvicorn.Config(
        app,
        http=type("Connection", (Connection,), {"slow_reader_s": settings.slow_reader_s}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(_LAST_WORDS_S),
    )
    return Server(config, app.state.service, announce)


def bind(settings: Settings) -> socket.socket:
    """Return a socket at the address that was asked for.

    Raises:
        SettingsError: it cannot be had.
    """
    where = (settings.host, settings.port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        text = (error.strerror or str(error)).lower()
        raise SettingsError(
            f"{settings.host}:{settings.port}: cannot listen there, {text}; try another --port"
        ) from None
    return bound


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Announces itself, and drains before it ends."""

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._announce = service, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; at the second end at once."""
        if self._service.admission.is_draining or not self.started:
            os._exit(128 + sig)
        self._service.admission.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        admission = self._service.admission
        log.event("draining", running=admission.running)
        await _until(lambda: admission.running == 0, self._service.settings.drain_s)
        self._service.expire_all()
        await _until(lambda: admission.running == 0, _LAST_WORDS_S)
        log.event("drained", running=admission.running)
        self.should_exit = True


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_LOOK_S)


class Connection(HttpToolsProtocol):
    """A connection that is cut when its client neither sends the rest of its headers nor reads what it was sent.

    Attributes:
        headers_timeout_s: how long a client may take for its first request, and for the headers of each.
        slow_reader_s: how long it may read nothing while what was sent waits for it.
    """

    headers_timeout_s: float = HEADERS_TIMEOUT_S
    slow_reader_s: float = 30.0
    _timer: asyncio.TimerHandle | None = None
    _head_bytes: int | None = None  # of a request whose headers are not complete, but for those read with its first

    def connection_made(self, transport: Any) -> None:
        """Wait for a request."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.headers_timeout_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless the address and the headers of a request are too long."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"headers: are too long, expected at most {MAX_HEAD_BYTES} bytes")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Wait for the headers of a request."""
        super().on_message_begin()
        self._head_bytes = 0
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and not self.flow.write_paused:
            self._stop_timer()
            self._timer = self.loop.call_later(self.headers_timeout_s, self.transport.abort)

    def on_headers_complete(self) -> None:
        """Take a request."""
        self._head_bytes = None
        if not self.flow.write_paused:  # else the timer is the reader's
            self._stop_timer()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Let the client read what was sent."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Go on, now that it has."""
        self._stop_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < unread:
                self._watch_reader()
            else:
                self.transport.abort()

        self._stop_timer()
        self._timer = self.loop.call_later(self.slow_reader_s, look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
