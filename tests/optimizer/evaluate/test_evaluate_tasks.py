"""Perplexity, classification and agreement: closed forms by hand, NaN, and what each leaves out."""

import numpy as np
import pytest
from scoring_fakes import FakeScorer, documents, labelled, one_hot, random_logits

from optimizer.evaluate.agreement import Agreement
from optimizer.evaluate.classification import Classification
from optimizer.evaluate.perplexity import Perplexity
from optimizer.evaluate.run import evaluate
from optimizer.gate import Budget, judge


def score(task, items, scorer, source=None):
    return evaluate({"task": task}, {"task": items}, scorer, source and {"task": source})["task"]


def perplexity(items, logits, **options):
    return score(Perplexity(data="d"), items, FakeScorer(logits, **options)).scores["perplexity"]


def agreement(items, before, after, kind="decoder"):
    task = Agreement(data="d")
    source = score(task, items, FakeScorer(before, kind))
    return score(task, items, FakeScorer(after, kind), source).scores


def classification(items, logits, metric="accuracy"):
    task = Classification(data="d", metric=metric)
    return score(task, items, FakeScorer(logits, "classifier")).scores[metric]


# ---- perplexity


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    items = documents([1, 2, 3], [4, 0])
    found = perplexity(items, [np.zeros((3, 5)), np.full((2, 5), 7.0)])
    assert found.point == pytest.approx(5, rel=1e-15)
    assert found.values["tokens"].tolist() == [2, 1]


def test_each_row_is_asked_for_the_token_that_follows():
    # p(1 | 0) = 1/4 and p(2 | 0 1) = 1/2: 8 to the power of 1/2
    logits = np.log([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [1, 1e-9, 1e-9]])
    found = perplexity(documents([0, 1, 2]), [logits])
    assert found.values["nll"][0] == pytest.approx(np.log(8), rel=1e-6)  # logits are float32
    assert found.point == pytest.approx(np.sqrt(8), rel=1e-6)


def test_the_row_after_the_last_token_is_not_scored():
    items = documents([0, 1, 2])
    logits = random_logits(items, 4, seed=1)
    other = [logits[0].copy()]
    other[0][2] = np.nan
    assert perplexity(items, logits).point == perplexity(items, other).point


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_how_the_logits_are_sliced_does_not_matter(rows):
    items = documents([0, 1, 2, 3, 1], [2, 2, 0])
    logits = random_logits(items, 4, seed=2)
    whole = perplexity(items, logits, rows=5)
    # only the order of a float64 sum differs
    assert perplexity(items, logits, rows=rows).values["nll"] == pytest.approx(whole.values["nll"], rel=1e-14)


def test_nan_logits_make_the_document_and_the_perplexity_nan():
    items = documents([0, 1, 2], [0, 1])
    logits = random_logits(items, 4, seed=3)
    logits[0][1, 2] = np.nan
    found = perplexity(items, logits)
    assert np.isnan(found.values["nll"]).tolist() == [True, False]
    assert np.isnan(found.point)


def test_a_hopeless_model_has_infinite_perplexity_and_no_warning():
    logits = np.array([[0.0, -3000.0], [0, 0]])
    assert perplexity(documents([0, 1]), [logits]).point == np.inf


# ---- classification


def test_accuracy_is_the_share_of_right_answers():
    found = classification(labelled(0, 1, 2, 2), one_hot([0, 1, 0, 2], 3))
    assert found.point == 0.75
    assert found.values["correct"].tolist() == [True, True, False, True]
    assert found.values["correct"].dtype == bool


def test_f1_is_the_mean_over_the_classes_of_the_references():
    # class 0: 2 / 3 from a hit and a false alarm; class 2: 2 / 3 from a hit and a miss; answer 3 is no class seen
    found = classification(labelled(0, 2, 2, 1), one_hot([0, 2, 0, 3], 4), "f1")
    assert found.point == pytest.approx((2 / 3 + 0 + 2 / 3) / 3, rel=1e-12)
    assert (found.values["reference"].tolist(), found.values["answer"].tolist()) == ([0, 2, 2, 1], [0, 2, 0, 3])


@pytest.mark.parametrize(("metric", "values"), [("accuracy", "correct"), ("f1", "answer")])
def test_nan_logits_make_the_answer_nan_and_the_gate_fail(metric, values):
    items, logits = labelled(0, 1, 1), one_hot([0, 1, 1], 2)
    good = classification(items, logits, metric)
    logits[1][0] = np.nan
    bad = classification(items, logits, metric)
    assert np.isnan(bad.point)
    assert np.isnan(bad.values[values]).tolist() == [False, True, False]
    assert judge(good, bad, Budget(metric, 0.5)).outcome == "fail"


