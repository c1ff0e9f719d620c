"""Which requests run next, and where: integers only, no tensors, so that integers can test it.

A step is either one chunk of one prompt or one token for all that are past theirs. The two take turns while there is
work for both: before its next token a stream waits for one chunk of each prompt that is being read, of `CHUNKS` at
most, and a prompt for one token. Requests of a group have the same prompt: one of them reads it, the others copy it
from a slot that holds it, but for its last tokens.

Tokens are decoded at once for all slots from the lowest to the highest that is past its prompt. A slot between them
that holds no such request runs as a dummy row, whose token is written into the cache like any other. It does no harm: a
free slot takes it at position 0, and a slot whose prompt is being read right after what was read of it; in both, what
comes there next overwrites it before anything reads it. The row costs as much as a live one after as many tokens, which
copying the highest sequence into the hole saves. Where kernels round the last of an odd number of rows differently, one
more dummy row makes their number even.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from runtime.errors import PromptError
from runtime.pace import MOST_TOKENS, next_chunk

CHUNKS: Final = 4
"""Most prompts that have a chunk each between two tokens of a stream."""


@dataclass(frozen=True)
class Prefill:
    """Run tokens `past` to `past + tokens - 1` of a request's prompt.

    Attributes:
        request: whose prompt.
        slot: where its cache is.
        past: how many of its tokens the cache holds already.
        tokens: how many to run, and never one unless it is the whole prompt.
        is_last: whether the prompt ends with them, so that the first new token can be chosen.
    """

    request: int
    slot: int
    past: int
    tokens: int
    is_last: bool


@dataclass(frozen=True)
class Copy:
    """Copy positions `past` to `past + tokens - 1` of a prompt from a slot that holds the same one.

    Attributes:
        request: who gets them.
        slot: where its cache is.
        source: the slot to copy from.
        past: how many of the tokens its cache holds already.
        tokens: how many to copy: an even number, and at least two of the prompt are left to run.
    """

    request: int
    slot: int
    source: int
    past: int
    tokens: int


@dataclass(frozen=True)
class Move:
    """Copy all `tokens` of a sequence to another slot, and free its own.

    Attributes:
        request: whose sequence.
        slot: where it is from then on.
        source: where it was.
        tokens: how many its cache holds.
    """

    request: int
    slot: int
    source: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """One slot in a decode.

    Attributes:
        request: whose token; None for a dummy row.
        past: how many tokens its cache holds, and so the position of the one that runs.
    """

    request: int | None
    past: int


@dataclass(frozen=True)
class Decode:
    """Run one token in each of the slots `first` and after; both ends are live, but for a row that makes them even."""

    first: int
    rows: tuple[Row, ...]


Step = Prefill | Copy | Move | Decode


@dataclass(eq=False)
class _Place:
    """A request in its slot: `past` of its tokens are in the cache, `prompt` of all are the prompt's."""

    request: int
    prompt: int
    reserved: int
    group: int | None
    past: int = 0

    @property
    def left(self) -> int:
        """Tokens of the prompt that were not read yet."""
        return max(self.prompt - self.past, 0)

    @property
    def copyable(self) -> int:
        """Tokens of the prompt that need not be run when another holds them: the last two or three must be.

        An even number, as of chunks, so that the rest is computed as ever: at least two at once, after an even number.
        """
        return max(self.prompt - 2, 0) // 2 * 2


