"""Forward passes on the decoder artifact: however a sequence is cut, the logits are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.errors import SessionError
from runtime.session import DecoderSession, EncoderSession

CAPACITY = 48
# Kernels for one token and for several sum in another order. Logits reach 13 here, where float32 steps are 1e-6; single
# steps differed by up to 1.5e-5. Leaving out one position moves logits by more than 1.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def session(decoder_folder: Path) -> DecoderSession:
    return DecoderSession(decoder_folder / "model.onnx", capacity=CAPACITY, threads=1)


def tokens(session: DecoderSession, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, session.vocabulary, count)


def test_the_shape_of_the_cache_is_read_from_the_graph(session: DecoderSession) -> None:
    assert (session.layers, session.heads, session.head_width, session.vocabulary) == (2, 2, 16, 288)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_prefill_chunks_and_single_steps_give_the_same_logits(session: DecoderSession, sizes: list[int]) -> None:
    ids = tokens(session, min(sum(sizes), CAPACITY))
    whole = session.run(ids).copy()
    past = 0
    for size in sizes:
        part = ids[past : past + size]
        if len(part):
            got = session.run(part, past) if size > 1 else session.step(int(part[0]), past)[None]
            np.testing.assert_allclose(got, whole[past : past + size], atol=TOLERANCE, rtol=0)
        past += size


def test_the_logits_depend_on_position_and_on_every_earlier_token(session: DecoderSession) -> None:
    ids = tokens(session, 20)
    right = session.run(ids)[-1].copy()
    changed = ids.copy()
    changed[0] += 1
    assert abs(session.run(changed)[-1] - right).max() > 100 * TOLERANCE
    session.run(ids[:-1])
    assert abs(session.step(int(ids[-1]), 18) - right).max() > 100 * TOLERANCE


def test_only_the_rows_asked_for_come_back_in_their_order(session: DecoderSession) -> None:
    ids = tokens(session, 10)
    whole = session.run(ids).copy()
    # fewer rows may take another path through the last matrix product
    np.testing.assert_allclose(session.run(ids, rows=[9, 0, 4]), whole[[9, 0, 4]], atol=TOLERANCE, rtol=0)


def test_going_back_and_starting_anew_leave_nothing_behind(session: DecoderSession) -> None:
    ids = tokens(session, 30)
    want = session.run(ids[:10])[-1].copy()
    session.run(ids)
    session.run(ids[20:30], 30)
    assert np.array_equal(session.run(ids[:10])[-1], want)


def test_the_cache_holds_exactly_its_capacity(session: DecoderSession) -> None:
    ids = tokens(session, CAPACITY)
    whole = session.run(ids).copy()
    np.testing.assert_allclose(session.step(int(ids[-1]), CAPACITY - 1), whole[-1], atol=TOLERANCE, rtol=0)


def test_rows_of_different_lengths_share_a_run_and_a_prompt_is_read_beside_them(decoder_folder: Path) -> None:
    several = DecoderSession(decoder_folder / "model.onnx", capacity=CAPACITY, threads=1, slots=3)
    ids = tokens(several, 40).reshape(2, 20)
    want = [several.run(row, slot=0).copy() for row in ids]
    several.free(0)
    lengths = (4, 0, 15)
    several.run(ids[0, :4], slot=0)
    several.run(ids[1, :15], slot=2)
    for more in range(3):  # slot 1 runs as a dummy row
        last = [int(ids[0, 4 + more]), 0, int(ids[1, 15 + more])]
        logits = several.decode(last, [lengths[0] + more, 0, lengths[2] + more])
        np.testing.assert_allclose(logits[0], want[0][4 + more], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(logits[2], want[1][15 + more], atol=TOLERANCE, rtol=0)
    logits = several.decode([0, int(ids[1, 18])], [0, 18], first=1)
    np.testing.assert_allclose(logits[1], want[1][18], atol=TOLERANCE, rtol=0)
    assert np.array_equal(several.run(ids[0], slot=1), want[0])


def test_an_odd_number_of_slots_has_one_more_for_a_dummy_row(decoder_folder: Path) -> None:
    three = DecoderSession(decoder_folder / "model.onnx", capacity=8, threads=1, slots=3)
    want = three.decode([5, 6, 7], [0, 0, 0]).copy()
    assert np.array_equal(three.decode([5, 6, 7, 0], [0, 0, 0, 0])[:3], want)
    with pytest.raises(SessionError, match="slots 0 to 3"):
        three.decode([5, 6, 7, 0, 0], [0, 0, 0, 0, 0])
    with pytest.raises(SessionError, match="slot: got 3, expected 0 to 2"):
        three.run([1, 2], slot=3)


def test_even_rows_compute_one_more_and_return_those_asked_for(session: DecoderSession) -> None:
    ids = tokens(session, 9)
    want = session.run(ids, rows=[0, 8, 3]).copy()
    session.even_rows = True
    try:
        got = session.run(ids, rows=[0, 8, 3])
        assert got.shape == want.shape and got.base is not None and len(got.base) == 4
        np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
        assert session.run(ids, rows=[2, 5]).shape == (2, session.vocabulary)
    finally:
        session.even_rows = False


def test_slots_and_rows_out_of_range_are_refused(decoder_folder: Path) -> None:
    two = DecoderSession(decoder_folder / "model.onnx", capacity=8, threads=1, slots=2)
    with pytest.raises(SessionError, match="slot: got 2, expected 0 to 1"):
        two.run([1, 2], slot=2)
    with pytest.raises(
        SessionError, match="got 3 tokens and 3 positions from slot 0 on, expected as many of both, and slots 0 to 1"
    ):
        two.decode([1, 2, 3], [0, 0, 0])
    for first in (-1, 1):
        with pytest.raises(SessionError, match=f"got 2 tokens and 2 positions from slot {first} on"):
            two.decode([1, 2], [0, 0], first)
    with pytest.raises(SessionError, match="got position 8, expected 0 to 7"):
        two.decode([1, 2], [0, 8])


def test_a_step_returns_the_bound_buffer_itself(session: DecoderSession) -> None:
    assert np.shares_memory(session.step(1, 0), session.step(2, 1))


@pytest.mark.parametrize(("count", "past"), [(CAPACITY + 1, 0), (1, CAPACITY), (2, CAPACITY - 1), (0, 0), (1, -1)])
def test_more_tokens_than_the_cache_holds_are_refused(session: DecoderSession, count: int, past: int) -> None:
    with pytest.raises(SessionError, match=f"at most {CAPACITY} in all"):
        session.run(np.zeros(count, np.int64), past)
    if count == 1:
        with pytest.raises(SessionError, match=f"expected 0 to {CAPACITY - 1}"):
            session.step(0, past)


@pytest.mark.parametrize("rows", [[], [3], [-1]])
def test_rows_outside_the_chunk_are_refused(session: DecoderSession, rows: list[int]) -> None:
    with pytest.raises(SessionError, match="rows: got"):
        session.run([1, 2, 3], rows=rows)


def test_an_encoder_graph_is_no_decoder_and_the_other_way_round(decoder_folder: Path, classifier_folder: Path) -> None:
    with pytest.raises(SessionError, match="is no decoder graph"):
        DecoderSession(classifier_folder / "model.onnx", capacity=8, threads=1)
    with pytest.raises(SessionError, match="is no encoder graph"):
        EncoderSession(decoder_folder / "model.onnx", threads=1)


def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(SessionError, match="onnxruntime refuses the graph") as caught:
        DecoderSession(tmp_path / "model.onnx", capacity=8, threads=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(SessionError, match="no such file"):
        DecoderSession(tmp_path / "other.onnx", capacity=8)


def test_an_encoders_answer_does_not_depend_on_padding(classifier_folder: Path) -> None:
    session = EncoderSession(classifier_folder / "model.onnx", threads=1)
    alone = session.run([[5, 6]])
    beside = session.run([[5, 6], [7, 8, 9, 10], [11]])
    assert beside.shape == (3, 3)
    np.testing.assert_allclose(beside[0], alone[0], atol=1e-5)  # a mean over more zeros: another order of summation
    with pytest.raises(SessionError, match="empty"):
        session.run([[1], []])