def test_a_text_without_label_cannot_be_scored():
    with pytest.raises(ValueError, match="item 1 has no label"):
        classification(labelled(0, None), one_hot([0, 0], 2))


# ---- agreement


def test_the_source_agrees_with_itself():
    items = documents([0, 1, 2], [1, 1])
    source = score(Agreement(data="d"), items, FakeScorer(random_logits(items, 100, seed=4)))
    for metric in ("flips", "kl"):
        assert source.scores[metric].point == 0
        assert source.scores[metric].values[metric].tolist() == [0, 0]
        assert source.scores[metric].values["tokens"].tolist() == [3, 2]


def test_an_equal_model_has_exactly_no_flips_and_no_divergence():
    items = documents([0, 1, 2], [1, 1])
    logits = random_logits(items, 100, seed=5)
    found = agreement(items, logits, logits)
    assert (found["flips"].point, found["kl"].point) == (0, 0)


def test_flips_are_the_positions_whose_most_likely_token_changed():
    items = documents([0, 1, 2], [1, 1])
    before = [one_hot([0, 1, 2], 3), one_hot([1, 1], 3)]
    after = [one_hot([0, 2, 1], 3), one_hot([1, 1], 3)]
    found = agreement(items, before, after)["flips"]
    assert found.values["flips"].tolist() == [2, 0]
    assert found.point == 2 / 5


def test_flips_see_ties_as_the_lowest_token_in_both_models():
    items = documents([0, 1])
    assert agreement(items, [np.zeros((2, 200))], [np.zeros((2, 200))])["flips"].point == 0


def test_kl_is_from_the_source_to_the_candidate():
    items = documents([0, 1])
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    found = agreement(items, [np.log([p, p])], [np.log([q, p])])["kl"]
    expected = float(np.sum(p * np.log(p / q)))
    assert found.values["kl"][0] == pytest.approx(expected, rel=1e-6)  # log-probabilities are kept as float32
    assert found.point == pytest.approx(expected / 2, rel=1e-6)


def test_beyond_the_64_most_likely_tokens_only_the_sum_counts():
    items = documents([0, 1])
    before = np.zeros((2, 70))
    before[:, :64] = 5
    exchanged = before.copy()
    exchanged[:, 64:] = [-1, 1, -1, 1, 0, 0]
    shift = np.log(np.exp(exchanged[0, 64:]).sum() / 6)
    exchanged[:, 64:] -= shift  # the rest now weighs what it weighed
    found = agreement(items, [before], [exchanged])
    assert found["kl"].point == pytest.approx(0, abs=1e-12)  # a float32 rounding, squared
    heavier = before.copy()
    heavier[:, 64:] = 4
    assert agreement(items, [before], [heavier])["kl"].point > 1e-3


def test_a_classifier_is_compared_on_all_its_classes():
    items = labelled(None)
    before = np.zeros(70)
    before[:64] = 5
    after = before.copy()
    after[64:] = [-1, 1, -1, 1, 0, 0]
    p, q = (np.exp(row) / np.exp(row).sum() for row in (before, after))
    found = agreement(items, [before], [after], "classifier")
    assert found["kl"].point == pytest.approx(np.sum(p * np.log(p / q)), abs=1e-7)  # float32 log-probabilities
    assert found["flips"].values["tokens"].tolist() == [1]


@pytest.mark.parametrize("broken", ["before", "after"])
def test_nan_in_either_model_makes_the_item_nan(broken):
    items = documents([0, 1], [1, 1])
    logits = {"before": random_logits(items, 80, seed=6), "after": random_logits(items, 80, seed=7)}
    logits[broken][1][0, 79] = np.nan
    found = agreement(items, logits["before"], logits["after"])
    for metric in ("flips", "kl"):
        assert np.isnan(found[metric].values[metric]).tolist() == [False, True]
        assert np.isnan(found[metric].point)


def test_nan_in_the_source_shows_in_its_own_result():
    items = documents([0, 1])
    logits = random_logits(items, 80, seed=8)
    logits[0][1] = np.nan
    assert np.isnan(score(Agreement(data="d"), items, FakeScorer(logits)).scores["kl"].point)


def test_a_source_scored_on_other_items_is_refused():
    items = documents([0, 1])
    task = Agreement(data="d")
    source = score(task, items, FakeScorer(random_logits(items, 5, seed=9)))
    with pytest.raises(ValueError, match="other items"):
        score(task, documents([0, 2]), FakeScorer(random_logits(items, 5, seed=9)), source)