class Scheduler:
    """Queue, slots and what they have reserved of the cache.

    A request is admitted once there is a slot for it and all tokens that it may ever need fit beside those of the
    others; so nobody is turned out later. Who came first is admitted first, and who does not fit yet makes all others
    wait. With its first chunk it takes the lowest free slot: prompts that nobody reads yet are no dummy rows.
    """

    def __init__(
        self,
        *,
        slots: int,
        budget: int,
        granule: int,
        chunk: Callable[[int], int],
        copied: int,
        even_rows: bool = False,
        chunks: int = CHUNKS,
    ) -> None:
        """Begin with nothing to do.

        Args:
            slots: how many sequences run at once.
            budget: tokens that all of them together may reserve.
            granule: tokens that memory comes in; reservations are rounded up to it.
            chunk: most tokens of a prompt to run after so many while others wait for it: even, and at least 4.
            copied: most tokens to copy at once: even, and at least 2.
            even_rows: decode even numbers of rows only. Then the slot after the last may run as a dummy row too.
            chunks: most chunks between two tokens of a stream, one of each prompt that is being read.
        """
        self._budget, self._granule, self._chunk, self._copied = budget, granule, chunk, copied
        self._queue: deque[_Place] = deque()
        self._slots: list[_Place | None] = [None] * slots
        self._reading: list[_Place] = []  # admitted, their prompts not read to the end, in order
        self._even_rows = even_rows
        self._most_chunks = chunks
        self._chunks = 0  # since the last decode
        self._favours_oldest = False
        self._moved_last = False

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self.waiting > 0 or bool(self._admitted)

    @property
    def waiting(self) -> int:
        """Requests that were not admitted yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that were admitted."""
        return len(self._admitted)

    @property
    def reserved(self) -> int:
        """Tokens that the admitted requests may come to need."""
        return sum(place.reserved for place in self._admitted)

    def add(self, request: int, prompt: int, new: int, group: int | None = None) -> None:
        """Queue a request.

        Args:
            request: a number of the caller's, used by no other request that waits or runs.
            prompt: tokens of its prompt, at least 1.
            new: most tokens to generate; one that generates none is to be removed when its prompt has run.
            group: a number that only requests of the same prompt share; None for a prompt of its own.

        Raises:
            PromptError: it could not be admitted even alone.
        """
        reserved = -(-(prompt + new) // self._granule) * self._granule
        if reserved > self._budget:
            needed = f"{prompt} + {new} tokens of prompt and answer need {reserved} of cache"
            raise PromptError(
                f"request: {needed}, expected at most {self._budget}; shorten it, lower max_tokens or raise kv_memory"
            )
        self._queue.append(_Place(request, prompt, reserved, group))

    def remove(self, request: int) -> int | None:
        """Forget a request, finished or not, waiting or running; return the slot it held, if any, which is free now."""
        self._queue = deque(place for place in self._queue if place.request != request)
        self._reading = [place for place in self._reading if place.request != request]
        for slot, place in enumerate(self._slots):
            if place and place.request == request:
                self._slots[slot] = None
                return slot
        return None

    def schedule(self) -> Step | None:
        """Admit whom there is room for; return what to run next, None when there is nothing."""
        self._admit()
        decoding = [slot for slot, place in enumerate(self._slots) if place and not place.left]
        if self._reading and (not decoding or self._chunks < min(len(self._ready()), self._most_chunks)):
            return self._read(is_awaited=bool(decoding))
        if not decoding:
            return None
        return self._move(decoding[0], decoding[-1]) or self._decode(decoding[0], decoding[-1])

    def ran(self, step: Step) -> None:
        """Note that what `schedule` returned has been run."""
        self._moved_last = isinstance(step, Move)
        if isinstance(step, Move):
            self._slots[step.slot], self._slots[step.source] = self._slots[step.source], None
            return
        if isinstance(step, Decode):
            self._chunks = 0
            for row, place in zip(step.rows, self._slots[step.first :], strict=False):
                if place and row.request is not None:
                    place.past += 1
            return
        place = self._slots[step.slot]
        assert place is not None
        place.past += step.tokens
        is_short = isinstance(step, Copy) and step.tokens < self._copied
        if not is_short:  # a short copy goes with the chunk that follows it
            self._chunks += 1
            self._favours_oldest = not self._favours_oldest
        if isinstance(step, Prefill) and step.is_last:
            self._reading.remove(place)

    @property
    def _admitted(self) -> list[_Place]:
        return [*self._reading, *(place for place in self._slots if place and not place.left)]

    def _admit(self) -> None:
        while self._queue and len(self._admitted) < len(self._slots):
            if self.reserved + self._queue[0].reserved > self._budget:
                return
            self._reading.append(self._queue.popleft())

    def _read(self, is_awaited: bool) -> Prefill | Copy:
        """Return the next chunk: by turns of the prompt with the fewest tokens left and of the oldest.

        So a short prompt need not wait for a long one, and the long one goes on all the same.
        """
        ready = self._ready()
        place = ready[0] if self._favours_oldest else min(ready, key=lambda each: each.left)
        if place not in self._slots:
            self._slots[self._slots.index(None)] = place
        slot = self._slots.index(place)
        source = self._source(place)
        if source is not None:
            return Copy(place.request, slot, source, place.past, min(place.copyable - place.past, self._copied))
        most = self._chunk(place.past) if is_awaited else MOST_TOKENS
        tokens = next_chunk(place.left, most)
        return Prefill(place.request, slot, place.past, tokens, is_last=tokens == place.left)

    def _ready(self) -> list[_Place]:
        """Return the prompts that may be read, the oldest first: of a group its first, which the others can copy."""
        firsts: dict[_Place | int, _Place] = {}
        for place in self._reading:
            firsts.setdefault(place if place.group is None else place.group, place)
        return list(firsts.values())

    def _move(self, first: int, last: int) -> Move | None:
        """Return the move of the highest live sequence into the lowest hole between the live ones, if it is to be.

        As many holes are left as prompts are about to take a slot, and a sequence that is too long to be copied at once
        stays. No token waits for more than one move.
        """
        place = self._slots[last]
        holes = [slot for slot in range(first, last) if self._slots[slot] is None]
        wanted = sum(each not in self._slots for each in self._ready())
        if place is None or len(holes) <= wanted or self._moved_last or place.past > self._copied:
            return None
        return Move(place.request, holes[0], last, place.past)

    def _decode(self, first: int, last: int) -> Decode:
        if self._even_rows and (last - first) % 2 == 0:
            first, last = (first, last + 1) if first == 0 else (first - 1, last)
        places = [*self._slots, None][first : last + 1]
        return Decode(first, tuple(map(_row, places)))

    def _source(self, place: _Place) -> int | None:
        """Return a slot that holds more of this place's prompt than it does itself."""
        if place.group is None or place.past >= place.copyable:
            return None
        holds = (other and other.group == place.group and other.past >= place.copyable for other in self._slots)
        return next((slot for slot, is_source in enumerate(holds) if is_source), None)


def _row(place: _Place | None) -> Row:
    if place is None:
        return Row(None, 0)
    return Row(None if place.left else place.request, place.past)
