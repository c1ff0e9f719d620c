"""Bounds of the gate: closed forms, published examples, error rates by enumeration and by seeded simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, rankdata, spearmanr
from sklearn.metrics import f1_score

from optimizer.statistics import bca, clusters, macro_f1, paired, rate, ratio, spearman

ALPHA = 0.05
BISECTION = 3e-6  # bounds are bisected to 2e-6


def documents(count: int = 40) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Summed losses and tokens of documents of unequal length, without a random generator."""
    index = np.arange(float(count))
    sizes = 100 + (index * 37) % 211
    return sizes * (0.01 + 0.02 * np.sin(1.7 * index)), sizes


@pytest.mark.parametrize("n", [44, 298, 299, 3000])
def test_without_any_change_the_bound_is_the_closed_form(n: int) -> None:
    assert paired.upper_bound(0, 0, n, ALPHA) == pytest.approx(1 - ALPHA ** (1 / n), abs=1e-15)


@pytest.mark.parametrize("n", [20, 100])
def test_without_any_change_the_p_value_is_that_of_no_loss_in_n_draws(n: int) -> None:
    # The supremum sits at P(gained) = 0, a point of the grid: equal to rounding.
    assert paired.p_value(0, 0, n, 0.02) == pytest.approx(0.98**n, rel=1e-12)


def test_299_items_without_a_change_show_less_than_a_point_and_298_do_not() -> None:
    assert paired.upper_bound(0, 0, 299, ALPHA) == pytest.approx(0.00997, abs=5e-6)
    assert paired.upper_bound(0, 0, 298, ALPHA) > 0.01
    assert rate.zero_change_floor(0.01, ALPHA) == 299


@pytest.mark.parametrize("margin", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("alpha", [0.05, 0.0375, 0.0125, 0.0031, 0.0008, 0.0001])
def test_no_change_in_as_many_items_as_the_floor_passes_at_every_level(margin: float, alpha: float) -> None:
    floor = rate.zero_change_floor(margin, alpha)
    assert paired.is_shown(0, 0, floor, margin, alpha)
    assert not paired.is_shown(0, 0, floor - 1, margin, alpha)


def test_tangos_order_puts_changes_that_cancel_before_no_change_at_small_levels() -> None:
    assert paired.p_value(0, 0, 750, 0.01) > 6 * 0.99**750
    assert paired.p_value(0, 0, 750, 0.01, corrected=True) == pytest.approx(0.99**750, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 80), st.floats(0.001, 0.3), st.booleans(), st.booleans())
def test_the_score_rises_with_losses_and_falls_with_gains(n: int, margin: float, fails: bool, corrected: bool) -> None:
    # Barnard's condition, on which the supremum at the margin rests.
    lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    score = paired.score_statistic(lost, gained, n, -margin if fails else margin, corrected)
    score = np.where(lost + gained <= n, score, np.nan)
    assert np.nanmin(np.diff(score, axis=0)) > -1e-9
    assert np.nanmax(np.diff(score, axis=1)) < 1e-9


@pytest.mark.parametrize(("margin", "floor"), [(0.005, 598), (0.01, 299), (0.02, 149), (0.03, 99), (0.05, 59)])
def test_the_floor_is_where_zero_changes_begin_to_pass(margin: float, floor: int) -> None:
    assert rate.zero_change_floor(margin, ALPHA) == floor
    assert paired.p_value(0, 0, floor, margin) <= ALPHA < paired.p_value(0, 0, floor - 1, margin)


@pytest.mark.parametrize(("margin", "side"), [(0.118077, 1), (-0.059393, -1)])
def test_the_statistic_gives_tangos_interval_of_the_lens_example(margin: float, side: int) -> None:
    # Tango 1998: 44 patients, b = 1, c = 0, 95 % interval -0.059 to 0.118.
    assert paired.score_statistic(1, 0, 44, margin) == pytest.approx(-1.959964 * side, abs=1e-4)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((7, 0, 770, 0.02), 0.015574540641),
        ((12, 6, 770, 0.02), 0.027205690731),
        ((3, 1, 300, 0.02), 0.074414412072),
        ((30, 30, 3000, 0.005), 0.030204588833),
    ],
)
def test_p_values_agree_with_an_independent_implementation(table: tuple[int, int, int, float], expected: float) -> None:
    assert paired.p_value(*table) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("table", "expected"), [((12, 6, 770), 0.0179891), ((3, 1, 300), 0.0220713), ((30, 30, 3000), 0.0043792)]
)
def test_bounds_agree_with_an_independent_implementation(table: tuple[int, int, int], expected: float) -> None:
    assert paired.upper_bound(*table, ALPHA) == pytest.approx(expected, abs=BISECTION)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 5, 60), (0, 7, 770), (1, 9, 100)])
