"""A gate that looks several times at a growing sample."""

import math
from dataclasses import replace

import pytest
from gate_scores import PERCENT, POINT, TWO_POINTS, labelled, perplexities, right_and_wrong
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.gate import Budget, Scores, Spending, judge, looks


def first(scores_: tuple[Scores, Scores], n: int) -> tuple[Scores, Scores]:
    source, candidate = (
        replace(each, groups=each.groups[:n], values={name: array[:n] for name, array in each.values.items()})
        for each in scores_
    )
    return source, candidate


def test_a_look_spends_what_it_adds_to_alpha_t_squared() -> None:
    verdict = judge(*right_and_wrong(1500, 0, 0), POINT, spending=Spending(3000, 750))
    assert verdict.alpha == pytest.approx(0.05 * (1 / 4 - 1 / 16), rel=1e-12)
    assert (verdict.outcome, verdict.looked_at) == ("pass", 1500)


def test_a_look_too_early_to_pass_is_skipped_and_the_next_one_gets_its_level() -> None:
    skipped = judge(*right_and_wrong(375, 0, 0), POINT, spending=Spending(3000))
    assert (skipped.outcome, skipped.looked_at) == ("inconclusive", 0)
    assert skipped.reason == "look skipped: 375 items cannot pass: 712 needed even with none lost"
    following = judge(*right_and_wrong(750, 0, 0), POINT, spending=Spending(3000, skipped.looked_at))
    assert (following.outcome, following.alpha) == ("pass", pytest.approx(0.05 / 16, rel=1e-12))


def test_a_skipped_look_does_not_fail_either_for_its_level_is_spent_later() -> None:
    verdict = judge(*right_and_wrong(375, 200, 0), POINT, spending=Spending(3000))
    assert (verdict.outcome, verdict.looked_at) == ("inconclusive", 0)
    verdict = judge(*right_and_wrong(750, 200, 0), POINT, spending=Spending(3000))
    assert (verdict.outcome, verdict.looked_at) == ("fail", 750)


def test_the_last_look_takes_place_even_where_it_cannot_pass() -> None:
    verdict = judge(*right_and_wrong(200, 0, 0), POINT, spending=Spending(200, 100))
    assert (verdict.outcome, verdict.looked_at) == ("inconclusive", 200)
    assert verdict.reason == "200 items cannot pass: 327 needed even with none lost"


def test_all_items_at_once_are_a_gate_without_top_up() -> None:
    sample = right_and_wrong(770, 12, 3)
    assert judge(*sample, TWO_POINTS, spending=Spending(770)) == judge(*sample, TWO_POINTS)


def test_the_fail_claim_spends_its_own_level() -> None:
    sample = right_and_wrong(1500, 30, 0)
    verdict = judge(*sample, POINT, fail_alpha=0.02, spending=Spending(3000))
    assert verdict.lower == judge(*sample, POINT, fail_alpha=0.02 / 4).lower


def test_an_undecided_look_says_how_far_it_is_and_plans_for_the_whole_level() -> None:
    # 1 point at 4 %: 2,561 items in one look, 1.09 times as many in several.
    verdict = judge(*right_and_wrong(750, 15, 15), POINT, spending=Spending(6000))
    assert (verdict.outcome, verdict.looked_at, verdict.is_hopeless) == ("inconclusive", 750, False)
    assert verdict.reason == "not decided by 750 of 6,000 items"
    assert verdict.items_needed == pytest.approx(2561 * 1.09, abs=3)


def test_a_loss_that_no_agreement_to_come_can_hide_nor_the_rest_show_is_hopeless() -> None:
    spending = Spending(2000, 500)
    at_margin = judge(*right_and_wrong(1000, 23, 1), TWO_POINTS, spending=spending)
    assert (at_margin.outcome, at_margin.is_hopeless) == ("inconclusive", False)  # the rest may lose nothing
    beyond = judge(*right_and_wrong(1000, 60, 36, wrong=50), TWO_POINTS, spending=spending)
    assert (beyond.outcome, beyond.is_hopeless) == ("inconclusive", True)
    assert beyond.reason == "not decided by 1,000 of 2,000 items, nor likely by all"
    assert not judge(*right_and_wrong(1000, 60, 36, wrong=50), TWO_POINTS).is_hopeless


