"""Chunks of prompts, sized by what they were measured to cost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.pace import LEAST_TOKENS, MOST_TOKENS, Pace


def settled(fixed_s: float, token_s: float, limit_ms: float, past: int = 0) -> int:
    """The size that chunks come to on a machine of these costs."""
    pace = Pace(limit_ms)
    for _ in range(30):
        tokens = pace.tokens(past)
        pace.measured(tokens, past, fixed_s + tokens * token_s)
    return pace.tokens(past)


def test_the_first_chunk_is_the_smallest() -> None:
    assert Pace(60).tokens(0) == Pace(60).tokens(5000) == LEAST_TOKENS


def test_chunks_grow_to_the_limit_and_no_further() -> None:
    assert settled(fixed_s=0.004, token_s=0.001, limit_ms=60) == 52  # 4 ms + 52 x 1 ms, which is 93 %
    assert settled(fixed_s=0.03, token_s=0.003, limit_ms=60) == 8  # 54 ms: most of it is fixed


def test_the_second_chunk_is_near_the_limit() -> None:
    pace = Pace(60)
    pace.measured(4, 0, 0.004 + 4 * 0.001)
    assert pace.tokens(0) == 52


def test_a_slow_machine_gets_the_smallest_and_a_fast_one_the_largest() -> None:
    assert settled(fixed_s=0.1, token_s=0.1, limit_ms=60) == LEAST_TOKENS
    assert settled(fixed_s=0, token_s=1e-6, limit_ms=60) == MOST_TOKENS


def test_a_rise_counts_at_once_and_a_fall_by_half() -> None:
    pace = Pace(60)
    pace.measured(16, 0, 20 * 0.001)  # a millisecond for each of 16 tokens, and as much as 4 for all
    assert pace.tokens(0) == 52  # 55.2 less 4, to an even number
    pace.measured(52, 0, 56 * 0.002)
    assert pace.tokens(0) == 24
    pace.measured(24, 0, 28 * 0.001)
    assert pace.tokens(0) == 32


def test_tokens_after_many_others_are_learned_apart() -> None:
    pace = Pace(60)
    pace.measured(16, 0, 20 * 0.001)
    pace.measured(16, 4000, 20 * 0.003)
    assert [pace.tokens(past) for past in (0, 255, 3000, 3839, 3840, 100_000)] == [52, 52, 52, 52, 14, 14]


def test_the_nearest_that_is_known_of_fewer_tokens_before_counts_or_else_of_more() -> None:
    pace = Pace(60)
    pace.measured(16, 2000, 20 * 0.002)
    assert pace.tokens(0) == pace.tokens(5000) == 24
    pace.measured(16, 3000, 20 * 0.003)
    assert (pace.tokens(2500), pace.tokens(5000)) == (24, 14)


def test_large_chunks_tell_of_small_ones_and_the_rest_of_a_prompt_tells_nothing() -> None:
    pace = Pace(60)
    pace.measured(128, 0, 132 * 0.001)  # nobody waited
    assert pace.tokens(0) == 52
    pace.measured(3, 0, 0.09)
    assert pace.tokens(0) == 52


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(0, 10**6), st.floats(1e-6, 1e3)), max_size=20))
def test_sizes_are_even_and_in_range_whatever_was_measured(measured: list[tuple[int, int, float]]) -> None:
    pace = Pace(60)
    for tokens, past, seconds in measured:
        pace.measured(tokens, past, seconds)
        assert LEAST_TOKENS <= pace.tokens(past) <= MOST_TOKENS and pace.tokens(past) % 2 == 0
