"""What is promised of an engine's bits is what its kernels keep: kernels that round on purpose are found out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from runtime.engine import Engine
from runtime.generation import TextGenerator
from runtime.invariance import Found, Promises, examine
from runtime.session import DecoderSession

BIT = np.float32(1 + 2**-23)


class Kernels(DecoderSession):
    """A session whose logits are off by a bit as its subclasses say; it counts the rows of its decodes."""

    def __init__(self, folder: Path, slots: int = 8, capacity: int = 128) -> None:
        super().__init__(folder / "model.onnx", capacity=capacity, threads=1, slots=slots)
        self.counts: list[int] = []

    def decode(self, tokens: Sequence[int], pasts: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        logits = super().decode(tokens, pasts, first)
        self.counts.append(len(tokens))
        self.round_rows(logits, first)
        return logits

    def run(self, ids: ArrayLike, past: int = 0, rows: ArrayLike | None = None, slot: int = 0) -> NDArray[np.float32]:
        logits = super().run(ids, past, rows, slot)
        self.round_chunk(logits, np.size(ids), past, slot)
        return logits

    def round_rows(self, logits: NDArray[np.float32], first: int) -> None:
        """Change the logits of a decode from slot `first` on."""

    def round_chunk(self, logits: NDArray[np.float32], tokens: int, past: int, slot: int) -> None:
        """Change the logits of a chunk."""


class LastOfOdd(Kernels):
    def round_rows(self, logits: NDArray[np.float32], first: int) -> None:
        if len(logits) % 2:
            logits[-1] *= BIT


class ByNumber(Kernels):
    def round_rows(self, logits: NDArray[np.float32], first: int) -> None:
        if len(logits) > 3:
            logits[0] *= BIT


class BySlot(Kernels):
    def round_rows(self, logits: NDArray[np.float32], first: int) -> None:
        if first + len(logits) == self.slots:
            logits[-1] *= BIT


class ByChunk(Kernels):
    def round_chunk(self, logits: NDArray[np.float32], tokens: int, past: int, slot: int) -> None:
        if tokens > 4:
            logits *= BIT


class ByPast(Kernels):
    """Its cache, not its logits, depends on where a chunk begins."""

    def round_chunk(self, logits: NDArray[np.float32], tokens: int, past: int, slot: int) -> None:
        if past % 4:
            self.cache.view(slot, 1)["1.value"][0, 0, past + tokens - 1, 0] += 1


class NoNumbers(Kernels):
    def round_rows(self, logits: NDArray[np.float32], first: int) -> None:
        logits[:] = np.nan


@pytest.mark.parametrize(
    ("kernels", "even_rows", "odd_rows", "chunks"),
    [
        (Kernels, True, True, True),
        (LastOfOdd, True, False, True),
        (ByNumber, False, False, True),
        (BySlot, False, True, True),
        (ByChunk, True, True, False),
        (ByPast, True, True, False),
        (NoNumbers, False, False, True),
    ],
)
def test_what_changes_a_bit_is_found(
    decoder_folder: Path, kernels: type[Kernels], even_rows: bool, odd_rows: bool, chunks: bool
) -> None:
    found = examine(kernels(decoder_folder))
    assert (found.even_rows, found.odd_rows, found.chunks) == (even_rows, odd_rows, chunks)


def test_a_token_alone_and_with_others_are_compared(decoder_folder: Path) -> None:
    class OneByOne(Kernels):
        """Runs chunks a token at a time, as decodes do."""

        def run(self, ids: Any, past: int = 0, rows: ArrayLike | None = None, slot: int = 0) -> NDArray[np.float32]:
            logits = [super(Kernels, self).run([token], past + at, slot=slot)[0].copy() for at, token in enumerate(ids)]
            return np.array(logits)[rows]

    assert examine(OneByOne(decoder_folder)).phases
    assert not examine(Kernels(decoder_folder)).phases  # float32 caches: kernels for one token sum in another order


@pytest.mark.parametrize(("slots", "capacity"), [(1, 128), (2, 16), (3, 17), (8, 40)])
def test_it_fits_small_sessions_and_leaves_their_slots_free(decoder_folder: Path, slots: int, capacity: int) -> None:
    session = Kernels(decoder_folder, slots, capacity)
    found = examine(session)
    assert found.even_rows and found.odd_rows and found.chunks
    assert not any(array.any() for array in session.cache.view(0, session.cache.slots).values())


def test_nothing_is_found_where_there_is_no_room(decoder_folder: Path) -> None:
    assert examine(Kernels(decoder_folder, capacity=15)) == Found(False, False, False, False)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_an_exact_engine_makes_the_number_of_rows_even_where_it_must(
    decoder_folder: Path, generator: TextGenerator, slots: int
) -> None:
    def counts(kernels: type[Kernels], exact: bool) -> tuple[set[int], bool]:
        session = kernels(decoder_folder, slots)
        engine = Engine(generator.manifest, session, generator.tokenizer, exact=exact)
        session.counts.clear()
        tickets = [engine.add("the", max_tokens=4 + 3 * at, ignore_eos=True) for at in range(slots)]
        while engine.has_work:
            engine.step()
        want = generator.generate("the", max_tokens=40, ignore_eos=True).token_ids
        assert all(ticket.completion.token_ids == want[: len(ticket.answer.ids)] for ticket in tickets)
        return {count % 2 for count in session.counts}, engine.promises.rows

    assert counts(LastOfOdd, exact=True) == ({0}, True)
    assert counts(LastOfOdd, exact=False) == ({0, 1}, False)
    assert counts(Kernels, exact=True) == ({0, 1}, True)


def test_promises_hold_for_the_numbers_of_rows_that_run() -> None:
    found = Found(even_rows=True, odd_rows=False, chunks=True, phases=True)
    assert found.promises(only_even_rows=True) == Promises(rows=True, chunks=True, phases=True)
    assert found.promises(only_even_rows=False) == Promises(rows=False, chunks=True, phases=False)


def test_promises_speak() -> None:
    assert Promises(rows=True, chunks=True, phases=False).words == (
        "no bit of an answer depends on what else runs or how the prompt is cut; "
        "its last bits may depend on whether a token was read or generated"
    )
    assert Promises(rows=False, chunks=False, phases=False).words.startswith("its last bits may depend on what")
    assert Promises(rows=True, chunks=True, phases=True).words.endswith("or whether a token was read or generated")
