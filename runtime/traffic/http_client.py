"""HTTP/1.1 for a load generator: kept connections, bodies piece by piece, each with the moment its bytes were read.

The parser is httptools', that of uvicorn. Pieces are told apart where the bytes arrive, not when a task of the event
loop gets its turn, and a token costs a third less than through aiohttp (docs/log.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

from runtime.errors import LoadError, ServingError
from runtime.traffic.measure import Clock

OnBody = Callable[[bytes, float], None]


@dataclass(frozen=True)
class Reply:
    """Status and body of an answer; the body is empty where it was given away piece by piece."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the document in the body; None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class HttpClient:
    """Requests to one server, any number at a time, each on a connection of its own; idle ones are used again."""

    def __init__(self, url: str, headers: Mapping[str, str], clock: Clock) -> None:
        """Take the server's address and the headers of every request.

        Raises:
            LoadError: it is no http or https address.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").encode("idna").decode(), parts.port
        except ValueError:
            host, port = "", None
        is_plain = host and parts.scheme in ("http", "https") and not parts.query and not parts.fragment
        if not is_plain or not re.fullmatch("[!-~]*", parts.path):
            raise LoadError(f"{url}: is no address of a server, expected one such as http://127.0.0.1:8000")
        self._url, self._host, self._path = url, host, parts.path.rstrip("/")
        self._is_secure = parts.scheme == "https"
        self._port = port or (443 if self._is_secure else 80)
        self._clock = clock
        named = {"host": host_header(host, port), **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        self._idle: list[_Connection] = []

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def get(self, path: str) -> Reply:
        """Return the answer to a GET."""
        return await self._send("GET", path, b"", None)

    async def post(self, path: str, document: object, on_body: OnBody) -> Reply:
        """Send JSON; give pieces of the body to `on_body` if the answer's status is 200.

        Raises:
            ServingError: there is no connection, or it ends before the answer does.
        """
        return await self._send("POST", path, json.dumps(document).encode(), on_body)

    async def _send(self, method: str, path: str, body: bytes, on_body: OnBody | None) -> Reply:
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}content-length: {len(body)}\r\n"
        request = f"{head}content-type: application/json\r\n\r\n".encode("latin-1") + body
        while True:
            connection, is_fresh = await self._connection()
            try:
                reply = await connection.exchange(request, on_body)
            except _Unheard:
                if not is_fresh:  # the server closed an idle connection in this moment
                    continue
                raise ServingError(f"{self._url}: closed the connection without an answer") from None
            except BaseException:
                connection.close()
                raise
            if connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return reply

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, False
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._url, self._clock),
                self._host,
                self._port,
                ssl=ssl.create_default_context() if self._is_secure else None,
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise ServingError(f"{self._url}: cannot be reached, {reason.lower()}; is the server running?") from None
        return connection, True


def host_header(host: str, port: int | None) -> str:
    """Return the name of a server as HTTP has it: an IPv6 address in brackets, the port where one was given."""
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


class _Unheard(Exception):
    """The connection ended before a byte of the answer."""


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time; httptools calls the methods that begin with `on_`."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._url, self._clock = url, clock
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Reply] | None = None
        self.is_open = True
        self.is_reusable = False

    async def exchange(self, request: bytes, on_body: OnBody | None) -> Reply:
        """Send a request and return its answer."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._on_body, self._body, self._heard, self._is_framed = on_body, bytearray(), False, False
        self._has_headers = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        if not self.is_open:
            raise _Unheard
        return await self._done

    def close(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse what came; an answer that is no HTTP ends the exchange."""
        self._now, self._heard = self._clock(), True
        if self._done is None or self._done.done():
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail(ServingError(f"{self._url}: sent what is no HTTP/1.1 answer"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange: with its answer, if that had no length but the end of the connection."""
        self.is_open = False
        if self._done is None or self._done.done():
            return
        if self._has_headers and not self._is_framed and exc is None:
            self._finish()
        elif self._heard:
            self._fail(ServingError(f"{self._url}: closed the connection in the middle of an answer"))
        else:
            self._done.set_exception(_Unheard())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note whether the body says where it ends."""
        self._is_framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """Note that the status is known."""
        self._has_headers = True

    def on_body(self, body: bytes) -> None:
        """Give a piece away, or keep it where it is an error's or nobody wants it."""
        if self._on_body is not None and self._parser.get_status_code() == 200:
            try:
                self._on_body(body, self._now)
            except ServingError as error:  # the parser would make another of it
                self._fail(error)
        else:
            self._body += body

    def on_message_complete(self) -> None:
        """End the exchange."""
        self.is_reusable = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(Reply(self._parser.get_status_code(), bytes(self._body)))

    def _fail(self, error: ServingError) -> None:
        self.is_reusable = False
        self.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
