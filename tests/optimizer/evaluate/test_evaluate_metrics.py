"""Metrics: what is shipped, what is code of the user's, and what is refused."""

import hashlib

import numpy as np
import pytest
from scoring_fakes import FakeScorer, labelled, one_hot

from optimizer.errors import CannotRun
from optimizer.evaluate.classification import SHIPPED_METRICS, Classification, ClassificationBudget
from optimizer.evaluate.metrics import SHIPPED, load_metric
from optimizer.evaluate.run import evaluate
from optimizer.gate import judge
from optimizer.quantities import Drop

MODULE = """
import datasets
import evaluate

class Wrong(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return RESULT
"""


@pytest.fixture
def module(tmp_path):
    def write(result='{"wrong": float((predictions != references).mean())}'):
        path = tmp_path / "wrong.py"
        path.write_text(MODULE.replace("RESULT", result))
        return path

    return write


def test_the_recipe_and_the_package_agree_on_what_is_shipped():
    assert SHIPPED == SHIPPED_METRICS


def test_a_file_of_the_users_runs_once_it_is_trusted(module):
    metric = load_metric(str(module()), trust=True)
    assert metric.name == "wrong"
    assert metric.compute(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1])) == 0.25


def test_the_hash_is_that_of_the_file(module):
    path = module()
    task = Classification(data="d", metric=str(path), trust_metric_code=True)
    assert task.module.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_changed_file_makes_another_task(module):
    task = {"data": "d", "metric": str(module()), "trust_metric_code": True}
    before = Classification(**task).identity()
    module('{"wrong": 0.0}')
    assert Classification(**task).identity() != before


def test_a_file_of_the_users_does_not_run_untrusted(tmp_path):
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(CannotRun, match="set `trust_metric_code: true`"):
        load_metric(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["rouge", "org/metric", "missing.py", "../metrics/accuracy"])
def test_a_metric_of_the_hub_is_refused_even_when_trusted(name):
    with pytest.raises(CannotRun, match="neither shipped"):
        load_metric(name, trust=True)


def test_several_numbers_need_one_under_the_metrics_own_name(module):
    metric = load_metric(str(module('{"wrong": 0.5, "other": 1}')), trust=True)
    assert metric.compute(np.array([0]), np.array([0])) == 0.5
    with pytest.raises(CannotRun, match="got the scores one, two, expected one number named 'wrong'"):
        load_metric(str(module('{"one": 1, "two": 2}')), trust=True).compute(np.array([0]), np.array([0]))


def test_a_metric_that_fails_is_one_line(module):
    metric = load_metric(str(module("1 / 0")), trust=True)
    with pytest.raises(CannotRun, match=r"metric wrong: ZeroDivisionError: division by zero"):
        metric.compute(np.array([0]), np.array([0]))


def test_a_file_named_like_a_known_score_is_refused(tmp_path):
    path = tmp_path / "f1.py"
    path.write_text(MODULE)
    with pytest.raises(CannotRun, match="named like a score that is known; call the file differently"):
        load_metric(str(path), trust=True)


def test_a_metric_of_the_users_is_judged_by_resampling(module):
    task = Classification(data="d", metric=str(module()), trust_metric_code=True)
    right = [number % 3 for number in range(1000)]
    worse = [(label + (number % 25 == 0)) % 3 for number, label in enumerate(right)]
    source, candidate = (
        evaluate({"it": task}, {"it": labelled(*right)}, FakeScorer(one_hot(answers, 3), "classifier"))["it"].scores[
            "wrong"
        ]
        for answers in (right, worse)
    )
    (budget,) = ClassificationBudget(max_drop=Drop.parse("6pt")).limits(task)
    verdict = judge(source, candidate, budget)
    # Less is better here: 40 more answers are wrong.
    assert (verdict.outcome, verdict.difference) == ("pass", pytest.approx(0.04))
    assert judge(candidate, source, budget).difference == pytest.approx(-0.04)


@pytest.mark.parametrize("code", ["1 / 0", "import evaluate", "def broken("])
def test_a_file_without_a_metric_is_one_line(tmp_path, code):
    path = tmp_path / "bad.py"
    path.write_text(code)
    with pytest.raises(CannotRun, match=r"bad\.py") as caught:
        load_metric(str(path), trust=True)
    assert "\n" not in str(caught.value)


def test_a_metric_leaves_no_folder_behind(module, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    load_metric(str(module()), trust=True).compute(np.array([0]), np.array([0]))
    assert list(scratch.iterdir()) == []