def test_a_bound_below_zero_is_where_the_test_changes_its_mind(lost: int, gained: int, n: int) -> None:
    bound = paired.upper_bound(lost, gained, n, ALPHA)
    assert bound < 0
    assert paired.p_value(lost, gained, n, bound) <= ALPHA < paired.p_value(lost, gained, n, bound - 1e-4)


@pytest.mark.parametrize(
    ("n", "margin", "alpha"),
    [(40, 0.1, ALPHA), (60, 0.06, ALPHA), (30, -0.1, ALPHA), (50, 0.1, 0.02), (40, -0.1, 0.01)],
)
def test_the_exact_test_passes_falsely_at_most_alpha_whatever_the_nuisance(n: int, margin: float, alpha: float) -> None:
    most = passing_losses(n, margin, alpha)
    low, high = max(0.0, -margin), (1 - margin) / 2
    sizes = [probability_of(most, n, q, margin) for q in np.linspace(low, high, 200)]
    assert 0.3 * alpha < max(sizes) <= alpha  # the lower limit: a test that never passes would have size 0


def passing_losses(n: int, margin: float, alpha: float) -> list[int]:
    """For every count of gains the most losses that pass: a staircase, for losses speak against and gains for."""
    most, lost = [], -1
    for gained in range(n + 1):
        while lost + 1 + gained <= n and paired.is_shown(lost + 1, gained, n, margin, alpha):
            lost += 1
        lost = min(lost, n - gained)
        most.append(lost)
    return most


def probability_of(most: list[int], n: int, p_gained: float, margin: float) -> float:
    p_lost = p_gained + margin
    rest = max(0.0, 1 - p_gained - p_lost)
    return sum(
        math.comb(n, c) * math.comb(n - c, b) * p_gained**c * p_lost**b * rest ** (n - b - c)
        for c in range(n + 1)
        for b in range(most[c] + 1)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.data())
