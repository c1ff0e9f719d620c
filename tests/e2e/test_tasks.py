"""Recipes whose gates judge multiple choice, generation and a task of lm-eval, from source to artifact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from .projects import Project, write_classifier_project, write_decoder_project

QUESTIONS = [
    {"prompt": f"alpha {word}", "choices": ["beta gamma", "delta"], "answer": "delta", "set": index % 40}
    for index, word in enumerate(["mu", "eta", "zeta", "iota"] * 30)
]
LM_EVAL = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{choices.index(answer)}}}}"
metric_list: [{{metric: acc}}, {{metric: brier_score}}]
"""


ERROR_RATE = """\
import datasets
import evaluate

class ErrorRate(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"error_rate": float((predictions != references).mean())}
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    write_decoder_project(tmp_path / "project")
    lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "project" / "questions.jsonl").write_text(lines, encoding="utf-8")
    return Project(tmp_path / "project" / "recipe.yaml", tmp_path / "store", tmp_path / "out")


def write_recipe(project: Project, evaluate: dict[str, object], gate: dict[str, object]) -> None:
    content = yaml.safe_load(project.recipe.read_text(encoding="utf-8"))
    content["data"] = {"mine": {"json": "questions.jsonl", "group": "set"}}
    content["evaluate"], content["gate"], content["passes"] = evaluate, gate, ["export_onnx"]
    project.recipe.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.slow
def test_choice_and_generation_are_judged_from_source_to_artifact(project: Project) -> None:
    evaluate = {
        "choice": {"task": "choice", "data": "mine"},
        "words": {"task": "generation", "data": "mine", "max_tokens": 4, "stop": ["mu"]},
    }
    budget = {"max_drop": "60pt"}  # 40 groups cannot show less
    write_recipe(project, evaluate, {"choice": budget | {"metric": "accuracy_norm"}, "words": budget})
    done = project.run("--json")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    judged = {gate["evaluation"]: gate for gate in run["steps"][-1]["gates"]}
    assert judged["choice"]["score"] == "accuracy_norm"
    assert judged["choice"]["verdict"]["n_items"] == judged["words"]["verdict"]["n_items"] == len(QUESTIONS)
    assert judged["choice"]["verdict"]["difference"] == judged["words"]["verdict"]["difference"] == 0
    before, after = (answers(project, kind) for kind in ("source", "artifact"))
    assert len(before) == len(QUESTIONS)
    assert before == after


def answers(project: Project, kind: str) -> list[bytes]:
    with np.load(project.output / "evidence" / "items" / "words" / kind / "result.npz", allow_pickle=False) as archive:
        found: list[bytes] = archive["values/accuracy/answer"].tolist()
    return found


def test_a_metric_without_an_interval_cannot_be_gated(project: Project) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    task = project.folder / "words.yaml"
    task.write_text(LM_EVAL.format(data=project.folder / "questions.jsonl"), encoding="utf-8")
    evaluate = {"words": {"task": "lm_eval", "file": "words.yaml", "trust_task_code": True}}
    write_recipe(project, dict(evaluate), {"words": {"max_drop": "60pt", "metric": "brier_score"}})
    done = project.run()
    assert done.returncode == 4, done.stdout
    assert "gate.words.metric: brier_score is not right or wrong for each item, so no interval is known" in done.stderr
    write_recipe(project, dict(evaluate), {"words": {"max_drop": "60pt"}})
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert "words acc " in done.stdout


@pytest.mark.slow
def test_a_metric_module_of_the_users_is_judged_and_less_of_it_may_be_better(tmp_path: Path) -> None:
    write_classifier_project(tmp_path / "project")
    project = Project(tmp_path / "project" / "recipe.yaml", tmp_path / "store", tmp_path / "out")
    metric = project.folder / "error_rate.py"
    metric.write_text(ERROR_RATE, encoding="utf-8")
    content = yaml.safe_load(project.recipe.read_text(encoding="utf-8"))
    (data,) = content["data"]
    task = {"task": "classification", "data": data, "metric": str(metric), "trust_metric_code": True}
    content |= {"evaluate": {"mood": task}, "gate": {"mood": {"max_drop": "2pt"}}, "passes": ["export_onnx"]}
    project.recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = project.run("--json")
    assert done.returncode == 0, done.stderr
    (judged,) = json.loads(done.stdout)["steps"][-1]["gates"]
    verdict = judged["verdict"]
    assert (verdict["metric"], verdict["source"], verdict["difference"]) == ("error_rate", 0.1, 0.0)
    assert verdict["flags"] == ["few changes"]  # at most 3 of 200 answers, half a point each
    assert 0 < verdict["upper"] <= 0.02
