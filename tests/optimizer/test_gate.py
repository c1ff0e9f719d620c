"""The gate's verdicts: what passes, what fails, what cannot be said, and what is refused."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gate_scores import PERCENT, POINT, TWO_POINTS, flips, labelled, perplexities, right_and_wrong, scores, wiggle
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.evidence import Evidence, Question
from optimizer.gate import Budget, Scores, _decide, judge, noise, require_judgeable
from optimizer.statistics.macro_f1 import Labels, macro_f1
from optimizer.statistics.records import Score
from optimizer.statistics.spearman import spearman

# Accuracy


def test_zero_flips_pass_a_point_at_299_items_with_the_closed_form_bound() -> None:
    verdict = judge(*right_and_wrong(299, 0, 0), POINT)
    assert verdict.outcome == "pass"
    assert verdict.upper == pytest.approx(1 - 0.05 ** (1 / 299), abs=1e-12)
    assert (verdict.difference, verdict.items_needed, verdict.mcnemar_p) == (0.0, None, 1.0)


def test_zero_flips_cannot_pass_below_the_floor_and_the_reason_says_so() -> None:
    verdict = judge(*right_and_wrong(200, 0, 0), POINT)
    assert verdict.outcome == "inconclusive"
    assert verdict.reason == "200 items cannot pass: 299 needed even with none lost"
    assert verdict.items_needed == 299


def test_a_clear_loss_fails_even_below_the_floor() -> None:
    verdict = judge(*right_and_wrong(100, 30, 0), POINT)
    assert (verdict.outcome, verdict.difference) == ("fail", 0.3)
    assert verdict.lower > 0.2


@pytest.mark.parametrize(("lost", "outcome"), [(4, "pass"), (12, "inconclusive"), (40, "fail")])
def test_more_losses_turn_a_pass_into_inconclusive_into_a_fail(lost: int, outcome: str) -> None:
    verdict = judge(*right_and_wrong(770, lost, 0), TWO_POINTS)
    assert verdict.outcome == outcome
    assert verdict.lower <= verdict.difference <= verdict.upper


def test_gains_do_not_hide_behind_losses_in_the_discordance() -> None:
    # The same net loss with more disagreement is less certain.
    calm, restless = (judge(*right_and_wrong(1000, lost, lost, wrong=100), TWO_POINTS) for lost in (5, 80))
    assert calm.outcome == "pass"
    assert restless.outcome == "inconclusive"


def test_an_undecided_verdict_says_how_many_items_would_decide() -> None:
    # Planning table: 1 point at a discordance of 4 % needs 2,561 items.
    verdict = judge(*right_and_wrong(300, 6, 6), POINT)
    assert verdict.outcome == "inconclusive"
    assert verdict.items_needed == pytest.approx(2561, abs=2)


def test_items_needed_follow_the_loss_seen_once_the_plan_is_exceeded() -> None:
    verdict = judge(*right_and_wrong(3000, 60, 45, wrong=60), POINT)
    assert verdict.outcome == "inconclusive"
    # Planned for no true loss: 2,250. Seen: 0.5 points lost of 1, so ((1.645 + 0.842) s / 0.5 points)^2.
    assert verdict.items_needed == pytest.approx(2.486475**2 * (0.035 - 0.005**2) / 0.005**2, abs=2)


def test_mcnemar_is_reported_beside_the_verdict_and_does_not_decide_it() -> None:
    verdict = judge(*right_and_wrong(3000, 12, 0), POINT)
    assert verdict.outcome == "pass"
    assert verdict.mcnemar_p == pytest.approx(2 * 0.5**12)


def test_a_relative_budget_is_a_share_of_the_sources_accuracy() -> None:
    source, candidate = right_and_wrong(400, 1, 0, wrong=200)
    verdict = judge(source, candidate, Budget("accuracy", 0.04, relative=True))
    assert verdict.limit == pytest.approx(0.04 * 0.5)
    assert verdict == judge(source, candidate, Budget("accuracy", verdict.limit))


def test_a_relative_budget_of_a_source_that_knows_nothing_decides_nothing() -> None:
    verdict = judge(*right_and_wrong(400, 0, 0, wrong=400), Budget("accuracy", 0.04, relative=True))
    assert verdict.outcome == "inconclusive"
    assert "a share of it allows nothing" in verdict.reason


def test_items_of_one_passage_count_for_less() -> None:
    passages = tuple(str(item // 10) for item in range(1000))
    alone = judge(*right_and_wrong(1000, 8, 0), TWO_POINTS)
    grouped = judge(*right_and_wrong(1000, 8, 0, passages), TWO_POINTS)
    assert (alone.outcome, grouped.outcome) == ("pass", "inconclusive")
    assert alone.n_effective == 1000
    assert grouped.n_effective <= 100  # all losses in one passage: each passage is one item
    assert grouped.mcnemar_p is None


def test_fewer_than_thirty_passages_carry_no_verdict() -> None:
    passages = tuple(str(item // 50) for item in range(1000))
    verdict = judge(*right_and_wrong(1000, 0, 0, passages), TWO_POINTS)
    assert verdict.outcome == "inconclusive"
    assert verdict.reason == "20 effective groups; 30 needed"
    assert verdict.items_needed is not None
    assert verdict.items_needed >= 1500


def test_a_source_near_chance_is_flagged_when_the_label_share_is_known() -> None:
    source, candidate = right_and_wrong(600, 0, 0, wrong=280)
    assert "near chance" in judge(source, candidate, POINT, chance=0.5).flags
    assert judge(source, candidate, POINT, chance=0.2).flags == ()
    assert judge(source, candidate, POINT).flags == ()


# Perplexity and KL


@pytest.mark.parametrize(("increase", "outcome"), [(0.001, "pass"), (0.0097, "inconclusive"), (0.03, "fail")])
def test_perplexity_is_judged_as_a_relative_increase(increase: float, outcome: str) -> None:
    verdict = judge(*perplexities(increase + wiggle(200, 0.02)), PERCENT)
    assert verdict.outcome == outcome
    assert verdict.difference == pytest.approx(verdict.candidate / verdict.source - 1, rel=1e-9)
    assert verdict.lower < verdict.difference < verdict.upper
    assert verdict.flags == ()


def test_the_perplexity_bound_is_about_1_65_standard_errors_away() -> None:
    verdict = judge(*perplexities(wiggle(200, 0.02)), PERCENT)
    # Equal lengths, symmetric: t with 199 degrees of freedom; 1999 resamples wobble by about 3 %.
    assert verdict.upper == pytest.approx(1.65 * 0.02 / math.sqrt(200), rel=0.08)


def test_equal_values_pass_at_once_with_a_difference_of_zero() -> None:
    verdict = judge(*perplexities(0.0), PERCENT)
    assert (verdict.outcome, verdict.difference, verdict.lower, verdict.upper) == ("pass", 0.0, 0.0, 0.0)


@pytest.mark.parametrize("increase", [0.0, 3.0])
def test_seventeen_documents_carry_no_verdict(increase: float) -> None:
    verdict = judge(*perplexities(increase, count=17), PERCENT)
    assert verdict.outcome == "inconclusive"
    assert verdict.reason == "17 effective documents; 30 needed"
    assert verdict.items_needed == 30


def test_documents_of_very_unequal_length_are_fewer_than_they_look() -> None:
    verdict = judge(*perplexities(0.0, count=100, tokens=np.r_[np.full(5, 100_000), np.full(95, 10)]), PERCENT)
    assert verdict.outcome == "inconclusive"
    assert verdict.reason.startswith("5 effective documents; 30 needed")


def test_items_of_one_document_are_summed_before_anything_else() -> None:
    documents = tuple(str(item // 10) for item in range(200))
    verdict = judge(*perplexities(0.0, groups=documents), PERCENT)
    assert verdict.n_effective == pytest.approx(20)
    assert verdict.reason == "20 effective documents; 30 needed"


def test_thirty_to_a_hundred_documents_get_a_verdict_with_a_warning() -> None:
    verdict = judge(*perplexities(0.0, count=45), PERCENT)
    assert (verdict.outcome, verdict.flags) == ("pass", ("few groups",))
    assert verdict.reason == "shown to be within the budget; 45 effective documents (100 advised)"


def test_damage_in_few_documents_is_flagged() -> None:
    verdict = judge(*perplexities(np.where(np.arange(150) < 3, 0.2, 0.0), count=150), PERCENT)
    assert "skewed" in verdict.flags


def test_an_undecided_perplexity_says_how_many_documents_would_decide() -> None:
    verdict = judge(*perplexities(wiggle(100, 0.08), count=100), PERCENT)
    # ((1.645 + 0.842) s / ln 1.01)^2, s with G / (G - 1).
    expected = (2.486475 * 0.08 / math.log(1.01)) ** 2 * 100 / 99
    assert verdict.items_needed == pytest.approx(expected, abs=2)


def test_a_document_without_scored_tokens_changes_nothing() -> None:
    full = judge(*perplexities(wiggle(200, 0.02)), PERCENT)
    padded = [
        replace(one, groups=(*one.groups, "empty"), values={k: np.r_[v, 0] for k, v in one.values.items()})
        for one in perplexities(wiggle(200, 0.02))
    ]
    verdict = judge(padded[0], padded[1], PERCENT)
    assert (verdict.lower, verdict.upper) == pytest.approx((full.lower, full.upper), rel=0.05)  # other resamples


def test_an_overflowing_perplexity_fails_without_a_warning_of_numpys() -> None:
    source, candidate = perplexities(0.0)
    candidate.values["nll"][:] *= 1e4
    verdict = judge(source, replace(candidate, point=1e308), PERCENT)
    assert (verdict.outcome, verdict.lower) == ("fail", math.inf)


@pytest.mark.parametrize(("nats", "outcome"), [(0.01, "pass"), (0.0198, "inconclusive"), (0.05, "fail")])
def test_kl_is_judged_in_nats_per_token(nats: float, outcome: str) -> None:
    tokens = np.full(150, 200)
    source = scores("kl", 0.0, kl=np.zeros(150), tokens=tokens)
    candidate = scores("kl", nats, kl=tokens * (nats + wiggle(150, 0.004)), tokens=tokens)
    verdict = judge(source, candidate, Budget("kl", 0.02))
    assert (verdict.outcome, verdict.difference) == (outcome, pytest.approx(nats))


# Flips


def test_flips_of_single_positions_get_clopper_pearson() -> None:
    verdict = judge(*flips(np.arange(300) < 3, tokens=1), Budget("flips", 0.03))
    # Upper 95 % bound of 3 of 300 by tables of the beta distribution.
    assert (verdict.outcome, verdict.upper) == ("pass", pytest.approx(0.025654, abs=2e-5))


def test_flips_of_single_positions_need_no_thirty_documents() -> None:
    assert judge(*flips(np.zeros(20, int), tokens=1), Budget("flips", 0.3)).outcome == "pass"


@pytest.mark.parametrize(("each", "outcome"), [(2, "pass"), (9, "inconclusive"), (30, "fail")])
def test_flips_of_documents_are_judged_by_document(each: int, outcome: str) -> None:
    verdict = judge(*flips(np.arange(120) % 2 * 2 * each), Budget("flips", 0.047))
    assert verdict.outcome == outcome
    assert verdict.n_effective < 120 * 200


def test_flips_in_a_few_documents_count_each_document_once() -> None:
    verdict = judge(*flips(np.where(np.arange(240) < 9, 1, 0)), Budget("flips", 0.01))
    assert verdict.n_effective == pytest.approx(240)
    assert verdict.reason.startswith("240 effective positions cannot pass: 299 needed even with none changed")


def test_flips_in_seventeen_documents_carry_no_verdict() -> None:
    verdict = judge(*flips(np.full(17, 100)), Budget("flips", 0.01))
    assert (verdict.outcome, verdict.reason) == ("inconclusive", "17 effective documents; 30 needed")


# Macro-F1


@pytest.mark.parametrize(("spoilt", "outcome"), [(25, "pass"), (70, "inconclusive"), (200, "fail")])
def test_macro_f1_is_judged_on_the_whole_record(spoilt: int, outcome: str) -> None:
    verdict = judge(*labelled(2000, 7, spoilt), Budget("f1", 0.03))
    assert verdict.outcome == outcome
    assert verdict.difference == pytest.approx(spoilt / 2000, rel=0.05)  # balanced: nearly accuracy
    assert verdict.flags == ()


def test_an_unchanged_classifier_passes_macro_f1_from_about_the_floor_of_accuracy() -> None:
    verdict = judge(*labelled(600, 4, 0), Budget("f1", 0.01))
    assert (verdict.outcome, verdict.flags) == ("pass", ("few changes",))
    assert verdict.upper == pytest.approx(1 - 0.05 ** (1 / 600), rel=0.02)  # an influence is not quite 1 / n
    assert judge(*labelled(250, 4, 0), Budget("f1", 0.01)).outcome == "inconclusive"


def test_few_changed_answers_are_bounded_as_if_each_did_its_worst() -> None:
    verdict = judge(*labelled(1000, 4, 12), Budget("f1", 0.015))
    assert verdict.outcome == "inconclusive"
    assert "only 12 answers changed, 20 needed" in verdict.reason
    assert judge(*labelled(1000, 4, 12), Budget("f1", 0.025)).outcome == "pass"


def test_macro_f1_needs_five_hundred_items() -> None:
    verdict = judge(*labelled(490, 4, 25), Budget("f1", 0.5))
    assert verdict.outcome == "inconclusive"
    assert verdict.reason == "490 items; 500 needed for macro-F1: gate accuracy instead"
    assert judge(*labelled(500, 4, 25), Budget("f1", 0.5)).outcome == "pass"


def test_macro_f1_needs_five_items_of_each_class() -> None:
    source, candidate = labelled(800, 4, 30)
    rare = np.where(np.arange(800) < 4, 9, source.values["reference"])
    source, candidate = (replace(one, values={**one.values, "reference": rare}) for one in (source, candidate))
    verdict = judge(source, candidate, Budget("f1", 0.5))
    assert verdict.reason.startswith("a class has 4 reference items; 5 needed for macro-F1")
    assert (verdict.outcome, verdict.items_needed) == ("inconclusive", 1000)


def ordered(n: int, noise: float, gold: bool = True) -> tuple[Scores, Scores]:
    """A source that follows the scores of people, or is followed itself, and a candidate with `noise` added."""
    random = np.random.default_rng(3)
    before = random.normal(size=n)
    after = before + noise * random.normal(size=n)
    reference = before + 0.6 * random.normal(size=n) if gold else before
    return tuple(  # type: ignore[return-value]
        scores("spearman", spearman(reference, answer), reference=reference, answer=answer)
        for answer in (before, after)
    )


@pytest.mark.parametrize(
    ("gold", "noise", "outcome"),
    [
        (True, 0.02, "pass"),
        (True, 0.12, "inconclusive"),
        (True, 0.6, "fail"),
        (False, 0.02, "pass"),
        (False, 0.15, "inconclusive"),
        (False, 0.6, "fail"),
    ],
)
def test_a_lost_order_of_similarities_is_judged_on_the_whole_record(gold: bool, noise: float, outcome: str) -> None:
    verdict = judge(*ordered(1000, noise, gold), Budget("spearman", 0.011))
    assert verdict.outcome == outcome
    assert verdict.lower < verdict.difference < verdict.upper
    assert (verdict.items_needed is None) == (outcome != "inconclusive")


def test_a_rank_correlation_needs_five_hundred_items() -> None:
    verdict = judge(*ordered(499, 0.02), Budget("spearman", 0.05))
    assert (verdict.outcome, verdict.reason) == ("inconclusive", "499 items; 500 needed for a rank correlation")
    assert judge(*ordered(500, 0.02), Budget("spearman", 0.05)).outcome == "pass"


def test_an_unchanged_order_passes_only_where_so_many_items_could_not_hide_the_loss() -> None:
    # At most 3 of n items changed (5 %), each at most about 9 / n.
    verdict = judge(*ordered(3000, 0.0), Budget("spearman", 0.01))
    assert (verdict.outcome, verdict.difference, verdict.flags) == ("pass", 0.0, ("few changes",))
    assert math.isnan(verdict.spread)  # a bound of the worst case is no deviation to plan with
    verdict = judge(*ordered(1000, 0.0), Budget("spearman", 0.01))
    assert verdict.outcome == "inconclusive"
    assert judge(*ordered(verdict.items_needed or 0, 0.0), Budget("spearman", 0.01)).outcome == "pass"


def test_a_candidate_that_orders_nothing_fails() -> None:
    source, candidate = ordered(1000, 0.1)
    constant = replace(candidate, values={**candidate.values, "answer": np.zeros(1000)}, point=math.nan)
    verdict = judge(source, constant, Budget("spearman", 0.5))
    assert (verdict.outcome, verdict.flags) == ("fail", ("not a number",))


def test_two_items_in_the_wrong_order_are_no_crash() -> None:
    reversed_ = scores("spearman", -1.0, reference=np.array([0.0, 1.0]), answer=np.array([1.0, 0.0]))
    assert judge(reversed_, reversed_, Budget("spearman", 0.01)).outcome == "inconclusive"


def test_a_source_that_orders_nothing_is_flagged() -> None:
    source, candidate = ordered(1000, 0.1)
    shuffled = np.random.default_rng(1).permutation(source.values["reference"])
    source, candidate = (
        replace(each, values={**each.values, "reference": shuffled}, point=spearman(shuffled, each.values["answer"]))
        for each in (source, candidate)
    )
    assert "near chance" in judge(source, candidate, Budget("spearman", 0.05)).flags


def test_a_relative_f1_budget_is_a_share_of_the_sources_f1() -> None:
    source, candidate = labelled(2000, 7, 25)
    verdict = judge(replace(source, point=0.5), candidate, Budget("f1", 0.06, relative=True))
    assert verdict.limit == pytest.approx(0.03)


# Scores of the user's


def share_right(answers: Labels, references: Labels) -> float:
    return float(np.mean(answers == references))


def share_wrong(answers: Labels, references: Labels) -> float:
    return 1 - share_right(answers, references)


def kappa(answers: Labels, references: Labels) -> float:
    chance = sum(np.mean(answers == label) * np.mean(references == label) for label in np.unique(references))
    return float((share_right(answers, references) - chance) / (1 - chance))


def named(sample: tuple[Scores, Scores], compute: Score) -> tuple[Scores, Scores]:
    source, candidate = (
        replace(each, metric="mine", point=compute(each.values["answer"], each.values["reference"])) for each in sample
    )
    return source, candidate


def mine(compute: Score, limit: float = 0.03) -> Budget:
    return Budget("mine", limit, compute=compute)


@pytest.mark.parametrize("compute", [share_right, share_wrong])
@pytest.mark.parametrize(("spoilt", "outcome"), [(25, "pass"), (60, "inconclusive"), (120, "fail")])
def test_any_score_is_judged_on_the_whole_record_whether_more_or_less_is_better(
    compute: Score, spoilt: int, outcome: str
) -> None:
    verdict = judge(*named(labelled(2000, 4, spoilt), compute), mine(compute))
    assert (verdict.outcome, verdict.difference) == (outcome, pytest.approx(spoilt / 2000))
    if outcome == "inconclusive":
        assert verdict.items_needed is not None
        # A mean of its items: the interval of accuracy, up to the noise of 1999 resamples.
    exact = judge(*right_and_wrong(2000, spoilt, 0), Budget("accuracy", 0.03))
    assert (verdict.lower, verdict.upper) == pytest.approx((exact.lower, exact.upper), abs=0.0015)


def test_a_score_of_the_users_agrees_with_the_shipped_one() -> None:
    sample = labelled(2000, 7, 70)
    compute = lambda answers, references: macro_f1(references, answers)  # noqa: E731
    found, shipped = judge(*named(sample, compute), mine(compute)), judge(*sample, Budget("f1", 0.03))
    assert (found.difference, found.outcome) == (pytest.approx(shipped.difference), shipped.outcome)
    assert (found.lower, found.upper) == pytest.approx((shipped.lower, shipped.upper), abs=1e-4)


def test_items_of_one_group_are_resampled_together() -> None:
    source, candidate = named(labelled(1000, 4, 50), share_right)
    paragraphs = tuple(str(item // 10) for item in range(1000))
    source, candidate = (replace(each, groups=paragraphs) for each in (source, candidate))
    clustered = np.where(np.arange(1000) // 10 % 10 == 0, 0, source.values["reference"])  # whole paragraphs go wrong
    worse = replace(candidate, values={**candidate.values, "answer": clustered})
    alone = replace(worse, groups=source.groups[:0] + tuple(map(str, range(1000))))
    together = judge(source, worse, mine(share_right))
    apart = judge(replace(source, groups=alone.groups), alone, mine(share_right))
    assert together.upper - together.difference > 1.5 * (apart.upper - apart.difference)
    assert (together.n_effective, apart.n_effective) == (100, 1000)


def test_an_unchanged_record_passes_where_so_few_changes_could_not_hide_the_loss() -> None:
    for compute in (share_right, share_wrong):
        verdict = judge(*named(labelled(600, 4, 0), compute), mine(compute, 0.01))
        assert (verdict.outcome, verdict.flags) == ("pass", ("few changes",))
        assert verdict.upper == pytest.approx(math.ceil(600 * (1 - 0.05 ** (1 / 600))) / 600)  # 3 of 600
        assert judge(*named(labelled(290, 4, 0), compute), mine(compute, 0.01)).outcome == "inconclusive"


def test_few_changes_of_a_score_of_the_users_cost_what_the_worst_would() -> None:
    found = judge(*named(labelled(1000, 4, 12), kappa), mine(kappa))
    shipped = judge(*labelled(1000, 4, 12), Budget("f1", 0.03))
    assert found.outcome == "pass"
    assert found.upper == pytest.approx(4 / 3 * shipped.upper, rel=0.1)  # kappa counts an error of 4 classes 4/3


def test_a_score_of_the_users_needs_five_hundred_items() -> None:
    verdict = judge(*named(labelled(490, 4, 25), kappa), mine(kappa, 0.5))
    assert (verdict.outcome, verdict.reason) == (
        "inconclusive",
        "490 items; 500 needed for mine: gate accuracy instead",
    )


def test_a_score_that_right_answers_do_not_lead_decides_nothing() -> None:
    share_of_zero = lambda answers, references: float(np.mean(answers == 0))  # noqa: E731
    source, candidate = labelled(600, 4, 0)
    more, fewer = np.zeros(600, int), np.ones(600, int)
    source, candidate = (
        replace(each, values={**each.values, "answer": answers})
        for each, answers in ((source, more), (candidate, fewer))
    )
    verdict = judge(*named((source, candidate), share_of_zero), mine(share_of_zero, 0.5))
    assert verdict.outcome == "inconclusive"
    assert "nothing says which is better" in verdict.reason


def test_a_score_that_is_no_number_on_some_resample_never_passes() -> None:
    fragile = lambda answers, references: math.nan if np.mean(references == 0) > 0.27 else 1.0  # noqa: E731
    verdict = judge(*named(labelled(1000, 4, 30), fragile), mine(fragile, 0.5))
    assert verdict.outcome != "pass"
    broken = lambda answers, references: (  # noqa: E731
        math.nan if np.mean(references == 0) > 0.27 else share_right(answers, references)
    )
    verdict = judge(*named(labelled(1000, 4, 30), broken), mine(broken, 0.5))
    assert (verdict.outcome, verdict.flags) == ("fail", ("not a number",))


def test_a_known_metric_takes_no_other_score_and_an_unknown_one_needs_one() -> None:
    with pytest.raises(ValueError, match="'f1' is the name of a metric that is known; call yours differently"):
        Budget("f1", 0.01, compute=share_right)
    with pytest.raises(ValueError, match="unknown metric, got 'mine'"):
        Budget("mine", 0.01)


# Levels


def test_pass_and_fail_claims_have_their_own_levels() -> None:
    sample = right_and_wrong(770, 22, 0)
    strict = judge(*sample, TWO_POINTS, fail_alpha=0.001)
    usual = judge(*sample, TWO_POINTS)
    assert strict.upper == usual.upper
    assert strict.lower < usual.lower


def test_a_stricter_level_turns_a_pass_into_inconclusive() -> None:
    sample = right_and_wrong(330, 0, 0)
    assert judge(*sample, POINT, alpha=0.05).outcome == "pass"
    assert judge(*sample, POINT, alpha=0.01).outcome == "inconclusive"


@pytest.mark.parametrize("levels", [{"alpha": 0.0}, {"alpha": 0.5}, {"fail_alpha": -0.1}, {"alpha": math.nan}])
def test_a_level_outside_zero_to_one_half_is_refused(levels: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="level out of range"):
        judge(*right_and_wrong(300, 0, 0), POINT, **levels)


def test_the_same_scores_get_the_same_verdict() -> None:
    sample = perplexities(0.002 + wiggle(60, 0.03), count=60)
    assert judge(*sample, PERCENT) == judge(*sample, PERCENT)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["accuracy", "perplexity", "flips", "f1"]), st.integers(0, 60), st.floats(0.002, 0.4))
def test_outcome_and_interval_never_disagree(metric: str, damage: int, limit: float) -> None:
    samples = {
        "accuracy": lambda: right_and_wrong(150, damage, 5),
        "perplexity": lambda: perplexities(damage / 200 + wiggle(50, 0.03), count=50),
        "flips": lambda: flips(np.arange(50) % 7 * damage // 3),
        "f1": lambda: labelled(500, 4, damage),
    }
    verdict = judge(*samples[metric](), Budget(metric, limit))
    shown = {"pass": verdict.upper <= limit, "fail": verdict.lower > limit}
    assert not all(shown.values())
    assert verdict.outcome == next((outcome for outcome, is_shown in shown.items() if is_shown), "inconclusive")
    assert (verdict.items_needed is None) == (verdict.outcome != "inconclusive")


# Guards


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_fails_and_names_its_items(bad: float) -> None:
    source, candidate = perplexities(-1.0)
    candidate.values["nll"][[4, 17]] = bad
    verdict = judge(source, candidate, PERCENT)
    assert (verdict.outcome, verdict.flags) == ("fail", ("not a number",))
    assert verdict.reason == "the candidate's nll is not finite in 2 of 200 items: 4, 17"
    assert math.isnan(verdict.upper)


def test_a_broken_source_fails_too_and_is_named() -> None:
    source, candidate = perplexities(0.0)
    source.values["nll"][:] = math.nan
    verdict = judge(source, candidate, PERCENT)
    assert verdict.outcome == "fail"
    assert verdict.reason == "the source's nll is not finite in 200 of 200 items: 0, 1, 2, 3, 4, ..."


def test_a_score_that_is_no_number_fails_although_its_items_are() -> None:
    source, candidate = right_and_wrong(300, 0, 0)
    verdict = judge(source, replace(candidate, point=math.nan), POINT)
    assert (verdict.outcome, verdict.reason) == ("fail", "the candidate's accuracy is nan")


@pytest.mark.parametrize(("lower", "upper"), [(math.nan, 0.0), (0.0, math.nan), (math.nan, math.nan)])
def test_a_bound_that_is_no_number_never_passes(lower: float, upper: float) -> None:
    question = Question(*right_and_wrong(300, 0, 0), 0.01, 0.05, 0.05)
    assert _decide(question, Evidence(0.0, lower, upper, 300, None))[0] == "fail"


def test_a_gain_beyond_the_budget_is_flagged_and_passes_all_the_same() -> None:
    verdict = judge(*right_and_wrong(600, 0, 40, wrong=60), POINT)
    assert (verdict.outcome, verdict.flags) == ("pass", ("anomalous",))
    assert "check that both models answered the same task" in verdict.reason


def test_a_small_or_uncertain_gain_is_not_anomalous() -> None:
    assert judge(*right_and_wrong(600, 0, 5), POINT).flags == ()
    assert judge(*right_and_wrong(600, 12, 20), POINT).flags == ()


def test_a_perplexity_that_falls_beyond_the_budget_is_flagged() -> None:
    assert "anomalous" in judge(*perplexities(-0.1 + wiggle(200, 0.02)), PERCENT).flags


def test_more_answers_cut_short_than_the_sources_are_flagged() -> None:
    source, candidate = right_and_wrong(600, 3, 0)
    cut = np.arange(600) < 3
    source = replace(source, values={**source.values, "truncated": np.zeros(600, bool)})
    candidate = replace(candidate, values={**candidate.values, "truncated": cut})
    verdict = judge(source, candidate, TWO_POINTS)
    assert (verdict.outcome, verdict.flags) == ("pass", ("truncated",))
    assert "3 answers were cut at max_tokens, 0 of the source's" in verdict.reason
    assert judge(candidate, source, TWO_POINTS).flags == ()


def test_a_source_that_answers_like_itself_has_no_noise() -> None:
    source, other = right_and_wrong(400, 3, 1)
    assert noise(source, source) == 0.0
    assert noise(source, other) == 0.01
    assert "noisy" not in judge(source, other, TWO_POINTS).flags


def test_noise_is_flagged_with_its_share() -> None:
    verdict = judge(*right_and_wrong(400, 3, 1), TWO_POINTS, self_noise=0.005)
    assert verdict.flags == ("noisy",)
    assert "the source itself scores 0.5 % of the items differently when asked again" in verdict.reason


def test_rounding_and_numbers_that_are_none_are_no_noise() -> None:
    source, _ = perplexities(0.0, count=50)
    again, other = source.values["nll"] * (1 + 1e-9), source.values["nll"].copy()
    other[:5] *= 1.001
    broken = replace(source, values={**source.values, "nll": np.full(50, math.nan)})
    assert noise(source, replace(source, values={**source.values, "nll": again})) == 0.0
    assert noise(source, replace(source, values={**source.values, "nll": other})) == 0.1
    assert noise(broken, broken) == 0.0
    assert noise(*flips(np.arange(40) % 4 == 0)) == 0.25


def test_different_items_are_refused() -> None:
    source, candidate = right_and_wrong(300, 0, 0)
    with pytest.raises(ValueError, match="different items, got items other from the candidate, expected sha"):
        judge(source, replace(candidate, items="other"), POINT)


def test_missing_items_are_refused() -> None:
    source, _ = right_and_wrong(300, 0, 0)
    _, candidate = right_and_wrong(299, 0, 0)
    with pytest.raises(ValueError, match="missing or added, got 299 items from the candidate, expected 300"):
        judge(source, candidate, POINT)


def test_no_items_are_refused() -> None:
    nothing = Scores("accuracy", "sha", (), {"correct": np.zeros(0, bool)}, 0.0)
    with pytest.raises(ValueError, match="no items"):
        judge(nothing, nothing, POINT)


def test_different_groups_are_refused() -> None:
    source, candidate = right_and_wrong(300, 0, 0)
    with pytest.raises(ValueError, match="groups of the items differ"):
        judge(source, replace(candidate, groups=("one",) * 300), POINT)


def test_a_metric_other_than_the_budgets_is_refused() -> None:
    with pytest.raises(ValueError, match="metrics differ, got source 'accuracy', candidate 'accuracy', budget 'f1'"):
        judge(*right_and_wrong(300, 0, 0), Budget("f1", 0.01))


def test_different_token_counts_are_refused_with_the_first_item() -> None:
    source, candidate = perplexities(0.0)
    tokens = np.where(np.arange(200) == 7, 1, candidate.values["tokens"])
    with pytest.raises(ValueError, match="'tokens' differs between source and candidate, first at item 7"):
        judge(source, replace(candidate, values={**candidate.values, "tokens": tokens}), PERCENT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the candidate has no 'correct', got nothing"),
        ({"correct": np.ones(299, bool)}, r"'correct' of the candidate has shape \(299,\), expected \(300,\)"),
    ],
)
def test_missing_or_short_arrays_are_refused(values: dict[str, Any], message: str) -> None:
    source, candidate = right_and_wrong(300, 0, 0)
    with pytest.raises(ValueError, match=message):
        judge(source, replace(candidate, values=values), POINT)


def test_documents_without_any_token_are_refused() -> None:
    empty = scores("flips", 0.0, flips=np.zeros(3, int), tokens=np.zeros(3, int))
    with pytest.raises(ValueError, match="at least one above 0"):
        judge(empty, empty, Budget("flips", 0.1))


@pytest.mark.parametrize(
    ("metric", "limit"),
    [("accuracy", 0.0), ("accuracy", 1.0), ("flips", -0.1), ("perplexity", math.nan), ("kl", math.inf)],
)
def test_a_budget_out_of_range_is_refused(metric: str, limit: float) -> None:
    with pytest.raises(ValueError, match=f"budget of {metric}: limit out of range"):
        Budget(metric, limit)


def test_a_budget_of_an_unknown_or_sourceless_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown metric, got 'bleu', expected one of perplexity"):
        Budget("bleu", 0.1)
    with pytest.raises(ValueError, match="cannot be relative"):
        Budget("flips", 0.1, relative=True)


# Which score


def test_a_budget_finds_its_score_by_name_and_takes_only_its_own_kind() -> None:
    found = {"acc_norm": scores("accuracy", 1.0, correct=[True]), "bleu": scores("bleu", 31.0, bleu=[31.0])}
    require_judgeable(found, Budget("accuracy", 0.01, score="acc_norm"))
    with pytest.raises(ValueError, match=r"metric: got 'accuracy', expected one of acc_norm, bleu"):
        require_judgeable(found, POINT)
    with pytest.raises(ValueError, match=r"metric: bleu is not right or wrong for each item, so no interval is known"):
        require_judgeable(found, Budget("accuracy", 0.01, score="bleu"))
