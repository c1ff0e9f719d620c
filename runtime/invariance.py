"""What this host's kernels keep to the last bit, tried on the loaded model before anybody is served.

A kernel may round a row of a matrix by how many rows there are, or by where in the batch it is. Then an answer would
depend on what else happens to run, and nobody could ask for the same one twice. Whether kernels do so depends on the
formats of the weights and on the processor, so it is not assumed but tried: sixty tokens of prompts and ten decodes, on
made-up keys and values of sequences of various lengths. What came out equal in every bit is promised; what
failed once is not. It is no proof for lengths and numbers of rows that were not tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.session import DecoderSession, EncoderSession

_LEAST_CAPACITY: Final = 16
_LONG_CHUNK: Final = 19  # an odd number: the last row of such has kernels of its own
_PASTS: Final = (500, 3, 64, 17, 130, 9, 30, 41)  # tokens in the slots whose rows are compared
_TEXTS: Final = (3, 9, 24)  # tokens of an encoder's texts


@dataclass(frozen=True)
class Promises:
    """What never changes a bit of an answer on this host.

    Attributes:
        rows: which other requests run at the same time, and in which slot a request is.
        chunks: how a prompt is cut.
        phases: whether a token came with the prompt or was generated.
    """

    rows: bool
    chunks: bool
    phases: bool

    @property
    def words(self) -> str:
        """The same in a sentence for people."""
        causes = {
            "what else runs": self.rows,
            "how the prompt is cut": self.chunks,
            "whether a token was read or generated": self.phases,
        }
        never, may = ([cause for cause, kept in causes.items() if kept is wanted] for wanted in (True, False))
        told = [f"no bit of an answer depends on {' or '.join(never)}"] if never else []
        told += [f"its last bits may depend on {' or '.join(may)}"] if may else []
        return "; ".join(told)


@dataclass(frozen=True)
class Found:
    """What came out equal in every bit.

    Attributes:
        even_rows: rows of decodes of different even numbers, in different slots, beside different sequences.
        odd_rows: the same rows in decodes of odd numbers.
        chunks: logits and cache of prompts cut in different ways: at even positions, no part of one token.
        phases: logits and cache of a token run alone and with those after it; one of two rows where slots allow.
    """

    even_rows: bool
    odd_rows: bool
    chunks: bool
    phases: bool

    @property
    def needs_even_rows(self) -> bool:
        """Whether rows keep their bits among even numbers of them only."""
        return self.even_rows and not self.odd_rows

    def promises(self, *, only_even_rows: bool) -> Promises:
        """Return what holds for an engine that decodes even numbers of rows only, or any number."""
        rows = self.even_rows and (self.odd_rows or only_even_rows)
        return Promises(rows=rows, chunks=self.chunks, phases=self.phases and rows)


def examine(session: DecoderSession) -> Found:
    """Try a session whose slots are all free; they are free again afterwards.

    A session of one slot has no rows to compare: they are equal. Where a context has no room nothing is found.
    """
    if session.capacity < _LEAST_CAPACITY:
        return Found(even_rows=False, odd_rows=False, chunks=False, phases=False)
    try:
        even_rows, odd_rows = _examine_rows(session)
        chunks, phases = _examine_chunks(session)
    finally:
        for slot in range(session.cache.slots):
            session.free(slot)
    return Found(even_rows, odd_rows, chunks, phases)


@dataclass(frozen=True)
class Company:
    """What came out equal in every bit of texts of one length that ran together on an encoder.

    Attributes:
        rows: of two texts and more, those of batches of different sizes.
        alone: a text alone as well.
    """

    rows: bool
    alone: bool

    @property
    def needs_two(self) -> bool:
        """Whether a text keeps its bits in company only, and be it a copy of its own."""
        return self.rows and not self.alone


def examine_company(session: EncoderSession, vocabulary: int, longest: int) -> Company:
    """Try an encoder with texts of made-up ids below `vocabulary`, of up to `longest` tokens."""
    rows = alone = True
    for length in sorted({min(length, longest) for length in _TEXTS}):
        ids = np.random.default_rng(length).integers(0, vocabulary, (5, length)).tolist()
        want = session.run(ids)
        rows &= np.array_equal(session.run(ids[:2]), want[:2])
        alone &= np.array_equal(session.run(ids[:1]), want[:1])
    return Company(rows, alone)


def _examine_rows(session: DecoderSession) -> tuple[bool, bool]:
    """Return whether rows keep their bits among even numbers of rows, and among odd ones as well."""
    slots = min(session.cache.slots, len(_PASTS))
    pasts = [min(past, session.capacity - 1) for past in _PASTS[:slots]]
    for slot in range(slots):
        _fill(session, slot, pasts[slot])
    tokens = _tokens(session, slots)
    want = session.decode(tokens, pasts).copy()  # [slots, V]
    is_kept = {True: True, False: True}  # by whether their number is even
    for first, count in ((0, 1), (slots - 1, 1), (0, 2), (slots - 3, 3), (slots - 4, 4), (0, 5)):
        if first >= 0 and count < slots:
            rows = slice(first, first + count)
            got = session.decode(tokens[rows], pasts[rows], first)
            is_kept[count % 2 == 0] &= np.array_equal(got, want[rows])
    if slots > 2:
        swapped = [1, 0]
        for source, slot in zip(swapped, (slots - 2, slots - 1), strict=True):
            session.cache.copy(source, slot, 0, pasts[source])
        got = session.decode([tokens[at] for at in swapped], [pasts[at] for at in swapped], slots - 2)
        is_kept[True] &= np.array_equal(got, want[swapped])
    return is_kept[True], is_kept[False]


def _examine_chunks(session: DecoderSession) -> tuple[bool, bool]:
    """Return whether positions keep their bits however a prompt is cut, and whether one alone has the same."""
    long = min(_LONG_CHUNK, (session.capacity - 1) // 2 * 2 + 1)
    past = min(_PASTS[0], session.capacity - 8) // 2 * 2
    at_once = _read(session, 0, [long])
    chunks = _equal(_read(session, 0, [2, long - 5, 3]), at_once)
    _fill(session, 0, past)
    chunks &= _equal(_read(session, past, [4, 3]), _read(session, past, [7]))

    tokens = _tokens(session, 4)
    together = [session.run(tokens, past, rows=[0, 1])[0].copy(), *_cells(session, past, 1)]
    rows = min(session.cache.slots, 2)
    alone = [session.decode(tokens[:1] * rows, [past, 0][:rows])[0].copy(), *_cells(session, past, 1)]
    return chunks, _equal(alone, together)


def _read(session: DecoderSession, past: int, cut: Sequence[int]) -> list[NDArray[np.generic]]:
    """Read a prompt in slot 0 after so many tokens; return the last token's logits, and the cache of all."""
    tokens, begin = _tokens(session, sum(cut)), 0
    for size in cut:
        logits = session.run(tokens[begin : begin + size], past + begin, rows=[size - 1])
        begin += size
    return [logits[0].copy(), *_cells(session, past, len(tokens))]


def _cells(session: DecoderSession, past: int, count: int) -> list[NDArray[np.generic]]:
    return [array[0, :, past : past + count].copy() for array in session.cache.view(0, 1).values()]


def _fill(session: DecoderSession, slot: int, tokens: int) -> None:
    """Write keys and values of a made-up sequence."""
    numbers = np.random.default_rng(slot).standard_normal(10_007, np.float32)
    for layer, array in enumerate(session.cache.view(slot, 1).values()):
        written = np.resize(np.roll(numbers, layer), array[0, :, :tokens].shape)
        array[0, :, :tokens] = written if array.dtype == np.float32 else np.clip(32 * written, -127, 127)


def _tokens(session: DecoderSession, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(count).integers(0, session.vocabulary, count)]


def _equal(one: Sequence[NDArray[np.generic]], other: Sequence[NDArray[np.generic]]) -> bool:
    return all(map(np.array_equal, one, other))
