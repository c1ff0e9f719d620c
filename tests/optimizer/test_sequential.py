"""Several looks at a growing sample: their levels, and when to give up."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.statistics.sequential import Spending, looks


def test_looks_are_at_an_eighth_a_quarter_a_half_and_all() -> None:
    assert looks(3000) == (375, 750, 1500, 3000)
    assert looks(5) == (1, 2, 5)
    assert looks(1) == (1,)


def test_the_levels_of_four_looks_are_1_3_12_and_48_sixty_fourths() -> None:
    marks = (0, *looks(3000))
    levels = [Spending(3000, before).level(0.05, n) for before, n in itertools.pairwise(marks)]
    assert levels == pytest.approx([0.05 * part / 64 for part in (1, 3, 12, 48)], rel=1e-12)


@given(st.integers(1, 100_000), st.floats(1e-6, 0.49), st.data())
def test_whatever_the_looks_they_spend_at_most_alpha(most: int, alpha: float, data: st.DataObject) -> None:
    taken = sorted(data.draw(st.sets(st.integers(1, most), max_size=12)))
    spent = [Spending(most, before).level(alpha, n) for before, n in itertools.pairwise([0, *taken])]
    assert all(level > 0 for level in spent)
    assert math.fsum(spent) <= alpha * (1 + 1e-12)  # rounding
    assert Spending(most).level(alpha, most) == alpha


def test_looking_on_is_hopeless_between_what_can_still_pass_and_what_can_still_fail() -> None:
    # Half of the items, error 0.01 of them: with no loss to come the final bound is loss / 2 + 1.78 * 0.005; going on
    # like this the final loss has error 0.00707 and another 0.005 to come.
    spending, levels = Spending(1000), (0.05, 0.05)
    hopeless = [spending.is_hopeless(loss, 0.01, 0.01, 500, levels) for loss in (0.0, 0.002, 0.003, 0.013, 0.016)]
    assert hopeless == [False, False, True, True, False]


def test_nothing_is_hopeless_at_the_end_and_certainty_needs_no_chance() -> None:
    assert not Spending(1000).is_hopeless(0.01, 0.01, 0.01, 1000, (0.05, 0.05))
    assert not Spending(1000).is_hopeless(0.03, 0.0, 0.01, 500, (0.05, 0.05))
    assert not Spending(1000).is_hopeless(0.015, 0.0, 0.01, 500, (0.05, 0.05))
