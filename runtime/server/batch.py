"""Answer a file of requests: OpenAI's batch lines, by the routes of the server, without a network.

Each line of the input is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`, each
line of the output `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`, in the order in
which answers end. A line is written whole, after its answer, so a run that was killed loses no more than what was under
way: the next one drops a last line without an end and goes on with those that are missing.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from starlette.types import ASGIApp, Message

from runtime.errors import ServingError, SettingsError
from runtime.server.app import create_app
from runtime.server.service import Served
from runtime.server.settings import Settings

URLS: Final = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
_FIELDS: Final = {"custom_id", "method", "url", "body"}
_SURROGATE: Final = re.compile("[\ud800-\udfff]")  # halves of characters, which UTF-8 cannot write
_LONG_S: Final = 30.0 * 86400
_UNBOUNDED: Final = 1 << 40


class BatchError(SettingsError):
    """The input is no batch, or the output is that of another one."""


@dataclass(frozen=True)
class Line:
    """One request.

    Attributes:
        custom_id: its name among those of the file.
        url: the route that answers it.
        body: what the route takes.
    """

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass
class Progress:
    """How far a batch is.

    Attributes:
        requests: lines of the input.
        before: answers that the output had already.
        answered: answers since.
        refused: those of them that are errors.
        output_tokens: of those answers.
    """

    requests: int
    before: int
    answered: int = 0
    refused: int = 0
    output_tokens: int = 0


def run_batch(
    models: Mapping[str, Served],
    requests: Path,
    answers: Path,
    *,
    at_once: int,
    told: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Answer all requests that the output does not answer yet.

    Args:
        models: name to model.
        requests: the input, JSON lines.
        answers: the output, which is begun or gone on with.
        at_once: requests under way.
        told: called after each answer.

    Raises:
        BatchError: the input is wrong, which is found before anything is answered; or the output is another's.
        ServingError: a model cannot go on.
    """
    ids = _checked(requests)
    if answers.exists() and answers.samefile(requests):
        raise BatchError(f"{answers}: is the input itself; give another output")
    with _opened(answers) as output:
        done = _answered(answers, output, ids)
        progress = Progress(len(ids), len(done))
        left = (line for line in read_lines(requests) if line.custom_id not in done)
        settings = Settings(queue=_UNBOUNDED, queue_tokens=_UNBOUNDED, timeout_s=_LONG_S)
        asyncio.run(_run(create_app(models, settings), left, output, at_once, progress, told))
    return progress


async def _run(
    app: Any,
    lines: Iterator[Line],
    output: BinaryIO,
    at_once: int,
    progress: Progress,
    told: Callable[[Progress], None],
) -> None:
    async def worker() -> None:
        for line in lines:
            status, request_id, body = await _ask(app, line)
            if status >= 500:
                raise ServingError(f"{line.custom_id}: {body['error']['message']}")
            answer = {"status_code": status, "request_id": request_id, "body": body}
            whole = {"id": f"batch_{request_id}", "custom_id": line.custom_id, "response": answer, "error": None}
            write_whole(output, json.dumps(whole, ensure_ascii=False).encode() + b"\n")
            progress.answered += 1
            progress.refused += status >= 400
            progress.output_tokens += body.get("usage", {}).get("completion_tokens", 0)
            told(progress)

    async with app.router.lifespan_context(app):
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(worker())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        os.fsync(output.fileno())


def write_whole(output: BinaryIO, line: bytes) -> None:
    """Write all of a line, whatever part the system takes at a time.

    Raises:
        ServingError: there is no room for it.
    """
    try:
        while line:
            line = line[output.write(line) :]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ServingError(f"{output.name}: cannot be written, {reason}; make room and start the run again") from None


async def _ask(app: ASGIApp, line: Line) -> tuple[int, str, dict[str, Any]]:
    """Return status, request id and body of what a route answers."""
    content = json.dumps(line.body).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "query_string": b"",
        "headers": headers,
        "server": ("localhost", 80),
    }
    sent: list[Message] = []
    incoming = [{"type": "http.request", "body": content, "more_body": False}]
    never = asyncio.Event()

    async def receive() -> Message:
        if not incoming:
            await never.wait()
        return incoming.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    own = dict(sent[0]["headers"])
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], own[b"x-request-id"].decode(), json.loads(body)


def read_lines(requests: Path) -> Iterator[Line]:
    """Yield the requests of a file, checked.

    Raises:
        BatchError: the file cannot be read, or a line is no request.
    """
    try:
        with requests.open("rb") as file:
            if not _is_stored(file):
                raise BatchError(f"{requests}: is a pipe or a device, expected a file: it is read twice")
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _line(f"{requests}:{number}", text)
    except OSError as error:
        raise BatchError(f"{requests}: cannot be read, {(error.strerror or str(error)).lower()}") from None


def _line(where: str, text: bytes) -> Line:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{where}: is not JSON ({error}); expected one object a line") from None
    if not isinstance(content, dict) or set(content) != _FIELDS:
        got = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise BatchError(f"{where}: got {got}, expected an object with {', '.join(sorted(_FIELDS))}")
    custom_id, method, url, body = content["custom_id"], content["method"], content["url"], content["body"]
    if not isinstance(custom_id, str) or not custom_id or _SURROGATE.search(custom_id):
        raise BatchError(f"{where}: custom_id: got {custom_id!r}, expected a text")
    if method != "POST" or url not in URLS:
        raise BatchError(f"{where}: got {method!r} {url!r}, expected POST and one of {', '.join(URLS)}")
    if not isinstance(body, dict) or body.get("stream"):
        raise BatchError(f"{where}: body: expected an object, without stream: answers are written whole")
    return Line(custom_id, url, body)


def _checked(requests: Path) -> set[str]:
    """Return the ids of all requests.

    Raises:
        BatchError: a line is no request, or two have one id.
    """
    ids: set[str] = set()
    for line in read_lines(requests):
        if line.custom_id in ids:
            raise BatchError(f"{requests}: custom_id {line.custom_id!r} is there twice; each must be another")
        ids.add(line.custom_id)
    if not ids:
        raise BatchError(f"{requests}: holds no request, expected one JSON object a line")
    return ids


def _opened(answers: Path) -> BinaryIO:
    """Open the output for this run alone; each write reaches the system at once."""
    try:
        file: BinaryIO = answers.open("a+b", buffering=0)
    except OSError as error:
        raise BatchError(f"{answers}: cannot be written, {(error.strerror or str(error)).lower()}") from None
    if not _is_stored(file):
        file.close()
        raise BatchError(f"{answers}: is a pipe or a device, expected a file, which another run could go on with")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BatchError(f"{answers}: another run writes it; wait for it or give another output") from None
    return file


def _is_stored(file: BinaryIO) -> bool:
    """Whether an open file keeps what was written into it."""
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _answered(answers: Path, output: BinaryIO, ids: set[str]) -> set[str]:
    """Return the ids that the output answers, and cut off a last line that has no end.

    Raises:
        BatchError: it answers what the input does not ask.
    """
    done: set[str] = set()
    end = 0
    output.seek(0)
    for number, text in enumerate(output, 1):
        if not text.endswith(b"\n"):
            break
        try:
            name = json.loads(text)["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if not isinstance(name, str) or name not in ids:
            raise BatchError(f"{answers}:{number}: answers nothing of the input; give another output")
        done.add(name)
        end += len(text)
    output.truncate(end)
    return done
