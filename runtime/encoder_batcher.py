"""An encoder on a thread of its own: texts that wait run together, whoever asked for them.

    async with AsyncEncoder(TextEmbedder.load("artifacts/minilm")) as served:
        vectors = await served.run(served.encoder.encode(["a text", "another"]))     # [2, width]

Only texts of exactly equal length share a batch, so nothing is padded. Some graphs round a text that runs alone
differently (attention in single nodes, by 1e-7); whether this one does is tried at load, and such a text runs beside a
copy of itself then: what a text gets does not depend on the others, to the last bit.

A text that finds the thread idle runs at once; what comes while a batch runs waits for its end, and is the company of
the next. Nobody waits longer on purpose: it gains nothing (docs/log.md). See `Waiting` for who is next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.batching import TOKENS_PER_BATCH
from runtime.encoder import TextEncoder
from runtime.errors import PromptError, ServingError
from runtime.invariance import examine_company
from runtime.tokenizer import Encoded
from runtime.worker import NAP_S, Worker


@dataclass(frozen=True)
class EncoderStats:
    """What an encoder has done, as of its last batch.

    Attributes:
        waiting: texts that did not run yet.
        texts: that ran.
        tokens: of these.
        batches: they ran in.
        busy_s: seconds spent in them.
    """

    waiting: int = 0
    texts: int = 0
    tokens: int = 0
    batches: int = 0
    busy_s: float = 0.0


class Waiting:
    """The texts of several jobs, and which of them run next; lengths and numbers only.

    By turns the oldest job is next and the one with the fewest tokens left, so that a single text need not wait for all
    of a long list, and the list goes on all the same. Its next text says the length; all others of that length come
    along, the job's own first, then by age, up to `tokens` together.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._jobs: dict[int, dict[int, int]] = {}  # job -> text -> length, both in the order they came
        self._lengths: dict[int, dict[tuple[int, int], None]] = {}  # length -> (job, text), in the order they came
        self._favours_oldest = True

    def __len__(self) -> int:
        """Return how many texts wait."""
        return sum(map(len, self._jobs.values()))

    def add(self, job: int, lengths: Sequence[int]) -> None:
        """Add the texts of a job, at least one, numbered from 0."""
        self._jobs[job] = dict(enumerate(lengths))
        for text, length in enumerate(lengths):
            self._lengths.setdefault(length, {})[job, text] = None

    def drop(self, job: int) -> None:
        """Forget what is left of a job."""
        for text, length in self._jobs.pop(job, {}).items():
            self._leave(job, text, length)

    def take(self) -> list[tuple[int, int]]:
        """Return job and number of each text of the next batch, which wait no longer; [] when none does."""
        if not self._jobs:
            return []
        chosen = next(iter(self._jobs)) if self._favours_oldest else min(self._jobs, key=self._left)
        self._favours_oldest = not self._favours_oldest
        length = next(iter(self._jobs[chosen].values()))
        own = [(chosen, text) for text, each in self._jobs[chosen].items() if each == length]
        others = (place for place in self._lengths[length] if place[0] != chosen)
        batch = list(islice(chain(own, others), max(1, self._tokens // length)))
        for job, text in batch:
            del self._jobs[job][text]
            self._leave(job, text, length)
            if not self._jobs[job]:
                del self._jobs[job]
        return batch

    def _left(self, job: int) -> int:
        return sum(self._jobs[job].values())

    def _leave(self, job: int, text: int, length: int) -> None:
        del self._lengths[length][job, text]
        if not self._lengths[length]:
            del self._lengths[length]


@dataclass(eq=False)
class _Job:
    """Texts that were asked for together."""

    texts: Sequence[Encoded]
    answer: asyncio.Future[NDArray[np.float32]]
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)


class AsyncEncoder(Worker):
    """Runs an encoder on its own thread, between `async with` and its end.

    Attributes:
        encoder: for what any thread may do: its manifest and its tokenizer.
        is_exact: whether no bit of an answer depends on what else runs.
    """

    def __init__(self, encoder: TextEncoder, *, nap_s: float = NAP_S) -> None:
        """Take an encoder, whose session is this worker's alone from then on."""
        super().__init__("encoder", nap_s)
        self.encoder = encoder
        manifest = encoder.manifest
        company = examine_company(encoder.session, manifest.vocabulary, manifest.context_length)
        self.is_exact, self._needs_two = company.rows, company.needs_two
        self._waiting = Waiting(TOKENS_PER_BATCH)
        self._jobs: dict[int, _Job] = {}  # the thread's alone, as all below
        self._added = self._texts = self._tokens = self._batches = 0
        self._busy_s = 0.0
        self._stats = EncoderStats()

    def stats(self) -> EncoderStats:
        """Return what it has done so far."""
        return self._stats

    async def run(self, texts: Sequence[Encoded]) -> NDArray[np.float32]:
        """Return the graph's output for each text, `[n, labels]` or `[n, width]`, in the order given.

        Who stops waiting takes the texts that did not run yet along.

        Raises:
            PromptError: there are no texts.
            ServingError: it has stopped.
        """
        if not texts:
            raise PromptError("texts: got none, expected at least one")
        job = _Job(texts, asyncio.get_running_loop().create_future())
        self._commands.put(lambda: self._add(job))
        if self.error is not None:  # asked last: the thread sets it first and then empties the queue
            raise self.error
        try:
            return await job.answer
        finally:
            if job.answer.cancelled():
                self._commands.put(lambda: self._drop(job))

    # ---- on the thread

    @property
    def _has_work(self) -> bool:
        return bool(self._jobs)

    def _turn(self) -> None:
        batch = self._waiting.take()
        if batch:
            begin = time.perf_counter()
            self._compute(batch)
            self._busy_s += time.perf_counter() - begin
        self._stats = EncoderStats(len(self._waiting), self._texts, self._tokens, self._batches, self._busy_s)
        whole = [number for number, job in self._jobs.items() if len(job.rows) == len(job.texts)]
        if whole:
            self._tell(_answer, [self._jobs.pop(number) for number in whole])

    def _compute(self, batch: Sequence[tuple[int, int]]) -> None:
        texts = [self._jobs[number].texts[text] for number, text in batch]
        run = texts * 2 if len(texts) == 1 and self._needs_two else texts
        types = [each.types for each in run] if self.encoder.reads_pairs else None
        rows = self.encoder.session.run([each.ids for each in run], types)
        for (number, text), row in zip(batch, rows[: len(texts)], strict=True):
            self._jobs[number].rows[text] = row
        self._texts += len(texts)
        self._tokens += sum(len(each.ids) for each in texts)
        self._batches += 1

    def _add(self, job: _Job) -> None:
        if self.error is not None:
            self._tell(_refuse, [job], self.error)
            return
        self._jobs[self._added] = job
        self._waiting.add(self._added, [len(each.ids) for each in job.texts])
        self._added += 1

    def _drop(self, job: _Job) -> None:
        number = next((number for number, each in self._jobs.items() if each is job), None)
        if number is not None:
            del self._jobs[number]
            self._waiting.drop(number)

    def _fail(self, error: ServingError) -> None:
        self._tell(_refuse, list(self._jobs.values()), error)


def _answer(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_result(np.stack([job.rows[text] for text in range(len(job.texts))]))


def _refuse(jobs: Sequence[_Job], error: Any) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_exception(error)
