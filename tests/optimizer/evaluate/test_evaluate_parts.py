"""Portions and halves: whole groups and questions, nothing lost, nothing twice."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.evaluate.choice import Continuation
from optimizer.evaluate.items import Item
from optimizer.evaluate.parts import count_units, halves, topped_up, whole
from optimizer.evaluate.result import TaskResult, joined
from optimizer.gate import Scores

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=60)


def grouped(sizes: list[int]) -> list[Item]:
    return [Item((number, place), f"g{number}") for number, size in enumerate(sizes) for place in range(size)]


@given(SIZES)
def test_portions_hold_every_item_once_in_order_and_no_group_is_cut(sizes: list[int]) -> None:
    items = grouped(sizes)
    part = topped_up(items)
    assert part.items == items
    assert all(part.portions)
    places = [{item.group for item in portion} for portion in part.portions]
    assert sum(map(len, places)) == len(sizes)


@given(SIZES)
def test_portions_end_at_or_just_after_the_eighths(sizes: list[int]) -> None:
    items = grouped(sizes)
    ends = np.cumsum([count_units(portion) for portion in topped_up(items).portions])
    assert len(ends) <= 4
    assert ends[-1] == len(items)
    largest = max(sizes)
    for share, end in zip((8, 4, 2, 1), ends, strict=False):
        assert end >= min(len(items) // share, ends[-1]) or len(ends) < 4
        assert len(ends) < 4 or end < len(items) // share + largest


@given(SIZES)
def test_halves_share_no_group_and_lose_nothing(sizes: list[int]) -> None:
    items = grouped(sizes)
    chosen, rest = halves(items)
    assert sorted(chosen + rest, key=items.index) == items
    assert not {item.group for item in chosen} & {item.group for item in rest}
    assert len({item.group for item in chosen}) == round(len(sizes) / 4)


def test_halves_depend_on_names_alone() -> None:
    items = [Item((number,), str(number)) for number in range(100)]
    assert set(halves(items)[0]) == set(halves(items[::-1])[0])


def test_choices_of_a_question_are_one_unit_and_stay_together() -> None:
    items = [Continuation((1, choice), str(number), question=number) for number in range(40) for choice in range(4)]
    part = topped_up(items)
    assert [count_units(portion) for portion in part.portions] == [5, 5, 10, 20]
    assert (part.units, whole(items).units) == (40, 40)


def result(metric: str, point: float, **values: object) -> TaskResult:
    arrays = {name: np.asarray(array) for name, array in values.items()}
    count = len(next(iter(arrays.values())))
    return TaskResult({metric: Scores(metric, "hash", tuple(map(str, range(count))), arrays, point)})


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            [result("perplexity", 1, nll=[2.0], tokens=[4]), result("perplexity", 1, nll=[1.0], tokens=[2])],
            math.exp(0.5),
        ),
        ([result("flips", 0, flips=[1.0], tokens=[4]), result("flips", 0, flips=[2.0, 0], tokens=[4, 4])], 0.25),
        ([result("accuracy", 1, correct=[True]), result("accuracy", 0, correct=[False, False, True])], 0.5),
        ([result("cut", 1, cut=[True]), result("cut", 0, cut=[False])], 0.5),
        ([result("accuracy", math.nan, correct=[math.nan]), result("accuracy", 0, correct=[0.0])], math.nan),
    ],
)
def test_scores_of_parts_make_the_score_of_the_whole(parts: list[TaskResult], expected: float) -> None:
    (scores,) = joined(parts).scores.values()
    assert scores.point == pytest.approx(expected, nan_ok=True)
    assert len(scores.groups) == sum(len(next(iter(part.scores.values())).groups) for part in parts)


def test_a_score_that_only_some_parts_have_counts_as_none_in_the_others() -> None:
    first, second = result("accuracy", 1, correct=[True]), result("accuracy", 0, correct=[False])
    both = TaskResult({**second.scores, **result("cut", 1, cut=[True]).scores})
    assert joined([first, both]).scores["cut"].point == 0.5


def test_references_follow_each_other() -> None:
    first = TaskResult(result("flips", 0, flips=[0.0], tokens=[1]).scores, {"top": np.array([1, 2])})
    second = TaskResult(first.scores, {"top": np.array([3])})
    assert joined([first, second]).reference["top"].tolist() == [1, 2, 3]
