"""The next token: filters keep what they promise, noise has the right distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from runtime.errors import SamplingError, SessionError
from runtime.sampler import GREEDY, SamplingParams, sample

Row = NDArray[np.float32]
rows = arrays(np.float32, st.integers(2, 60), elements=st.floats(-30, 30, width=32))
positions = st.integers(0, 2**40)
seeds = st.integers(0, 2**64 - 1)


def softmax(row: Row, temperature: float = 1.0) -> NDArray[np.float64]:
    weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
    return np.asarray(weights / weights.sum())


def draws(row: Row, count: int, **params: Any) -> NDArray[np.int64]:
    return np.array([sample(row, SamplingParams(**params), position) for position in range(count)])


@given(rows, positions, seeds)
def test_temperature_zero_is_argmax(row: Row, position: int, seed: int) -> None:
    assert sample(row, SamplingParams(temperature=0, seed=seed, top_k=2), position) == row.argmax()


@given(rows, positions, seeds, st.integers(1, 10))
def test_top_k_never_leaves_the_k_best(row: Row, position: int, seed: int, k: int) -> None:
    token = sample(row, SamplingParams(temperature=5, top_k=k, seed=seed), position)
    assert np.count_nonzero(row > row[token]) < k


@given(rows, positions, seeds, st.floats(0.01, 1))
def test_top_p_never_leaves_the_nucleus(row: Row, position: int, seed: int, p: float) -> None:
    token = sample(row, SamplingParams(temperature=2, top_p=p, seed=seed), position)
    probability = softmax(row, 2)
    above = probability[row > row[token]].sum()
    assert above < p + 1e-5  # float32 weights: 60 roundings of 6e-8, and the filter's own sum


@given(rows, positions, seeds, st.floats(0.01, 1))
def test_min_p_never_takes_a_less_likely_token(row: Row, position: int, seed: int, p: float) -> None:
    token = sample(row, SamplingParams(temperature=3, min_p=p, seed=seed), position)
    probability = softmax(row, 3)
    assert probability[token] >= p * probability.max() * (1 - 1e-4)  # exp of a float32 that was divided by 3


@given(rows, positions, seeds)
def test_the_same_arguments_give_the_same_token_and_leave_the_row_alone(row: Row, position: int, seed: int) -> None:
    params = SamplingParams(temperature=1, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=seed)
    before = row.copy()
    first = sample(row, params, position, np.array([0, 1]))
    assert first == sample(row, params, position, np.array([0, 1]))
    assert np.array_equal(row, before)


@given(rows, positions, seeds)
def test_a_forbidden_token_is_never_chosen(row: Row, position: int, seed: int) -> None:
    row = row.copy()
    row[1:] = -np.inf
    assert sample(row, SamplingParams(temperature=100, seed=seed), position) == 0


def test_the_draws_follow_softmax() -> None:
    row = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)) * 2
    count = 20_000
    observed = np.bincount(draws(row, count, temperature=2, seed=7), minlength=5)
    expected = count * softmax(row, 2)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 23.5  # 4 degrees of freedom: 1 in 10,000; the seed is fixed, so it never flickers


def test_the_draws_follow_softmax_over_a_large_vocabulary() -> None:
    row = np.zeros(40_000, np.float32)  # more than one block of noise
    observed = np.bincount(draws(row, 3_000, temperature=1) // 10_000, minlength=4)
    chi_square = float(((observed - 750) ** 2 / 750).sum())
    assert chi_square < 21.1  # 3 degrees of freedom: 1 in 10,000


def test_draws_at_neighbouring_positions_and_seeds_are_independent() -> None:
    row = np.zeros(2, np.float32)
    for other in (
        draws(row, 4_000, temperature=1, seed=3)[1:],
        draws(row, 4_000, temperature=1, seed=4)[:-1],
        draws(row, 4_000, temperature=1, seed=3 + 2**32)[:-1],
    ):
        agree = np.mean(draws(row, 4_000, temperature=1, seed=3)[:-1] == other)
        assert abs(agree - 0.5) < 0.032  # four standard deviations of 4,000 coins


@settings(deadline=None)
@given(arrays(np.float32, 300, elements=st.floats(-5, 5, width=32)), seeds)
def test_the_noise_belongs_to_the_token_so_a_filter_never_changes_the_choice_it_keeps(row: Row, seed: int) -> None:
    free = sample(row, SamplingParams(temperature=1, seed=seed), 5)
    rank = int(np.count_nonzero(row >= row[free]))
    assert sample(row, SamplingParams(temperature=1, seed=seed, top_k=rank), 5) == free


def test_the_choice_at_a_seed_and_position_stays_what_it_was_in_the_first_version() -> None:
    chosen = draws(np.zeros(1000, np.float32), 5, temperature=1, seed=42)
    assert chosen.tolist() == [590, 126, 59, 550, 562]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    seen = np.array([0])
    assert sample(np.array([3, 2], np.float32), SamplingParams(repetition_penalty=2), 0, seen) == 1
    assert sample(np.array([-1, -1.5], np.float32), SamplingParams(repetition_penalty=2), 0, seen) == 1
    assert sample(np.array([3, 2], np.float32), SamplingParams(repetition_penalty=1.4), 0, seen) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    row = np.array([0, bad, 1], np.float32)
    with pytest.raises(SessionError, match="token 1"):
        sample(row, SamplingParams(temperature=temperature), 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", True),
    ],
)
def test_a_parameter_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=f"{name}: got"):
        SamplingParams(**{name: value})


def test_the_defaults_are_greedy() -> None:
    assert SamplingParams() == GREEDY and GREEDY.temperature == 0


def test_logits_that_the_temperature_makes_equal_keep_their_rank() -> None:
    row = np.array([0, 1e-40, -30, 30], np.float32)  # 0 and 1e-40 are one number once 30 is taken away
    chosen = draws(row, 200, temperature=100, top_k=2)
    assert set(chosen) == {1, 3}
    assert 0 not in draws(np.array([0, 1e-9], np.float32), 200, temperature=1, top_p=0.4)
