"""One pass per distinct set of items, complete and in order; results that survive the disk."""

import numpy as np
import pytest
from scoring_fakes import FakeScorer, documents, labelled, one_hot, random_logits

from optimizer.evaluate.agreement import Agreement
from optimizer.evaluate.classification import Classification
from optimizer.evaluate.items import items_hash
from optimizer.evaluate.perplexity import Perplexity
from optimizer.evaluate.result import load
from optimizer.evaluate.run import evaluate

ITEMS = documents([0, 1, 2], [3, 1], [2, 2, 2, 1])
LOGITS = random_logits(ITEMS, 90, seed=0)
BOTH = {"perplexity": Perplexity(data="d"), "agreement": Agreement(data="d")}


def equal(left, right):
    assert set(left.scores) == set(right.scores)
    for metric, scores in left.scores.items():
        other = right.scores[metric]
        assert (scores.metric, scores.items, scores.groups) == (other.metric, other.items, other.groups)
        assert set(scores.values) == set(other.values)
        assert all(np.array_equal(scores.values[key], other.values[key], equal_nan=True) for key in scores.values)
        assert all(scores.values[key].dtype == other.values[key].dtype for key in scores.values)
        assert np.array_equal(scores.point, other.point, equal_nan=True)
    assert set(left.reference) == set(right.reference)
    assert all(np.array_equal(left.reference[key], right.reference[key]) for key in left.reference)
    return True


def test_tasks_on_equal_items_share_one_pass():
    scorer = FakeScorer(LOGITS)
    together = evaluate(BOTH, {"perplexity": ITEMS, "agreement": list(ITEMS)}, scorer)
    assert scorer.passes == 1
    for name, task in BOTH.items():
        assert equal(together[name], evaluate({name: task}, {name: ITEMS}, FakeScorer(LOGITS))[name])


def test_tasks_on_different_items_pass_separately():
    scorer = FakeScorer(LOGITS)
    found = evaluate(BOTH, {"perplexity": ITEMS, "agreement": documents([1, 2, 3], [3, 1], [2, 2, 2, 1])}, scorer)
    assert scorer.passes == 2
    assert list(found) == ["perplexity", "agreement"]


def test_tasks_of_different_phases_pass_separately():
    phases = []

    class Told(FakeScorer):
        def logits(self, items, phase="prefill"):
            phases.append(phase)
            return super().logits(items, phase)

    tasks = BOTH | {"decode": Perplexity(data="d", phase="decode")}
    found = evaluate(tasks, dict.fromkeys(tasks, ITEMS), Told(LOGITS))
    assert phases == ["prefill", "decode"]
    assert found["decode"].scores["perplexity"].point == found["perplexity"].scores["perplexity"].point


def test_scores_name_the_items_and_the_context():
    found = evaluate(BOTH, dict.fromkeys(BOTH, ITEMS), FakeScorer(LOGITS))
    assert found["perplexity"].scores["perplexity"].items == items_hash(ITEMS, 1024)
    assert found["agreement"].scores["kl"].groups == ("0", "1", "2")


def test_progress_ends_at_the_total_number_of_tokens():
    told = []
    evaluate(BOTH, dict.fromkeys(BOTH, ITEMS), FakeScorer(LOGITS), progress=lambda *report: told.append(report))
    assert told[-1] == (9, 9, "token")
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told})


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [*rows, *rows[:1]], lambda rows: rows[::-1]])
def test_a_scorer_that_leaves_out_repeats_or_disorders_positions_is_caught(change):
    class Wrong(FakeScorer):
        def logits(self, items, phase="prefill"):
            yield from change(list(super().logits(items, phase)))

    with pytest.raises(RuntimeError, match="scorer: item"):
        evaluate(BOTH, dict.fromkeys(BOTH, ITEMS), Wrong(LOGITS))


def test_a_classifier_that_leaves_out_a_text_is_caught():
    task = {"classification": Classification(data="d")}
    with pytest.raises(RuntimeError, match="scorer: item 1: got 0 positions, expected 1"):
        evaluate(task, {"classification": labelled(0, 1)}, FakeScorer(one_hot([0], 2), "classifier"))


def test_results_survive_the_disk(tmp_path):
    for name, result in evaluate(BOTH, dict.fromkeys(BOTH, ITEMS), FakeScorer(LOGITS)).items():
        result.save(tmp_path / name)
        assert equal(load(tmp_path / name), result)


def test_a_comparison_with_a_loaded_source_is_the_same(tmp_path):
    tasks, items = {"agreement": Agreement(data="d")}, {"agreement": ITEMS}
    source = evaluate(tasks, items, FakeScorer(LOGITS))
    source["agreement"].save(tmp_path)
    other = FakeScorer(random_logits(ITEMS, 90, seed=1))
    again = evaluate(tasks, items, other, {"agreement": load(tmp_path)})
    assert equal(again["agreement"], evaluate(tasks, items, other, source)["agreement"])


def test_nan_scores_survive_the_disk(tmp_path):
    broken = [np.full_like(rows, np.nan) for rows in LOGITS]
    result = evaluate(BOTH, dict.fromkeys(BOTH, ITEMS), FakeScorer(broken))["perplexity"]
    result.save(tmp_path)
    assert np.isnan(load(tmp_path).scores["perplexity"].point)


def test_equal_results_are_equal_bytes_and_no_pickle(tmp_path):
    for name in ("one", "two"):
        evaluate(BOTH, dict.fromkeys(BOTH, ITEMS), FakeScorer(LOGITS))["agreement"].save(tmp_path / name)
    for file in ("result.json", "result.npz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with np.load(tmp_path / "one" / "result.npz", allow_pickle=False) as archive:
        assert all(archive[key].dtype != object for key in archive.files)


def test_a_newer_result_is_refused(tmp_path):
    (tmp_path / "result.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="got 2, expected 1"):
        load(tmp_path)
