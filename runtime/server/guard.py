"""What stands before every route: who may ask, how much, and what every response says.

A browser is kept from asking on behalf of a page it happens to show: a request must call the server by a name it
knows (DNS rebinding), and come from no origin but its own or an allowed one. Bodies are read here, whole, and measured
before anything parses them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Mapping
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server import log
from runtime.server.errors import ApiError
from runtime.server.metrics import Metrics
from runtime.server.settings import Settings

MAX_NESTING: Final = 32
MAX_HELD_BYTES: Final = 256 << 20
BODY_TIMEOUT_S: Final = 30.0
KEYLESS: Final = frozenset({"/livez", "/"})
QUIET: Final = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # asked all day: logged only when they fail
_NO_STRUCTURE: Final = bytes(byte for byte in range(256) if byte not in b'"[]{}')
_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_POLICY: Final = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'")
_ALLOWED: Final = (
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type, x-request-id, x-timeout-s"),
    (b"access-control-max-age", b"600"),
)


class Guard:
    """ASGI middleware; pure, so that a stream passes through it without another task."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._settings = settings
        self._held = 0  # bytes of bodies that were taken and whose requests go on
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._hosts = {"localhost", settings.host.lower(), *(name.lower() for name in settings.allow_hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in settings.allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it; log it either way."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        try:
            await self._pass(visit, receive)
        except ApiError as error:
            await visit.refuse(error)
        except Exception as error:
            log.exception("request failed", error, request_id=visit.request_id)
            await visit.refuse(ApiError(500, "server: a bug; its log has more under this request's id"))
        finally:
            self._held -= visit.body_bytes
            self._metrics.visited(visit.route, visit.status)
            visit.log()

    async def _pass(self, visit: _Visit, receive: Receive) -> None:
        headers = visit.headers
        self._check_host(headers)
        origin = self._origin(headers)
        if origin is not None:
            visit.added += [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
            if visit.scope["method"] == "OPTIONS":
                visit.added += _ALLOWED
                await visit.send({"type": "http.response.start", "status": 204, "headers": []})
                await visit.send({"type": "http.response.body", "body": b""})
                return
        self._check_key(visit.scope["path"], headers)
        if visit.scope["method"] in ("POST", "PUT", "PATCH"):
            receive = _replayed(await self._body(visit, receive), receive)
        await self._app(visit.scope, receive, visit.send)

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        host = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if "*" not in self._hosts and host not in self._hosts and not _is_address(host):
            text = f"host: got {host[:100]!r}, which is no name of this server; start it with --allow-host {host[:100]}"
            raise ApiError(403, text)

    def _origin(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        """Return the origin of another site that may ask; None where no other site asks."""
        origin = headers.get(b"origin")
        if origin is None:
            return None
        text = origin.decode("latin-1").lower()
        if text.partition("://")[2] == headers.get(b"host", b"").decode("latin-1").lower():
            return None
        if text not in self._origins:
            raise ApiError(403, f"origin: got {text[:100]!r}; start the server with --allow-origin to let it in")
        return origin

    def _check_key(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        if not self._keys or path in KEYLESS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        matches = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever it is
        if scheme.lower() != b"bearer" or not any(matches):
            text = "authorization: got no valid API key, expected `Authorization: Bearer KEY`"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, visit: _Visit, receive: Receive) -> bytes:
        headers = visit.headers
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            text = f"content-type: got {kind.decode('latin-1')[:60]!r}, expected application/json"
            raise ApiError(415, text, headers=_CLOSE)
        most, body = self._settings.max_body_bytes, bytearray()
        length = headers.get(b"content-length", b"0")
        too_large = ApiError(413, f"body: is too large, expected at most {most} bytes", headers=_CLOSE)
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "body: the client left before its end")
                    self._hold(visit, message.get("body", b""))
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"body: took longer than {BODY_TIMEOUT_S:.0f} seconds", headers=_CLOSE) from None
        whole = bytes(body)
        if is_nested_deeper(whole, MAX_NESTING):
            raise ApiError(400, f"body: is nested deeper than {MAX_NESTING} levels")
        return whole

    def _hold(self, visit: _Visit, part: bytes) -> None:
        """Count a part of a body among those that are in memory."""
        visit.body_bytes += len(part)
        self._held += len(part)
        if self._held > MAX_HELD_BYTES:
            text = f"body: those of all requests together are over {MAX_HELD_BYTES} bytes; ask again later"
            raise ApiError(429, text, headers={"Retry-After": "1", **_CLOSE})


_CLOSE: Final = {"Connection": "close"}


class _Visit:
    """One request on its way through: what its response and its log line say beside what the route says."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # of a header twice, the first
        given = self.headers.get(b"x-request-id", b"")
        is_sane = _REQUEST_ID.fullmatch(given) is not None
        self.request_id = given.decode() if is_sane else f"req-{secrets.token_hex(12)}"
        self.added: list[tuple[bytes, bytes]] = [*_HEADERS, (b"x-request-id", self.request_id.encode())]
        self._send = send
        self.status: int | None = None
        self.body_bytes = 0
        self._begin = time.perf_counter()
        log.note(scope)

    async def send(self, message: Message) -> None:
        """Send a message of the response; what all responses say is added to its headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = list(message.get("headers", []))
            policy = () if any(name.lower() == _POLICY[0] for name, _ in own) else (_POLICY,)
            message = {**message, "headers": [*own, *self.added, *policy]}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error; once a response has begun, it can only be cut off."""
        if self.status is None:
            await error.response()(self.scope, _nothing, self.send)

    @property
    def route(self) -> str | None:
        """The path of the route that took it, as it is declared."""
        path: str | None = getattr(self.scope.get("route"), "path", None)
        return path

    def log(self) -> None:
        """Write the line of this request."""
        path = self.scope["path"]
        if path in QUIET and self.status == 200:
            return
        log.event(
            "request",
            request_id=self.request_id,
            method=self.scope["method"],
            route=self.route,
            status=self.status,
            ms=round((time.perf_counter() - self._begin) * 1e3, 1),
            **log.notes(self.scope),
        )


def is_nested_deeper(body: bytes, most: int) -> bool:
    """Whether JSON has more than `most` brackets open at once; what is no JSON may pass, for its parser to refuse."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = re.sub(rb'"[^"]*"', b"", unescaped.translate(_ONE_KIND, _NO_STRUCTURE))
    for _ in range(most):  # each time the innermost level goes
        structure = structure.replace(b"[]", b"")
    return b"[" in structure


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _host_name(host: str) -> str:
    """Return the name in `name:port`, `[::1]:port` or `name`."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) and not host.endswith("]") else host
    return name.strip("[]").lower().rstrip(".")


def _is_address(host: str) -> bool:
    """Whether a host is an IP address, which no DNS answer can have been forged for."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
