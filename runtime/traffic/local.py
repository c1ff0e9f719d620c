"""Artifacts in this process as targets: no HTTP, so what is seen is the engine alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from runtime.artifact import Manifest
from runtime.encoder import TextEncoder
from runtime.encoder_batcher import AsyncEncoder
from runtime.engine import Engine, Ticket
from runtime.errors import LoadError
from runtime.request import Prompt
from runtime.tokenizer import Encoded
from runtime.traffic.measure import Clock, Heard, Work
from runtime.traffic.workload import Question


@dataclass
class _Listener:
    """Who waits for an answer, and when its tokens came."""

    done: asyncio.Future[None]
    arrivals_s: list[float] = field(default_factory=list)


class LocalEngine:
    """An engine that runs between the questions, on the event loop itself: a step keeps all else waiting."""

    def __init__(self, engine: Engine, weight_bytes: int, clock: Clock = time.perf_counter) -> None:
        """Take an engine, which is this target's alone from then on, and the bytes of its weights."""
        self._engine, self._weight_bytes, self._clock = engine, weight_bytes, clock
        self._listeners: dict[Ticket, _Listener] = {}
        self._has_work = asyncio.Event()
        self._prefill_s = self._decode_s = 0.0
        self._decode_bytes = 0

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Run the engine while there is work."""
        runner = asyncio.create_task(self._run())
        try:
            yield
        finally:
            runner.cancel()
            with suppress(asyncio.CancelledError):
                await runner

    async def ask(self, question: Question) -> Heard:
        """Return the engine's greedy answer, of exactly `max_tokens` if the context holds them."""
        prompt = cast(Prompt, question.prompt)
        ticket = self._engine.add(prompt, max_tokens=question.max_tokens, ignore_eos=True)
        listener = self._listeners[ticket] = _Listener(asyncio.get_running_loop().create_future())
        self._has_work.set()
        try:
            await listener.done
        finally:
            del self._listeners[ticket]
            ticket.cancel()
        answer = ticket.completion
        return Heard(tuple(listener.arrivals_s), len(answer.token_ids), answer.prompt_tokens)

    async def work(self) -> Work:
        """Return the seconds of all steps, and what those that decode read."""
        return Work(self._prefill_s + self._decode_s, self._prefill_s, self._decode_s, self._decode_bytes)

    async def _run(self) -> None:
        while True:
            await self._has_work.wait()
            try:
                self._step()
            except Exception as error:  # whatever it is, those who wait must hear of it
                self._fail(error)
            if not self._engine.has_work:
                self._has_work.clear()
            await asyncio.sleep(0)

    def _fail(self, error: Exception) -> None:
        for listener in self._listeners.values():
            if not listener.done.done():
                listener.done.set_exception(error)

    def _step(self) -> None:
        """Run a step; one whose tickets had tokens before was a decode, any other a chunk of a prompt."""
        begin = self._clock()
        tickets = self._engine.step()
        now = self._clock()
        if any(len(ticket.answer.ids) > 1 for ticket in tickets):
            self._decode_s += now - begin
            read = sum(len(ticket.answer.request.ids) + len(ticket.answer.ids) - 1 for ticket in tickets)
            self._decode_bytes += self._weight_bytes + read * self._engine.session.cache.token_bytes
        else:
            self._prefill_s += now - begin
        for ticket in tickets:
            listener = self._listeners[ticket]
            listener.arrivals_s.append(now)
            if ticket.is_finished and not listener.done.done():
                listener.done.set_result(None)


class LocalEncoder:
    """An encoder on a thread of its own: texts of equal length that wait run together."""

    def __init__(self, encoder: TextEncoder, clock: Clock = time.perf_counter) -> None:
        """Take a loaded encoder artifact, whose session is this target's alone from then on."""
        self._served, self._clock = AsyncEncoder(encoder), clock

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Run the thread."""
        async with self._served:
            yield

    async def ask(self, question: Question) -> Heard:
        """Run a text through the graph."""
        text = self._read(question)
        await self._served.run([text])
        return Heard((self._clock(),), 0, len(text.ids))

    async def work(self) -> Work:
        """Return the seconds of all batches: none of them decodes."""
        busy_s = self._served.stats().busy_s
        return Work(busy_s, busy_s, 0.0)

    def _read(self, question: Question) -> Encoded:
        if isinstance(question.prompt, str):
            return self._served.encoder.tokenizer.encode_batch([question.prompt])[0]
        ids = list(cast(Sequence[int], question.prompt))
        return Encoded(ids, [0] * len(ids), False)


def require_room(folder: Path, manifest: Manifest, most_tokens: int) -> None:
    """Refuse lengths that the context does not hold.

    Raises:
        LoadError: so many tokens of prompt and answer are more than the context.
    """
    if most_tokens > manifest.context_length:
        limit = f"the context of {manifest.context_length}"
        raise LoadError(
            f"{folder}: got up to {most_tokens} tokens, expected at most {limit}; lower --input-tokens, --output-tokens"
        )


def weight_bytes(folder: Path, manifest: Manifest) -> int:
    """Return the bytes of the graph and its weights: about what a decode step reads of them.

    A table of embeddings that is not also the head counts whole, though a step reads a row of it for each token.
    """
    return sum(entry.bytes for name, entry in manifest.files.items() if Path(name).suffix in (".onnx", ".data"))