def test_interval_and_test_never_disagree(n: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    margin = data.draw(st.floats(0.001, 0.5))
    alpha = data.draw(st.sampled_from([ALPHA, 0.0125, 0.0008]))
    lower = paired.lower_bound_at(margin, lost, gained, n, alpha)
    upper = paired.upper_bound_at(margin, lost, gained, n, alpha)
    assert (upper <= margin) == paired.is_shown(lost, gained, n, margin, alpha)
    assert (lower > margin) == paired.is_shown(gained, lost, n, -margin, alpha)
    assert lower <= (lost - gained) / n <= upper


@pytest.mark.parametrize("offset", [-3e-6, -1e-6, -1e-9, 0.0, 1e-6])
def test_interval_and_test_agree_within_the_resolution_of_the_bisection(offset: float) -> None:
    margin = paired.upper_bound(2, 1, 40, ALPHA) + offset
    rejected = paired.p_value(2, 1, 40, margin) <= ALPHA
    assert (paired.upper_bound_at(margin, 2, 1, 40, ALPHA) <= margin) == rejected
    assert (paired.lower_bound_at(-margin, 1, 2, 40, ALPHA) > -margin) == rejected


@pytest.mark.parametrize(
    ("margin", "psi", "expected"), [(0.01, 0.005, 599), (0.01, 0.04, 2561), (0.02, 0.02, 425), (0.005, 0.02, 5131)]
)
def test_items_needed_follow_the_planning_formula(margin: float, psi: float, expected: int) -> None:
    # The table gives rounded numbers; ours are rounded up.
    assert paired.items_needed(margin, psi, ALPHA) == pytest.approx(expected, abs=1)


def test_mcnemar_is_the_two_sided_binomial() -> None:
    assert paired.mcnemar_p(2, 9) == pytest.approx(binomtest(2, 11).pvalue, rel=1e-12)
    assert paired.mcnemar_p(0, 0) == 1.0


def test_equal_groups_are_all_effective_and_one_giant_leaves_one() -> None:
    assert clusters.effective_groups(np.full(17, 300.0)) == pytest.approx(17)
    assert clusters.effective_groups(np.array([1e6] + [1.0] * 50)) == pytest.approx(1, abs=1e-3)


def test_few_changed_groups_count_as_one_item_each() -> None:
    losses = np.zeros(200)
    losses[:9] = 1  # two groups of five hold all changes
    groups = tuple(str(item // 5) for item in range(200))
    assert paired.grouped_design_effect(losses, groups) >= 5


def test_perfect_correlation_within_many_groups_has_their_size_as_design_effect() -> None:
    losses = np.repeat(np.tile([1.0, -1.0, 0.0, 0.0], 25), 4)
    groups = tuple(str(item // 4) for item in range(400))
    # V_groups carries G / (G - 1) = 100 / 99.
    assert paired.grouped_design_effect(losses, groups) == pytest.approx(4 * 100 / 99, rel=1e-9)


def test_ratio_bounds_agree_with_an_independent_implementation() -> None:
    lower, upper = ratio.ratio_interval(*documents(), ALPHA, ALPHA)
    # Same documents drawn, other order of sums: equal to rounding.
    assert (lower, upper) == pytest.approx((0.0064372254731209725, 0.014450699705562554), abs=1e-9)


def test_unequal_documents_widen_the_bounds_through_few_degrees_of_freedom() -> None:
    index = np.arange(12.0)
    sizes = 10 + index**2 * 5
    lower, upper = ratio.ratio_interval(sizes * (0.01 + 0.02 * np.sin(1.7 * index)), sizes, ALPHA, ALPHA)
    # Here CR2 with 3.66 degrees of freedom is the wider bound, and has no random part.
    assert (lower, upper) == pytest.approx((-0.003529477756815701, 0.018762343479516504), abs=1e-12)


def test_each_side_of_the_ratio_has_its_own_level() -> None:
    both = ratio.ratio_interval(*documents(), 0.01, 0.01)
    mixed = ratio.ratio_interval(*documents(), 0.01, 0.2)
    assert mixed[1] == both[1]
    assert mixed[0] > both[0] + 1e-3


def test_a_constant_ratio_has_no_width_and_a_single_document_no_bounds() -> None:
    sizes = np.arange(1.0, 41.0)
    assert ratio.ratio_interval(np.zeros(40), sizes, ALPHA, ALPHA) == (0.0, 0.0)
    assert ratio.ratio_interval(np.ones(1), np.ones(1), ALPHA, ALPHA) == (-math.inf, math.inf)


def test_a_resample_draws_as_many_groups_as_there_are_each_as_often_as_any_other() -> None:
    weights = np.concatenate(list(clusters.resampled_weights(40, 2000)))
    assert weights.shape == (2000, 40)
    assert set(weights.sum(axis=1)) == {40.0}
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.1)  # standard error 0.022
    assert weights.var(axis=0) == pytest.approx(1 - 1 / 40, abs=0.2)  # multinomial; standard error 0.04


def test_a_bootstrap_in_parts_draws_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.stack(documents(), axis=1)
    whole = clusters.resampled_sums(columns, 50)
    monkeypatch.setattr(clusters, "_WEIGHTS_AT_ONCE", 40 * 7)
    assert clusters.resampled_sums(columns, 50) == pytest.approx(whole, rel=1e-12)  # sums in another order


def test_ratio_bounds_hold_their_level_on_symmetric_documents() -> None:
    random = np.random.default_rng(7)
    misses = 0
    for _ in range(200):
        sizes = np.minimum(random.lognormal(6, 1.0, 60), 1024)
        upper = ratio.ratio_interval(sizes * (0.02 + 0.03 * random.standard_normal(60)), sizes, ALPHA, ALPHA)[1]
        misses += upper <= 0.02
    assert 0.01 <= misses / 200 <= 0.09  # 4.1 to 4.7 % expected, standard error 1.5


@pytest.mark.parametrize("changed", [0, 3, 50])
def test_independent_positions_get_clopper_pearson(changed: int) -> None:
    lower, upper = rate.clustered_rate(np.r_[np.ones(changed), np.zeros(50 - changed)], np.ones(50), 0.05, 0.02)
    assert upper == pytest.approx(binomtest(changed, 50, alternative="less").proportion_ci(0.95).high, abs=1e-12)
    assert lower == pytest.approx(binomtest(changed, 50, alternative="greater").proportion_ci(0.98).low, abs=1e-12)


def test_without_flips_a_document_counts_as_one_position() -> None:
    upper = rate.clustered_rate(np.zeros(240), np.full(240, 200.0), ALPHA, ALPHA)[1]
    assert upper == pytest.approx(1 - ALPHA ** (1 / 240), abs=1e-12)


def test_flips_that_come_in_clumps_widen_the_bound() -> None:
    sizes = np.full(200, 100.0)
    spread = rate.clustered_rate(np.full(200, 2.0), sizes, ALPHA, ALPHA)
    clumped = rate.clustered_rate(np.where(np.arange(200) % 10 == 0, 20.0, 0.0), sizes, ALPHA, ALPHA)
    assert clumped[0] < spread[0] < 0.02 < spread[1] < clumped[1]


@pytest.mark.parametrize("wider", ["binomial", "ratio"])
def test_correlated_flips_get_the_wider_of_two_upper_bounds(wider: str) -> None:
    index, sizes = np.arange(100), np.full(100, 200.0)
    clumped, skewed = np.where(index % 8 == 0, 40.0, 0.0), np.minimum(200, np.round(0.02 * 1.6 ** (index / 5)))
    changed = clumped if wider == "binomial" else skewed
    total = rate.effective_positions(changed, sizes) * (1.6448536 / 1.6603912) ** 2  # normal over t, 99 degrees
    share = changed.sum() / sizes.sum()
    bounds = {
        "binomial": rate.clopper_pearson(share * total, total, ALPHA, ALPHA)[1],
        "ratio": ratio.ratio_interval(changed, sizes, ALPHA, ALPHA)[1],
    }
    assert max(bounds, key=lambda name: bounds[name]) == wider
    assert rate.clustered_rate(changed, sizes, ALPHA, ALPHA)[1] == pytest.approx(bounds[wider], rel=1e-6)


def test_flip_bounds_hold_their_level_on_correlated_documents() -> None:
    random = np.random.default_rng(11)
    misses = 0
    for _ in range(200):
        flips = random.binomial(200, random.beta(1.98, 97.02, 100)).astype(float)  # mean 2 %, correlation 1 %
        misses += rate.clustered_rate(flips, np.full(100, 200.0), ALPHA, ALPHA)[1] <= 0.02
    assert 0.01 <= misses / 200 <= 0.10  # about 5.5 % expected, standard error 1.6; unclustered would be 16 %


def answers(n: int, classes: int, flipped: int) -> macro_f1.Answers:
    """A source right on nine of ten, and a candidate wrong on `flipped` of its right answers."""
    reference = np.arange(n) % classes
    before = np.where(np.arange(n) % 10 == 3, (reference + 1) % classes, reference)
    right = np.flatnonzero(before == reference)
    after = before.copy()
    spoilt = right[np.linspace(0, len(right) - 1, flipped).astype(int)]
    after[spoilt] = (reference[spoilt] + 2) % classes
    return macro_f1.Answers(reference, before, after, tuple(map(str, range(n))))


def test_macro_f1_is_sklearns_over_the_labels_of_the_references() -> None:
    random = np.random.default_rng(0)
    reference, answer = random.integers(0, 5, 200), random.integers(0, 7, 200)  # answers 5 and 6 are no labels
    expected = f1_score(reference, answer, labels=np.unique(reference), average="macro", zero_division=0)
    assert macro_f1.macro_f1(reference, answer) == pytest.approx(expected, abs=1e-12)


def test_the_macro_f1_interval_holds_the_loss_and_narrows_with_items() -> None:
    widths = []
    for n in (600, 2400):
        sample = answers(n, 7, n // 20)
        lower, upper = macro_f1.macro_f1_interval(sample, ALPHA, ALPHA)
        loss = macro_f1.macro_f1(sample.reference, sample.before) - macro_f1.macro_f1(sample.reference, sample.after)
        assert lower < loss < upper
        widths.append(upper - lower)
    assert widths[0] / widths[1] == pytest.approx(2, abs=0.35)  # four times the items; quantiles of 1999 draws wobble


def test_the_macro_f1_interval_has_the_width_of_a_binomial_where_f1_is_accuracy() -> None:
    sample = answers(2000, 4, 100)  # balanced classes, spread damage: macro-F1 is nearly accuracy
    lower, upper = macro_f1.macro_f1_interval(sample, ALPHA, ALPHA)
    expected = 2 * 1.645 * math.sqrt(0.05 * 0.95 / 2000)
    assert upper - lower == pytest.approx(expected, rel=0.1)


def test_the_macro_f1_interval_is_scipys_bca() -> None:
    sample = answers(600, 4, 30)
    _, upper = macro_f1.macro_f1_interval(sample, ALPHA, 0.0002)  # 100,000 resamples wobble by 0.01

    def loss(items: NDArray[np.int64]) -> float:
        kept = sample.reference[items]
        return macro_f1.macro_f1(kept, sample.before[items]) - macro_f1.macro_f1(kept, sample.after[items])

    theirs = bootstrap(
        (np.arange(600),), loss, vectorized=False, confidence_level=0.9, method="BCa", rng=np.random.default_rng(1)
    )
    deviation = theirs.standard_error
    assert upper == pytest.approx(theirs.confidence_interval.high, abs=0.1 * deviation)  # 9,999 draws wobble by 0.03
    assert upper > np.quantile(theirs.bootstrap_distribution, 0.95) + 0.05 * deviation  # the plain percentile


def test_whole_groups_are_resampled() -> None:
    alone = answers(1000, 5, 50)
    spoilt = alone.before != alone.after
    order = np.argsort(~spoilt, kind="stable")  # the damage sits in the first groups
    arranged = [values[order] for values in (alone.reference, alone.before, alone.after)]
    grouped = macro_f1.Answers(*arranged, tuple(str(item // 10) for item in range(1000)))
    widths = [np.ptp(macro_f1.macro_f1_interval(sample, ALPHA, ALPHA)) for sample in (alone, grouped)]
    assert widths[1] > 2 * widths[0]  # ten of a group together: about sqrt(10)


def test_two_perfect_classes_lose_one_over_n_per_change_as_accuracy_does() -> None:
    reference = np.arange(100) % 2
    # One of 50 hits lost: 1 - 98 / 99 in one class, a false alarm 1 - 100 / 101 in the other, mean of the two.
    assert macro_f1.worst_loss_per_change(reference, reference, 1) == pytest.approx((1 / 99 + 1 / 101) / 2, abs=1e-12)


@pytest.mark.parametrize("changes", [1, 2, 3])
def test_no_set_of_changes_costs_more_than_the_worst(changes: int) -> None:
    reference, answer = np.array([0, 0, 0, 1, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 2, 2, 2])
    before = macro_f1.macro_f1(reference, answer)
    worst = max(
        before - macro_f1.macro_f1(reference, np.r_[answer[[i for i in range(8) if i not in items]], new][back(items)])
        for items in itertools.combinations(range(8), changes)
        for new in itertools.product(range(3), repeat=changes)
    )
    bound = changes * macro_f1.worst_loss_per_change(reference, answer, changes)
    assert worst <= bound + 1e-12
    assert bound < 2 * worst  # and it is no idle bound


def back(items: tuple[int, ...]) -> list[int]:
    """Positions that put values listed as untouched, then touched, back in item order."""
    order = [i for i in range(8) if i not in items] + list(items)
    return [order.index(i) for i in range(8)]


def test_few_changes_are_bounded_on_both_sides() -> None:
    sample = answers(1000, 4, 3)
    lower, upper = macro_f1.few_changes_interval(sample, ALPHA, ALPHA)
    assert lower < 0
    assert 0.003 < upper < 0.012  # three changes: at most 7.8 by Clopper-Pearson, each about 1 / 1000


# ---- rank correlation


def orders(n: int, noise: float, seed: int = 0, source_noise: float = 0.6) -> spearman.Orders:
    """Scores of people, a source that follows them (about 0.84), and a candidate that follows the source."""
    random = np.random.default_rng(seed)
    reference = random.normal(size=n)
    before = reference + source_noise * random.normal(size=n)
    after = before + noise * random.normal(size=n)
    return spearman.Orders(np.round(4 * reference), before, after, tuple(map(str, range(n))))  # people's scores tie


def lost(sample: spearman.Orders) -> float:
    return spearman.spearman(sample.reference, sample.before) - spearman.spearman(sample.reference, sample.after)


def test_spearman_is_scipys_with_ties() -> None:
    sample = orders(300, 0.1)
    assert spearman.spearman(sample.reference, sample.after) == pytest.approx(
        spearmanr(sample.reference, sample.after).statistic, abs=1e-12
    )


def test_spearman_by_hand() -> None:
    # d = 0, 1, -1, 0: 1 - 6 * 2 / (4 * 15)
    assert spearman.spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])) == pytest.approx(0.8, abs=1e-15)


@pytest.mark.parametrize("answer", [[1.0, 1.0, 1.0], [1.0, np.nan, 2.0], [1.0, np.inf, 2.0]])
def test_what_orders_nothing_has_no_correlation(answer: list[float]) -> None:
    assert math.isnan(spearman.spearman(np.array([1.0, 2.0, 3.0]), np.array(answer)))


def test_a_weight_counts_as_so_many_items() -> None:
    # What every resample rests on: ranks under weights are the ranks of the items written out.
    random = np.random.default_rng(5)
    values, weights = np.round(random.normal(size=40), 1), random.integers(0, 4, 40)
    written_out = rankdata(np.repeat(values, weights))
    ranks = spearman._Ranked(values).ranks(weights[None].astype(float))[0]
    assert np.repeat(ranks, weights) == pytest.approx(written_out, abs=1e-9)


def test_the_spearman_interval_is_scipys_bca() -> None:
    sample = orders(600, 0.2)
    _, upper = spearman.spearman_interval(sample, ALPHA, 0.01)  # 2,000 resamples

    def loss(items: NDArray[np.int64]) -> float:
        before, after = (spearmanr(sample.reference[items], values[items]) for values in (sample.before, sample.after))
        return float(before.statistic - after.statistic)

    theirs = bootstrap(
        (np.arange(600),), loss, vectorized=False, n_resamples=1999, method="BCa", confidence_level=0.9, rng=1
    )
    # Quantiles of 1,999 draws wobble by 0.05 deviations, theirs and ours.
    assert upper == pytest.approx(theirs.confidence_interval.high, abs=0.2 * theirs.standard_error)


def test_the_spearman_interval_narrows_with_items_and_widens_with_groups() -> None:
    small, large = orders(600, 0.2), orders(2400, 0.2)
    widths = [np.ptp(spearman.spearman_interval(sample, ALPHA, ALPHA)) for sample in (small, large)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.25)  # four times the items
    copies = [np.repeat(values, 4) for values in (small.reference, small.before, small.after)]
    tied = spearman.Orders(*copies, tuple(np.repeat(np.arange(600), 4).astype(str)))
    # Four copies of an item in one group say no more than the item.
    assert np.ptp(spearman.spearman_interval(tied, ALPHA, ALPHA)) == pytest.approx(widths[0], rel=0.1)


def test_spearman_bounds_hold_their_level() -> None:
    population = lost(orders(400_000, 0.35, seed=99))  # what the samples are drawn from, to about 0.0003
    bounds = [spearman.spearman_interval(orders(500, 0.35, seed), 0.2, 0.2) for seed in range(60)]
    for misses in (sum(upper <= population for _, upper in bounds), sum(lower > population for lower, _ in bounds)):
        assert 4 <= misses <= 21  # 12 expected of 60; binomial at 20 %: within with probability 0.993


def test_a_resample_without_a_number_gives_no_bounds() -> None:
    constant = spearman.Orders(np.arange(600.0), np.arange(600.0), np.zeros(600), tuple(map(str, range(600))))
    assert all(math.isnan(bound) for bound in spearman.spearman_interval(constant, ALPHA, ALPHA))


@pytest.mark.parametrize("seed", range(6))
def test_no_move_of_one_item_costs_more_than_the_worst(seed: int) -> None:
    reference = np.array([1.0, 1, 2, 3, 3, 3, 5, 8])
    answer = np.arange(8.0) if seed == 0 else np.random.default_rng(seed).permutation(8).astype(float)
    start = spearman.spearman(reference, answer)
    moved = [np.where(np.arange(8) == item, to, answer) for item in range(8) for to in np.arange(-0.5, 8)]
    worst = max(start - spearman.spearman(reference, values) for values in moved)
    bound = spearman.worst_loss_per_move(reference, answer)
    assert worst <= bound
    assert seed > 0 or bound < 2 * worst  # where the order is right it is no idle bound


def test_bca_of_a_mean_is_the_normal_interval() -> None:
    # A symmetric mean has neither bias nor acceleration: z standard errors to each side.
    values = np.linspace(-1, 1, 2001)
    lower, upper = bca.bca_interval(lambda weights: weights @ values / weights.sum(axis=1), 2001, ALPHA, ALPHA)
    expected = 1.645 * values.std() / math.sqrt(2001)
    assert (-lower, upper) == pytest.approx((expected, expected), rel=0.08)  # quantiles of 1,999 draws