@pytest.mark.parametrize(
    ("sample", "budget"), [(perplexities(0.0, count=400), PERCENT), (labelled(2000, 4, 25), Budget("f1", 0.03))]
)
def test_scores_without_an_exact_test_are_looked_at_after_half_and_all(
    sample: tuple[Scores, Scores], budget: Budget
) -> None:
    most = len(sample[0].groups)
    previous, outcomes = 0, []
    for n in looks(most)[:2]:
        verdict = judge(*first(sample, n), budget, spending=Spending(most))
        outcomes.append((verdict.outcome, verdict.looked_at))
    assert outcomes == [("inconclusive", 0)] * 2
    verdict = judge(*first(sample, most // 2), budget, spending=Spending(most, previous))
    assert (verdict.outcome, verdict.looked_at, verdict.alpha) == ("pass", most // 2, 0.0125)


def test_half_of_too_small_a_level_or_of_too_few_texts_is_no_look_for_a_mean() -> None:
    verdict = judge(*perplexities(0.0, count=200), PERCENT, alpha=0.0125, spending=Spending(400))
    assert (verdict.outcome, verdict.looked_at) == ("inconclusive", 0)
    verdict = judge(*perplexities(0.0, count=20), PERCENT, spending=Spending(40))
    assert (verdict.looked_at, verdict.reason) == (0, "look skipped: 20 effective documents; 30 needed")
    verdict = judge(*labelled(400, 4, 25), Budget("f1", 0.2), spending=Spending(800))
    assert (verdict.looked_at, verdict.reason) == (0, "look skipped: 400 items; 500 needed")


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 10), st.floats(0.03, 0.3), st.sets(st.integers(10, 90), min_size=1, max_size=4)
)
def test_looks_that_decide_agree_with_their_interval_and_spend_at_most_alpha(
    lost: int, gained: int, limit: float, marks: set[int]
) -> None:
    most, previous, spent = max(marks), 0, 0.0
    sample = right_and_wrong(most, min(lost, most), min(gained, most - min(lost, most)), wrong=0)
    for n in sorted(marks):
        verdict = judge(*first(sample, n), Budget("accuracy", limit), spending=Spending(most, previous))
        if verdict.looked_at == n:
            spent += verdict.alpha
            shown = {"pass": verdict.upper <= limit, "fail": verdict.lower > limit}
            assert verdict.outcome == next((name for name, is_shown in shown.items() if is_shown), "inconclusive")
        else:
            assert (verdict.outcome, verdict.looked_at, n < most) == ("inconclusive", previous, True)
        previous = verdict.looked_at
    assert previous == most
    assert spent <= 0.05 * (1 + 1e-12)  # rounding


def test_a_number_that_is_none_fails_at_any_look() -> None:
    source, candidate = perplexities(0.0, count=50)
    candidate.values["nll"][3] = math.nan
    assert judge(source, candidate, PERCENT, spending=Spending(400)).outcome == "fail"


def test_a_source_that_knows_nothing_yet_spends_nothing() -> None:
    sample = right_and_wrong(400, 0, 0, wrong=400)
    verdict = judge(*sample, Budget("accuracy", 0.04, relative=True), spending=Spending(800))
    assert (verdict.outcome, verdict.looked_at) == ("inconclusive", 0)


def test_a_look_outside_the_plan_is_refused() -> None:
    sample = right_and_wrong(400, 0, 0)
    with pytest.raises(ValueError, match="look at 400 items, expected more than 0 and at most 300"):
        judge(*sample, POINT, spending=Spending(300))
    with pytest.raises(ValueError, match="look at 400 items, expected more than 400 and at most 800"):
        judge(*sample, POINT, spending=Spending(800, 400))
    with pytest.raises(ValueError, match="look after 300 of 300 items"):
        Spending(300, 300)


def test_a_verdict_against_the_previous_stage_is_the_same_question() -> None:
    # Three stages, each worse than the one before: the step is within the budget, the sum is not.
    source, _ = right_and_wrong(2000, 0, 0)
    _, middle = right_and_wrong(2000, 12, 0)
    _, last = right_and_wrong(2000, 24, 0)
    assert judge(middle, last, POINT).difference == pytest.approx(12 / 2000)
    assert (judge(middle, last, POINT).outcome, judge(source, last, POINT).outcome) == ("pass", "inconclusive")
