"""Which texts run together."""

from __future__ import annotations

from runtime.batching import equal_length_batches


def test_only_equal_lengths_run_together_short_ones_first() -> None:
    assert list(equal_length_batches([3, 2, 3, 2, 2])) == [[1, 3, 4], [0, 2]]


def test_a_batch_keeps_to_its_tokens_but_holds_one_text_at_least() -> None:
    assert list(equal_length_batches([2, 2, 2, 9], tokens_per_batch=4)) == [[0, 1], [2], [3]]


def test_nothing_gives_no_batch_and_empty_texts_do_not_divide_by_zero() -> None:
    assert list(equal_length_batches([])) == []
    assert list(equal_length_batches([0, 0])) == [[0, 1]]
