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
    assert settled(fixed_s=0.005, token_s=0.001, limit_ms=60) == 52  # 5 ms + 52 x 1 ms, which is 95 %


def test_chunks_grow_again_where_most_of_the_cost_is_fixed() -> None:
    pace = Pace(60)
    pace.measured(4, 2000, 0.2)
    for _ in range(30):
        tokens = pace.tokens(2000)
        pace.measured(tokens, 2000, 0.03 + tokens * 0.003)
    assert pace.tokens(2000) == 8  # 54 ms; 4 tokens would take 42


def test_a_slow_machine_gets_the_smallest_and_a_fast_one_the_largest() -> None:
    assert settled(fixed_s=0.1, token_s=0.1, limit_ms=60) == LEAST_TOKENS
    assert settled(fixed_s=0, token_s=1e-6, limit_ms=60) == MOST_TOKENS


def test_a_rise_counts_at_once_and_a_fall_by_half() -> None:
    pace = Pace(60)
    pace.measured(16, 0, 16 * 0.001)
    assert pace.tokens(0) == 56  # 95 % of 60, to an even number
    pace.measured(56, 0, 56 * 0.002)
    assert pace.tokens(0) == 28
    pace.measured(28, 0, 28 * 0.001)
    assert pace.tokens(0) == 38


def test_tokens_after_many_others_are_learned_apart() -> None:
    pace = Pace(60)
    pace.measured(16, 0, 16 * 0.001)
    pace.measured(16, 4000, 16 * 0.003)
    assert (pace.tokens(0), pace.tokens(4000), pace.tokens(100_000)) == (56, 20, 20)


def test_chunks_of_another_size_say_nothing_unless_they_were_short_and_too_slow() -> None:
    pace = Pace(60)
    pace.measured(16, 0, 16 * 0.001)
    pace.measured(3, 0, 0.03)  # 10 ms per token, of which the weights are most
    pace.measured(128, 0, 128 * 0.0003)  # nobody waited
    assert pace.tokens(0) == 56
    pace.measured(3, 0, 0.09)
    assert pace.tokens(0) == LEAST_TOKENS


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(0, 10**6), st.floats(1e-6, 1e3)), max_size=20))
def test_sizes_are_even_and_in_range_whatever_was_measured(measured: list[tuple[int, int, float]]) -> None:
    pace = Pace(60)
    for tokens, past, seconds in measured:
        pace.measured(tokens, past, seconds)
        assert LEAST_TOKENS <= pace.tokens(past) <= MOST_TOKENS and pace.tokens(past) % 2 == 0
