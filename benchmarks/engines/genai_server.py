"""A front for onnxruntime-genai, which has none: static batches behind the streaming part of `/v1/completions`.

    python -m engines.genai_server MODEL --port 8000 --slots 16 --threads 2

Up to so many requests that wait form a batch, prompts padded on the left to the longest. Each stream gets its tokens as
they come and ends at its length; the next batch begins when the longest answer of this one has ended, since genai 0.18
admits nobody to a running batch on this provider. (Its `Engine` batches in the same way here and wants the logits of
all positions of a prompt.) Tokens are sent as their numbers: no detokenizer's time is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from engines.genai import open_model


@dataclass
class Request:
    """A prompt, the length of its answer, and the tokens so far on their way to the connection."""

    prompt: list[int]
    length: int
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)


class Batches:
    """Answers requests on a thread of its own, a batch at a time."""

    def __init__(self, model: og.Model, slots: int, loop: asyncio.AbstractEventLoop) -> None:
        self._model, self._slots, self._loop = model, slots, loop
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, request: Request) -> None:
        """Queue a request."""
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                batch = [self._waiting.popleft() for _ in range(min(self._slots, len(self._waiting)))]
            self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        width = max(len(request.prompt) for request in batch)
        length = max(request.length for request in batch)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            do_sample=False, batch_size=len(batch), min_length=width + length, max_length=width + length
        )
        generator = og.Generator(self._model, parameters)
        padded = [[0] * (width - len(request.prompt)) + request.prompt for request in batch]
        generator.append_tokens(np.array(padded, np.int32))
        for index in range(length):
            generator.generate_next_token()
            tokens = generator.get_next_tokens().tolist()
            sent = [(r, token) for r, token in zip(batch, tokens, strict=True) if index < r.length]
            self._loop.call_soon_threadsafe(_send, sent)


def _send(sent: list[tuple[Request, int]]) -> None:
    for request, token in sent:
        request.tokens.put_nowait(token)


class Front:
    """HTTP/1.1, as little of it as the load generator needs."""

    def __init__(self, batches: Batches, name: str, vocabulary: int) -> None:
        self._batches, self._name, self._vocabulary = batches, name, vocabulary

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, *_ = head.decode().split()
                body = await reader.readexactly(_content_length(head))
                if (method, path) == ("POST", "/v1/completions"):
                    await self._complete(json.loads(body), writer)
                else:
                    models = {"object": "list", "data": [{"id": self._name, "vocabulary": self._vocabulary}]}
                    _write(writer, "application/json", json.dumps(models).encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _complete(self, document: dict, writer: asyncio.StreamWriter) -> None:
        request = Request(document["prompt"], document["max_tokens"])
        self._batches.add(request)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for index in range(request.length):
            reason = "length" if index == request.length - 1 else None
            choice = {"index": 0, "text": f" {await request.tokens.get()}", "finish_reason": reason}
            _write_event(writer, json.dumps({"object": "text_completion", "model": self._name, "choices": [choice]}))
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": request.length}
        _write_event(writer, json.dumps({"object": "text_completion", "choices": [], "usage": usage}))
        _write_event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _content_length(head: bytes) -> int:
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if line)
    return int(fields.get(b"content-length", b"0"))


def _write_event(writer: asyncio.StreamWriter, text: str) -> None:
    event = f"data: {text}\n\n".encode()
    writer.write(b"%x\r\n%b\r\n" % (len(event), event))


def _write(writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


async def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    vocabulary = json.loads((options.model / "genai_config.json").read_text())["model"]["vocab_size"]
    batches = Batches(open_model(options.model, options.threads), options.slots, asyncio.get_running_loop())
    front = Front(batches, options.model.name, vocabulary)
    server = await asyncio.start_server(front.serve, "127.0.0.1", options.port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
