"""Next-token distributions: closed forms, stability, NaN, and what lumping costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.evaluate import distributions
from optimizer.evaluate.distributions import Rows, blocks, kl_divergence

rows_of_logits = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7), min_size=2, max_size=2).map(
    lambda values: np.array(values, np.float32)
)


def rows(*logits):
    return Rows(0, 0, np.array(logits, np.float32))


def test_uniform_logits_give_the_log_of_the_vocabulary():
    assert rows([3.0] * 11).log_total[0] - 3.0 == np.log(11)


def test_large_logits_do_not_overflow():
    # float32 holds 1e4 to 1e-3, and nothing else is lost
    assert rows([1e4, 1e4, -1e4]).log_probs(np.array([[0, 1]]))[0] == pytest.approx(-np.log(2), abs=1e-12)


def test_a_row_with_nan_is_nan_and_its_neighbour_is_not():
    assert np.isnan(rows([1, np.nan, 2], [0, 0, 0]).log_total).tolist() == [True, False]


def test_an_infinite_logit_is_not_a_distribution():
    assert np.isnan(rows([1, np.inf, 2]).log_total[0])


def test_the_most_likely_tokens_come_first_and_ties_by_id():
    assert rows([1, 5, 3, 5, 0]).most_likely(3).tolist() == [[1, 3, 2]]


def test_a_count_beyond_the_vocabulary_gives_all_of_it():
    assert rows([1, 5, 3]).most_likely(64).tolist() == [[1, 2, 0]]


def test_the_rest_is_lumped_into_one_bin_after_the_kept_tokens():
    found = np.exp(rows(np.log([0.5, 0.2, 0.2, 0.1])).log_probs_and_rest(np.array([[0, 3]])))
    assert found[0] == pytest.approx([0.5, 0.1, 0.4], rel=1e-6)  # rounding of float32


def test_a_tiny_rest_is_not_lost_to_cancellation():
    # 2 e^-60 / (1 + ...): one minus the kept probability would be 0 in float64
    assert rows([60, 0, 0]).log_probs_and_rest(np.array([[0]]))[0, 1] == pytest.approx(np.log(2) - 60, rel=1e-6)


def test_asking_for_the_rest_leaves_the_distribution_as_it_was():
    one = rows([1, 2, 3])
    one.log_probs_and_rest(np.array([[2]]))
    assert one.log_total[0] == rows([1, 2, 3]).log_total[0]


def test_kl_of_two_known_distributions():
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    # 0.5 ln 2 - 0.25 ln 2 by hand; a few roundings of float64
    assert kl_divergence(p, q)[0] == pytest.approx(0.25 * np.log(2), abs=1e-15)


def test_a_bin_that_cannot_occur_adds_nothing():
    p, q = np.array([[0.0, -np.inf]]), np.log([[0.5, 0.5]])
    assert kl_divergence(p, q)[0] == pytest.approx(np.log(2), abs=1e-15)


def test_a_bin_that_underflowed_in_the_candidate_costs_much_but_not_infinity():
    assert 300 < kl_divergence(np.log([[0.5, 0.5]]), np.array([[0.0, -np.inf]]))[0] < 400


@pytest.mark.parametrize("broken", [0, 1])
def test_kl_keeps_nan(broken):
    pair = [np.array([[0.0, -np.inf]]), np.array([[0.0, -np.inf]])]
    pair[broken] = np.full((1, 2), np.nan)
    assert np.isnan(kl_divergence(*pair)[0])


@given(rows_of_logits)
def test_kl_is_never_negative_and_zero_for_equal_rows(logits):
    ids = np.array([[0, 2, 4]])
    p, q = (rows(row).log_probs_and_rest(ids) for row in logits)
    assert kl_divergence(p, q)[0] >= 0
    assert kl_divergence(p, p)[0] == 0


@given(rows_of_logits)
def test_lumping_never_makes_the_divergence_larger(logits):
    p, q = (rows(row) for row in logits)
    ids = p.most_likely(3)
    whole = kl_divergence(p.log_probs(np.arange(7)[None]), q.log_probs(np.arange(7)[None]))[0]
    lumped = kl_divergence(p.log_probs_and_rest(ids), q.log_probs_and_rest(ids))[0]
    # the lumped log-probabilities are float32: 6e-8 of up to 60 nats
    assert lumped <= whole + 1e-5


def test_blocks_are_small_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(distributions, "BLOCK_ELEMENTS", 10)
    logits = np.arange(21, dtype=np.float32).reshape(7, 3)
    found = list(blocks(4, 100, logits))
    assert [(part.index, part.first, len(part.logits)) for part in found] == [(4, 100, 3), (4, 103, 3), (4, 106, 1)]
    assert np.array_equal(np.concatenate([part.logits for part in found]), logits)
