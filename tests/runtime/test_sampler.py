"""The next token: filters keep what they promise, noise has the right distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from runtime.blocks import block_maxima, block_of, largest, member, members, place_in_block
from runtime.errors import SamplingError, SessionError
from runtime.gumbel import gumbel, noise_key
from runtime.sampler import GREEDY, Draw, SamplingParams, TokenCounts, choose, edited, sample

Row = NDArray[np.float32]
rows = arrays(np.float32, st.integers(2, 60), elements=st.floats(-30, 30, width=32))
positions = st.integers(0, 2**40)
seeds = st.integers(0, 2**64 - 1)


def softmax(row: Row, temperature: float = 1.0) -> NDArray[np.float64]:
    weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
    return np.asarray(weights / weights.sum())


def draws(row: Row, count: int, **params: Any) -> NDArray[np.int64]:
    """The tokens at positions 0 to count - 1, some hundred at once."""
    some, chosen = max(1, 400_000 // len(row)), list[Any]()
    for begin in range(0, count, some):
        positions = range(begin, min(begin + some, count))
        logits = np.broadcast_to(row, (len(positions), len(row)))
        chosen += choose(logits, [Draw(SamplingParams(**params), position) for position in positions])
    return np.array(chosen)


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
    counts = TokenCounts([0, 1])
    first = sample(row, params, position, counts)
    assert first == sample(row, params, position, counts)
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


def test_the_choice_at_a_seed_and_position_stays_what_it_was_in_version_0_1() -> None:
    chosen = draws(np.zeros(1000, np.float32), 5, temperature=1, seed=42)
    assert chosen.tolist() == [142, 984, 222, 768, 847]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    seen = TokenCounts([0])
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
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((3, 101),)),
        ("logit_bias", ((-1, 1),)),
        ("logit_bias", ((1, 1), (1, 2))),
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


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=50))
def test_an_id_is_the_member_of_its_block_at_its_place(some: list[int]) -> None:
    ids = np.array(some)
    assert np.array_equal(member(block_of(ids), place_in_block(ids)), ids)


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 511, 512, 513, 1000, 16383, 16384, 16385, 40_000]), seeds)
def test_block_maxima_are_those_of_the_members(vocabulary: int, seed: int) -> None:
    row = np.random.default_rng(seed).standard_normal(vocabulary).astype(np.float32)
    maxima = block_maxima(row[None])[0]
    ids = members(np.arange(len(maxima)))
    padded = np.append(row, np.float32(-np.inf))[np.minimum(ids, vocabulary)]
    assert np.array_equal(np.sort(ids[ids < vocabulary]), np.arange(vocabulary))
    assert np.array_equal(maxima, padded.max(axis=1))


@given(arrays(np.float32, st.integers(1, 1500), elements=st.floats(-3, 3, width=16)), st.integers(1, 40))
def test_the_largest_are_found_with_all_that_tie(row: Row, count: int) -> None:
    found = largest(row, block_maxima(row[None])[0], count)
    least = np.sort(row)[-min(count, len(row))]
    assert len(set(found.tolist())) == len(found)
    assert set(np.flatnonzero(row >= least)) <= set(found.tolist())


def kept(row: Row, params: SamplingParams) -> NDArray[np.int64]:
    """Ids that the filters keep, by sorting all in float64; what ties with the last is kept too."""
    order = np.argsort(-row, kind="stable")
    if params.top_k:
        order = order[row[order] >= row[order[min(params.top_k, len(row)) - 1]]]
    weights = np.exp((row[order].astype(np.float64) - row.max()) / params.temperature)
    if params.top_p < 1:
        masses = np.cumsum(weights) / weights.sum()
        assume(np.abs(masses - params.top_p).min() > 1e-5)  # nearer, sums of float32 may fall on the other side
        last = np.searchsorted(masses, params.top_p)
        order = order[row[order] >= row[order[last]]]
    return order[np.exp((row[order].astype(np.float64) - row.max()) / params.temperature) >= params.min_p]


@settings(deadline=None, max_examples=100)
@given(
    vocabulary=st.sampled_from([1, 3, 70, 600, 20_000]),
    spread=st.sampled_from([0.0, 0.5, 2.0, 5.0]),
    step=st.sampled_from([0.0, 0.5]),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 0, 1, 5, 60, 600]),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
        seed=seeds,
    ),
    position=positions,
)
def test_the_token_is_the_best_by_score_and_noise_of_those_that_a_full_sort_keeps(
    vocabulary: int, spread: float, step: float, params: SamplingParams, position: int
) -> None:
    row = (np.random.default_rng(params.seed).standard_normal(vocabulary) * spread).astype(np.float32)
    if step:  # many that tie
        row = np.round(row / step).astype(np.float32) * np.float32(step)
    ids = kept(row, params)
    scores = row[ids].astype(np.float64) / params.temperature + gumbel(noise_key(params.seed, position), ids)
    assert sample(row, params, position) == ids[scores.argmax()]


def test_the_draws_from_many_blocks_follow_softmax() -> None:
    row = (np.random.default_rng(5).standard_normal(20_000) * 2).astype(np.float32)
    bins = np.arange(20_000) // 16_384 * 4 + np.arange(20_000) % 4  # two spans of blocks, and neighbours in each
    expected = 4_000 * np.bincount(bins, weights=softmax(row, 0.9))
    observed = np.bincount(bins[draws(row, 4_000, temperature=0.9, seed=11)], minlength=8)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 29.9  # 7 degrees of freedom: 1 in 10,000; the seed is fixed, so it never flickers


def distance(values: NDArray[np.float64], distribution: NDArray[np.float64]) -> float:
    """Kolmogorov and Smirnov's, times the square root of how many there are: above 2.3 once in 20,000."""
    return float(np.abs(distribution - (np.arange(len(values)) + 0.5) / len(values)).max()) * len(values) ** 0.5


