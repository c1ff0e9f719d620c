"""Batches without padding, and scoring through the runtime on real graphs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.evaluate import scorers
from optimizer.evaluate.items import Item
from optimizer.evaluate.scorers import RuntimeScorer, batches
from runtime.session import DecoderSession, EncoderSession

DATA = Path(__file__).parents[2] / "data"
DECODER = DATA / "artifact-v1" / "model.onnx"
CLASSIFIER = DATA / "artifact-v1-classifier" / "model.onnx"
ITEMS = [Item(tuple(range(1, 1 + length)), str(length)) for length in (5, 2, 9, 5)]


@given(st.lists(st.integers(1, 9)), st.integers(1, 30))
def test_batches_hold_each_item_once_in_equal_lengths_within_the_budget(lengths, budget):
    items = [Item((0,) * length, "") for length in lengths]
    found = list(batches(items, budget))
    assert sorted(index for batch in found for index in batch) == list(range(len(items)))
    for batch in found:
        assert len({lengths[index] for index in batch}) == 1
        assert len(batch) == 1 or lengths[batch[0]] * len(batch) <= budget


def test_batches_are_as_full_as_the_budget_allows():
    items = [Item((0,) * length, "") for length in (2, 3, 2, 2, 2)]
    assert list(batches(items, 6)) == [[0, 2, 3], [4], [1]]


def test_the_runtime_gives_each_item_the_logits_of_the_session():
    session = DecoderSession(DECODER, capacity=16, threads=1)
    found = {index: (first, rows.copy()) for index, first, rows in RuntimeScorer(DECODER, "decoder", 1).logits(ITEMS)}
    for index, item in enumerate(ITEMS):
        assert found[index][0] == 0
        assert np.array_equal(found[index][1], session.run(item.ids))


def test_long_items_come_in_chunks_with_the_same_logits(monkeypatch):
    whole = {index: rows.copy() for index, _, rows in RuntimeScorer(DECODER, "decoder", 1).logits(ITEMS)}
    monkeypatch.setattr(scorers, "SLICE_ELEMENTS", 1)
    chunks = [(index, first, rows.copy()) for index, first, rows in RuntimeScorer(DECODER, "decoder", 1).logits(ITEMS)]
    assert [(index, first, len(rows)) for index, first, rows in chunks if index == 2] == [
        (2, 0, 3),
        (2, 3, 3),
        (2, 6, 3),
    ]
    for index, first, rows in chunks:
        # a chunk sums attention in another order: rounding of float32 on logits of order one
        assert rows == pytest.approx(whole[index][first : first + len(rows)], abs=1e-5)


@pytest.mark.parametrize("slice_elements", [1, scorers.SLICE_ELEMENTS])
def test_decode_gives_each_token_the_logits_of_a_step_of_its_own(monkeypatch, slice_elements):
    monkeypatch.setattr(scorers, "SLICE_ELEMENTS", slice_elements)
    session = DecoderSession(DECODER, capacity=16, threads=1)
    found = [[] for _ in ITEMS]
    for index, first, rows in RuntimeScorer(DECODER, "decoder", 1).logits(ITEMS, "decode"):
        assert first == len(found[index])
        found[index].extend(rows.copy())
    for item, rows in zip(ITEMS, found, strict=True):
        steps = [session.step(token, past=place).copy() for place, token in enumerate(item.ids)]
        assert np.array_equal(rows, steps)
    assert not np.array_equal(found[2], session.run(ITEMS[2].ids))  # float32 caches: one token sums in another order


def test_decode_leaves_out_positions_that_nobody_asked_for():
    class Late(Item):
        first = 3

    (found,) = RuntimeScorer(DECODER, "decoder", 1).logits([Late((1, 2, 3, 4, 5), "")], "decode")
    session = DecoderSession(DECODER, capacity=16, threads=1)
    steps = [session.step(token, past=place).copy() for place, token in enumerate((1, 2, 3, 4, 5))]
    assert found[:2] == (0, 3) and np.array_equal(found[2], steps[3:])


def test_a_classifier_answers_in_the_order_of_the_items():
    session = EncoderSession(CLASSIFIER, threads=1)
    found = RuntimeScorer(CLASSIFIER, "classifier", 1).classify(ITEMS)
    for row, item in zip(found, ITEMS, strict=True):
        # a batch of two against one: rounding of float32
        assert row == pytest.approx(session.run([item.ids])[0], abs=1e-5)
