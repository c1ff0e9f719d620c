"""How likely a token was: against the same in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from runtime.errors import SessionError
from runtime.logprobs import token_logprobs

rows = arrays(np.float32, st.tuples(st.just(3), st.integers(1, 60)), elements=st.floats(-60, 60, width=16))


@given(rows, st.data(), st.integers(0, 20))
def test_logprobs_equal_a_log_softmax_in_float64(logits: NDArray[np.float32], data: st.DataObject, count: int) -> None:
    token = data.draw(st.integers(0, logits.shape[1] - 1))
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row, got in zip(exact, token_logprobs(logits, [token] * 3, count), strict=True):
        order = np.argsort(-row, kind="stable")[:count]  # of equal ones the lower id first
        assert got.token == token and [each for each, _ in got.top] == order.tolist()
        # exp in float32: 2.5 units in the last place of its result, 6e-8 of an argument up to 120, in a weight below it
        assert np.allclose([got.logprob, *(value for _, value in got.top)], row[[token, *order]], rtol=0, atol=1e-6)


def test_huge_logits_do_not_overflow_and_forbidden_ones_are_minus_infinity() -> None:
    logits = np.array([[1e30, -1e30, -np.inf, 1e30]], np.float32)
    (got,) = token_logprobs(logits, [2], 3)
    assert got.logprob == -np.inf
    assert [token for token, _ in got.top] == [0, 3, 1]
    assert got.top[0][1] == got.top[1][1] == pytest.approx(0, abs=1e15)  # ln 2 is lost beside 1e30


def test_no_rows_have_no_logprobs() -> None:
    assert token_logprobs(np.zeros((0, 4), np.float32), [], 2) == []  # a prompt of one token


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (got,) = token_logprobs(np.zeros((1, 4), np.float32), [3], 20)
    assert [token for token, _ in got.top] == [0, 1, 2, 3]
    assert got.logprob == pytest.approx(np.log(0.25), abs=1e-7)


def test_a_row_that_is_no_numbers_is_refused() -> None:
    with pytest.raises(SessionError, match="got nan for token 1"):
        token_logprobs(np.array([[0, np.nan]], np.float32), [0], 1)