def test_the_noise_is_gumbel_of_single_ids_and_of_the_most_in_a_block() -> None:
    noise = np.stack([gumbel(noise_key(7, position), members(np.arange(512)).reshape(-1)) for position in range(40)])
    single = np.sort(noise[:, ::32].reshape(-1))
    assert distance(single, np.exp(-np.exp(-single))) < 2.3  # the seed is fixed
    blocks = noise.reshape(-1, 32)
    most = np.sort(blocks.max(axis=1))
    assert distance(most, np.exp(-32 * np.exp(-most))) < 2.3
    places = np.bincount(blocks.argmax(axis=1), minlength=32)
    chi_square = float(((places - 640) ** 2 / 640).sum())
    assert chi_square < 72  # 31 degrees of freedom: 1 in 20,000


def test_the_noise_of_an_id_does_not_depend_on_how_many_there_are() -> None:
    key = noise_key(3, 4)
    assert np.array_equal(gumbel(key, np.arange(40_000))[::7], gumbel(key, np.arange(0, 40_000, 7)))


params_of_any_kind = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_k=st.sampled_from([0, 1, 20]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.02]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([(), ((0, 5.0), (7, -100.0))]),
    seed=seeds,
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(params_of_any_kind, positions), min_size=1, max_size=6), st.sampled_from([60, 700]), seeds)
def test_a_row_of_a_batch_is_chosen_as_if_alone(
    asked: list[tuple[SamplingParams, int]], vocabulary: int, seed: int
) -> None:
    logits = (np.random.default_rng(seed).standard_normal((len(asked), vocabulary)) * 3).astype(np.float32)
    before = logits.copy()
    counts = TokenCounts([3, 5, 5])
    counts.add(5)
    draws = [Draw(params, position, counts, banned=(2,)) for params, position in asked]
    assert choose(logits, draws) == [choose(row[None], [draw])[0] for row, draw in zip(logits, draws, strict=True)]
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_numbers_says_so_and_changes_no_other(bad: float) -> None:
    logits = np.zeros((3, 50), np.float32)
    draws = [Draw(SamplingParams(temperature=1, seed=seed), 9) for seed in range(3)]
    want = choose(logits, draws)
    logits[1, 4] = bad
    first, second, third = choose(logits, draws)
    assert isinstance(second, SessionError) and "for token 4" in str(second)
    assert [first, third] == [want[0], want[2]]


def test_penalties_by_hand() -> None:
    row = np.array([4.0, -1.0, 3.0, 2.0], np.float32)
    counts = TokenCounts([0, 1])  # the prompt
    for token in (2, 2, 1):
        counts.add(token)
    assert dict(zip(counts.ids.tolist(), counts.generated.tolist(), strict=True)) == {0: 0, 1: 1, 2: 2}

    def logits(**params: Any) -> list[float]:
        return [round(float(x), 3) for x in edited(row[None], [Draw(SamplingParams(**params), 9, counts)])[0]]

    assert logits(repetition_penalty=2) == [2, -2, 1.5, 2]
    assert logits(presence_penalty=0.5) == [4, -1.5, 2.5, 2]
    assert logits(frequency_penalty=0.5) == [4, -1.5, 2, 2]
    assert logits(frequency_penalty=-1, logit_bias=((1, 5.0),)) == [4, 5, 5, 2]
    assert logits(repetition_penalty=2, presence_penalty=1, logit_bias=((0, -8.0),)) == [-8, -3, 0.5, 2]
    assert edited(row[None], [Draw(GREEDY, 9, counts, banned=(0, 2))])[0].tolist() == [-np.inf, -1, -np.inf, 2]


def test_counts_hold_more_ids_than_the_prompt_had() -> None:
    counts = TokenCounts([7])
    for token in range(500):
        counts.add(token)
    counts.add(7)
    assert counts.ids.tolist() == [7, *range(7), *range(8, 500)]
    assert counts.generated.tolist() == [2] + [1] * 499
