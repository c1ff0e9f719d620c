"""Many requests on one decoder artifact: continuous batching in the caller's own thread.

    engine = Engine.load("artifacts/stdlib-llama-int4", slots=8)
    for piece in engine.add("def main():", max_tokens=64):      # a Ticket: read it piece by piece,
        print(piece, end="")                                    # which lets all others go on as well
    engine.generate(["import", "class Reader:"])                # or many at once

Requests may be added and cancelled between any two steps. Each answer is that of `TextGenerator`, token by token:
prompt positions run several at a time, generated ones alone, both as there, and a row of a batch is computed apart from
its neighbours. Where a kernel rounds a row by how many rows there are (int4 in blocks of 64 and more: the last of an
odd number, by 1e-7), an even number runs, which `TextGenerator` does not: then two tokens that are as likely to 1e-7
may change places. What holds on this host is tried when the engine is made, and told by `promises`.

An engine is not thread-safe: whoever drives it calls everything else between steps.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Unpack

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest, verify
from runtime.errors import PromptError, ServingError
from runtime.generation import open_decoder, run_prompt
from runtime.invariance import examine
from runtime.pace import Pace
from runtime.request import Answer, Completion, Options, Piece, Prompt, Request, RequestReader, take_next
from runtime.scheduler import Copy, Decode, Move, Prefill, Scheduler
from runtime.session import DecoderSession
from runtime.tokenizer import Tokenizer

SLOTS: Final = 8
MAX_STALL_MS: Final = 60.0
_COPY_BYTES: Final = 2**25  # of keys and values copied within one step: 30 ms, most of it for new pages


@dataclass(frozen=True)
class Occupancy:
    """How full an engine is.

    Attributes:
        waiting: requests that were not admitted yet.
        running: requests that were.
        reserved_tokens: of the cache, which the running ones may come to need.
        budget_tokens: which all of them together may reserve; one request too.
    """

    waiting: int
    running: int
    reserved_tokens: int
    budget_tokens: int


class Engine:
    """A loaded decoder artifact that answers several requests at a time.

    Attributes:
        session: its own.
        promises: the `Promises` of what never changes a bit of its answers on this host.
    """

    def __init__(
        self,
        manifest: Manifest,
        session: DecoderSession,
        tokenizer: Tokenizer,
        *,
        kv_memory: int | None = None,
        max_stall_ms: float = MAX_STALL_MS,
        exact: bool = True,
    ) -> None:
        """Put an engine on a session, which is its alone from then on; arguments as for `load`."""
        if not max_stall_ms > 0:
            raise PromptError(f"max_stall_ms: got {max_stall_ms}, expected more than 0 milliseconds")
        cache = session.cache
        budget = session.slots * cache.capacity if kv_memory is None else kv_memory // cache.token_bytes
        if budget < cache.granule:
            least = cache.granule * cache.token_bytes
            raise PromptError(f"kv_memory: got {kv_memory} bytes, expected at least {least}, the least that is taken")
        self.session = session
        self.tokenizer = tokenizer
        self._budget = budget
        self._reader = RequestReader(manifest, tokenizer, session.vocabulary, session.capacity)
        self._pace = Pace(max_stall_ms)
        found = examine(session)
        session.even_rows = exact and found.needs_even_rows
        self.promises = found.promises(only_even_rows=session.even_rows)
        self._scheduler = Scheduler(
            slots=session.slots,
            budget=budget,
            granule=cache.granule,
            chunk=self._pace.tokens,
            copied=2 * max(1, _COPY_BYTES // (2 * cache.token_bytes)),
            even_rows=session.even_rows,
        )
        self._tickets: dict[int, Ticket] = {}
        self._added = 0

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        slots: int | None = None,
        kv_memory: int | None = None,
        context: int | None = None,
        threads: int | None = None,
        max_stall_ms: float = MAX_STALL_MS,
        exact: bool = True,
        digest: str | None = None,
    ) -> Engine:
        """Verify an artifact and load it.

        Args:
            folder: the artifact.
            slots: most requests that run at once; None takes 8, or 1 where the graph runs one sequence at a time.
            kv_memory: most bytes of keys and values. A request is admitted when its prompt and `max_tokens` fit beside
                those of the others, and waits until then. Beside it every slot may keep one page per head. None takes
                all that the slots can hold.
            context: most tokens of one prompt and its answer; None takes all that the model can.
            threads: threads per operator; None takes what this process was given.
            max_stall_ms: how long a chunk of one prompt may keep the other answers from their next token; when several
                prompts are being read, a chunk of each, of four at most, comes before it.
            exact: answers do not depend on what else runs, to the last bit, where that takes an even number of rows:
                odd numbers get a dummy row. It costs as much as one more request: most, 1.07 to 1.3 times, where one
                runs alone. Where kernels need no such care, or `slots` is 1, it costs nothing.
            digest: the identity to insist on.

        Raises:
            ServingError: one line that says what is wrong.
        """
        return cls.from_verified(
            folder,
            verify(folder, digest),
            slots=slots,
            kv_memory=kv_memory,
            context=context,
            threads=threads,
            max_stall_ms=max_stall_ms,
            exact=exact,
        )

    @classmethod
    def from_verified(
        cls,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        *,
        slots: int | None,
        kv_memory: int | None,
        context: int | None,
        threads: int | None,
        max_stall_ms: float,
        exact: bool = True,
    ) -> Engine:
        """Load an artifact that `verify` has just returned this manifest for; arguments as for `load`."""
        count = _default_slots(manifest) if slots is None else slots
        session = open_decoder(folder, manifest, threads, context, count)
        tokenizer = Tokenizer.load(folder)
        return cls(manifest, session, tokenizer, kv_memory=kv_memory, max_stall_ms=max_stall_ms, exact=exact)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self._scheduler.has_work

    @property
    def occupancy(self) -> Occupancy:
        """How many requests wait and run, and what they reserve."""
        scheduler = self._scheduler
        return Occupancy(scheduler.waiting, scheduler.running, scheduler.reserved, self._budget)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer together that can ever be admitted."""
        granule = self.session.cache.granule
        return min(self.session.capacity, self._budget // granule * granule)

    def read(self, prompt: Prompt, **options: Unpack[Options]) -> Request:
        """Check and tokenize what `add` takes; this touches nothing that a step does, so any thread may do it.

        Raises:
            PromptError: when the prompt is empty, leaves no room in the context, or an argument is out of range.
        """
        return self._reader.read(prompt, **options)

    def add(self, prompt: Prompt | Request, **options: Unpack[Options]) -> Ticket:
        """Queue a request; it joins the others in the next step if there is a free slot and memory for it.

        Args:
            prompt: a text to continue, messages `{"role": ..., "content": ...}` for the chat template, or token ids;
                or what `read` made of one, with its options.
            options: what may be said of the answer, as `Options` has it; none beside what was read.

        Raises:
            PromptError: as `read`, and when it needs more memory than there is.
        """
        return self._add(self._request(prompt, options))

    def add_many(self, prompt: Prompt | Request, n: int, **options: Unpack[Options]) -> list[Ticket]:
        """Queue n requests of one prompt, which is read once; their answers are those that n times `add` would get.

        Args:
            prompt: as for `add`. It is read n times where its logprobs are asked for.
            n: how many. The first has the seed of its `sampling`, and each other the seed after that of the one before.
            options: as for `add`.

        Raises:
            PromptError: as `add`, and when n is less than 1; nothing is queued then.
        """
        if n < 1:
            raise PromptError(f"n: got {n}, expected at least 1 answer")
        request = self._request(prompt, options)
        group = self._added if request.prompt_logprobs is None else None
        seeds = [(request.sampling.seed + index) % 2**64 for index in range(n)]
        many = [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]
        return [self._add(each, group) for each in many]

    def _request(self, prompt: Prompt | Request, options: Options) -> Request:
        if not isinstance(prompt, Request):
            return self.read(prompt, **options)
        if options:
            raise PromptError(f"{next(iter(options))}: got it beside a request that was read; say it to `read`")
        return prompt

    def _add(self, request: Request, group: int | None = None) -> Ticket:
        number = self._added
        self._scheduler.add(number, len(request.ids), request.max_tokens, group)
        self._added += 1
        ticket = Ticket(self, number, Answer(request, self.tokenizer))
        self._tickets[number] = ticket
        return ticket

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> list[Completion]:
        """Answer all prompts with the same options, as for `add`; requests added before go on beside them.

        Raises:
            PromptError: as `add`; no prompt is answered then.
        """
        tickets: list[Ticket] = []
        try:
            for prompt in prompts:
                tickets.append(self.add(prompt, **options))
            while not all(ticket.is_finished for ticket in tickets):
                self.step()
        finally:
            for ticket in tickets:
                ticket.cancel()
        return [ticket.completion for ticket in tickets]

    def step(self) -> list[Ticket]:
        """Run a chunk of one prompt, or one token of every answer; return the tickets that got a token or ended."""
        step = self._scheduler.schedule()
        if step is None:
            assert not self._tickets
            return []
        if isinstance(step, Copy | Move):
            self._copy(step)
            return []
        return self._finish(step, self._run(step))

    def cancel(self, ticket: Ticket) -> None:
        """End a request wherever it is and free its slot; one that is finished stays as it is."""
        if not ticket.is_finished:
            ticket.fail(ServingError(f"ticket: request {ticket.number} was cancelled; add it again"))
            self._release(ticket)

    def _release(self, ticket: Ticket) -> None:
        del self._tickets[ticket.number]
        slot = self._scheduler.remove(ticket.number)
        if slot is not None:
            self.session.free(slot)

    def _copy(self, step: Copy | Move) -> None:
        past = step.past if isinstance(step, Copy) else 0
        self.session.cache.copy(step.source, step.slot, past, step.tokens)
        if isinstance(step, Move):
            self.session.free(step.source)
        self._scheduler.ran(step)

    def _run(self, step: Prefill | Decode) -> NDArray[np.float32]:
        """Return the logits of the step's last position, or of its rows."""
        if isinstance(step, Decode):
            last = [0 if row.request is None else self._tickets[row.request].answer.ids[-1] for row in step.rows]
            return self.session.decode(last, [row.past for row in step.rows], step.first)
        answer = self._tickets[step.request].answer
        begin = time.perf_counter()
        logits = run_prompt(self.session, answer, step.past, step.tokens, step.slot)
        self._pace.measured(step.tokens, step.past, time.perf_counter() - begin)
        return logits

    def _finish(self, step: Prefill | Decode, logits: NDArray[np.float32]) -> list[Ticket]:
        """Choose the tokens that the step was for, and part with the requests that end with them."""
        self._scheduler.ran(step)
        if isinstance(step, Decode):
            live = [at for at, row in enumerate(step.rows) if row.request is not None]
            tickets = [self._tickets[row.request] for row in step.rows if row.request is not None]
            logits = logits if len(live) == len(step.rows) else logits[live]
        else:
            tickets = [self._tickets[step.request]] if step.is_last else []
        pieces = take_next([ticket.answer for ticket in tickets], logits) if tickets else []
        for ticket, piece in zip(tickets, pieces, strict=True):
            ticket.take(piece)
            if ticket.is_finished:
                self._release(ticket)
        return tickets


class Ticket(Iterator[str]):
    """An answer in the making: iterate over its pieces, which drives the engine, then ask for `completion`.

    Attributes:
        number: of the request, counted from 0.
        answer: its tokens so far, and why it ended.
    """

    def __init__(self, engine: Engine, number: int, answer: Answer) -> None:
        self.number = number
        self.answer = answer
        self._engine = engine
        self._pieces: deque[Piece] = deque()
        self._error: ServingError | None = None

    def __next__(self) -> str:
        while self._pieces or not self.is_finished:
            if not self._pieces:
                self._engine.step()
            elif text := self._pieces.popleft().text:
                return text
        if self._error is not None:
            raise self._error
        raise StopIteration

    def take_pieces(self) -> list[Piece]:
        """Return what came since the last look, one piece for each token; the engine does not run."""
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    @property
    def is_finished(self) -> bool:
        """Whether nothing more is to come."""
        return self.answer.finish_reason is not None or self._error is not None

    @property
    def completion(self) -> Completion:
        """The whole answer, whether or not its pieces were read.

        Raises:
            ServingError: while it is not finished, and when it was cancelled or failed.
        """
        if self._error is not None:
            raise self._error
        if self.answer.finish_reason is None:
            raise ServingError("ticket: the answer is not finished; read all its pieces or step the engine first")
        return self.answer.completion()

    def cancel(self) -> None:
        """End the request, as `Engine.cancel` does."""
        self._engine.cancel(self)

    def take(self, piece: Piece | ServingError) -> None:
        """Grow by a piece, or end with what is wrong."""
        if isinstance(piece, ServingError):
            self.fail(piece)
        else:
            self._pieces.append(piece)

    def fail(self, error: ServingError) -> None:
        """End without an answer: the error is raised to whoever reads on."""
        self._error = error


def _default_slots(manifest: Manifest) -> int:
    ids = next((spec for spec in manifest.inputs if spec.name == "input_ids"), None)
    return 1 if ids is not None and isinstance(ids.shape[0], int) else SLOTS
