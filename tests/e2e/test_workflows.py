"""The steps of action.yml and the examples of docs/ci.md, run as a CI system runs them, on a small model.

Only `pip` is replaced, by a program that notes what it is asked.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import Finished
from .projects import ROOT, altered

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
OURS, OTHERS = "OWNER/optimize@REVISION", ("actions/checkout@", "actions/setup-python@", "actions/cache@")
EXPRESSION = re.compile(r"\$\{\{ *([\w.-]+) *\}\}")
FEW = "evaluate.accuracy.items=50\nevaluate.agreement.items=50\n"


def example(name: str) -> str:
    """Return the example whose first line names it."""
    (found,) = (text for _, text in EXAMPLES if text.startswith(f"# {name}\n"))
    return found


@dataclass
class Job:
    """Runs steps in a folder, with the files and variables that GitHub gives them.

    Attributes:
        log: what the steps said.
        outputs: of each step that has an id.
        is_failed: a step failed; only those that run always follow.
        code: exit code of the last step that ran a script.
    """

    folder: Path
    environment: Mapping[str, str]
    log: str = ""
    outputs: dict[str, Mapping[str, str]] = field(default_factory=dict)
    is_failed: bool = False
    code: int = 0

    def steps(self, steps: list[Mapping[str, Any]], inputs: Mapping[str, str]) -> None:
        """Run steps as a workflow's or as a composite action's."""
        for step in steps:
            if self.is_wanted(step.get("if"), inputs):
                self.outputs[step.get("id", "")] = self.step(step, inputs)

    def step(self, step: Mapping[str, Any], inputs: Mapping[str, str]) -> Mapping[str, str]:
        """Run one step and return its outputs."""
        if step.get("uses") == OURS:
            return self.action({name: str(value) for name, value in step["with"].items()})
        if "uses" in step:
            assert step["uses"].startswith(OTHERS)
            return {}
        assert "${{" not in step["run"], "an expression in a script can become code"
        return self.script(step["run"], {name: self.told(text, inputs) for name, text in step.get("env", {}).items()})

    def action(self, given: Mapping[str, str]) -> Mapping[str, str]:
        """Run action.yml, as the runner does: only inputs that it names, booleans as texts."""
        assert set(given) <= set(ACTION["inputs"])
        inputs = {name: entry["default"] for name, entry in ACTION["inputs"].items()}
        inputs |= {name: value.lower() if value in ("True", "False") else value for name, value in given.items()}
        inner = Job(self.folder, self.environment)
        inner.steps(ACTION["runs"]["steps"], inputs)
        self.log, self.code, self.is_failed = self.log + inner.log, inner.code, inner.is_failed
        return {name: inner.told(entry["value"], inputs) for name, entry in ACTION["outputs"].items()}

    def script(self, text: str, environment: Mapping[str, str]) -> Mapping[str, str]:
        """Run a script in the shell that `shell: bash` names."""
        output, script = self.folder / ".output", self.folder / ".script"
        output.write_text("")
        script.write_text(text)
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            env={**self.environment, "GITHUB_OUTPUT": str(output), **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        self.log, self.code = self.log + done.stdout + done.stderr, done.returncode
        self.is_failed |= done.returncode != 0
        return dict(line.split("=", 1) for line in output.read_text().splitlines())

    def is_wanted(self, condition: str | None, inputs: Mapping[str, str]) -> bool:
        """Say whether a step runs; knows the conditions that are used here."""
        if condition == "always()":
            return True
        if condition is not None:
            found = re.fullmatch(r"inputs\.([\w-]+) == '(\w+)'", condition)
            assert found, condition
            return not self.is_failed and inputs[found[1]] == found[2]
        return not self.is_failed

    def told(self, text: str, inputs: Mapping[str, str]) -> str:
        """Return a text with its expressions replaced."""

        def value(found: re.Match[str]) -> str:
            parts = found[1].split(".")
            if parts[0] == "inputs":
                return inputs[parts[1]]
            if parts[0] == "steps":
                return self.outputs.get(parts[1], {}).get(parts[3], "")
            assert found[1] == "github.action_path"
            return str(ROOT)

        return EXPRESSION.sub(value, text)


@pytest.fixture(scope="module")
def checkout(classifier: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's repository: recipe, model, data, policy, artifacts in use; tools beside it."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(classifier.project.folder, folder, dirs_exist_ok=True)
    (folder / "gate.yaml").write_text(example("gate.yaml"))
    shutil.copytree(classifier.project.output, folder / "artifacts" / "original")
    altered(classifier.project.output, folder / "artifacts" / "released")
    altered(classifier.project.output, folder / "equal", 1e-6)
    altered(classifier.project.output, folder / "damaged", 2.0)
    tools = folder / ".tools"
    tools.mkdir()
    for name, text in (
        ("optimize", f'exec {sys.executable} -m optimizer.cli "$@"'),
        ("pip", f'printf "%s\\n" "$*" >> {folder}/.pip'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    return folder


@pytest.fixture
def job(checkout: Path, classifier: Finished) -> Job:
    (checkout / ".summary").unlink(missing_ok=True)
    (checkout / ".pip").unlink(missing_ok=True)
    path = f"{checkout / '.tools'}{os.pathsep}{os.environ['PATH']}"
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(checkout / ".summary")}
    return Job(checkout, classifier.project.environment(PATH=path, PYTHONPATH=str(ROOT), **github))


# ---- action.yml


def compare(job: Job, candidate: str, **inputs: str) -> tuple[int, str]:
    """Judge an artifact by the action; return its exit code and the output `verdict`."""
    given = {"install": "false", "baseline": "artifacts/released", "candidate": candidate, "policy": "gate.yaml"}
    outputs = job.action({**given, **{name.replace("_", "-"): value for name, value in inputs.items()}})
    return job.code, outputs["verdict"]


def test_action_is_green_on_an_equal_artifact(job: Job) -> None:
    assert compare(job, "equal", junit="equal.xml") == (0, "pass")
    assert (job.folder / ".summary").read_text().startswith("# equal against artifacts/released: PASS\n")
    assert "<testsuites>" in (job.folder / "equal.xml").read_text()
    assert "::error" not in job.log


def test_action_is_red_on_a_damaged_artifact(job: Job) -> None:
    assert compare(job, "damaged") == (1, "fail")
    assert re.search(r"^::error title=damaged against the baseline%3A agreement flips::.*: FAIL; ", job.log, re.M)
    assert "right → wrong" in (job.folder / ".summary").read_text()


def test_action_ends_with_3_where_50_items_cannot_decide(job: Job) -> None:
    assert compare(job, "equal", set=FEW) == (3, "inconclusive")
    assert re.search(r"^::warning title=.*: INCONCLUSIVE; ", job.log, re.M)
    assert "## What would decide" in (job.folder / ".summary").read_text()


def test_action_counts_what_is_undecided_as_asked(job: Job) -> None:
    assert compare(job, "equal", set=FEW, on_inconclusive="pass") == (0, "inconclusive")


@pytest.mark.parametrize(
    "inputs",
    [{}, {"recipe": "recipe.yaml", "candidate": "equal"}, {"baseline": "equal"}, {"recipe": "r.yaml", "policy": "p"}],
)
def test_action_refuses_inputs_that_do_not_go_together(job: Job, inputs: Mapping[str, str]) -> None:
    outputs = job.action({"install": "false", **inputs})
    assert (job.code, outputs) == (2, {"verdict": "", "digest": ""})
    assert job.log.startswith("::error title=optimize::expected recipe")


def test_no_input_becomes_code_or_an_option(job: Job) -> None:
    evil = '$(touch evil); `touch evil` "; touch evil; #'
    for inputs in ({"recipe": evil}, {"recipe": "--help"}, {"baseline": evil, "candidate": "--help", "set": evil}):
        job.action({"install": "false", "junit": evil.replace("/", ""), **inputs})
        assert job.code == 2
    assert not (job.folder / "evil").exists()


def test_action_installs_from_its_own_folder(job: Job) -> None:
    job.action({"recipe": "gone.yaml"})
    assert (job.folder / ".pip").read_text().splitlines() == [
        f"install --quiet --no-deps --constraint {ROOT}/constraints.txt "
        "--index-url https://download.pytorch.org/whl/cpu torch",
        f"install --quiet --constraint {ROOT}/constraints.txt {ROOT}[cpu,optimize]",
    ]
    assert "gone.yaml: cannot be read" in job.log


# ---- docs/ci.md


def test_every_example_of_the_page_is_one_of_those_that_are_run() -> None:
    assert [kind for kind, _ in EXAMPLES] == ["yaml", "yaml", "yaml", "sh"]


@pytest.mark.slow
def test_workflow_makes_a_candidate_and_judges_it(job: Job) -> None:
    workflow = yaml.safe_load(example(".github/workflows/model.yml"))
    steps = workflow["jobs"]["gate"]["steps"]
    job.steps(steps, {})
    assert not job.is_failed, job.log
    assert "\nagainst the pinned  the same artifact, byte for byte" in job.log
    digest = job.outputs["gate"]["digest"]
    assert job.log.endswith(f"pass {digest}\n")
    assert (job.folder / "candidate" / "evidence" / "report.md").is_file()
    shutil.rmtree(job.folder / "candidate")


@pytest.mark.slow
def test_gitlab_job_runs(job: Job) -> None:
    gate = yaml.safe_load(example(".gitlab-ci.yml"))["gate"]
    job.script("\n".join(gate["script"]), {"GITHUB_ACTIONS": ""})
    assert job.code == 0, job.log
    for name in gate["artifacts"]["reports"]["junit"]:
        assert "<testsuites>" in (job.folder / name).read_text()
    assert gate["allow_failure"] == {"exit_codes": 3}
    shutil.rmtree(job.folder / "candidate")


@pytest.mark.parametrize(
    ("candidate", "code", "text"),
    [("equal", 0, "no worse than"), ("damaged", 1, "a regression"), ("gone", 2, "nothing")],
)
def test_shell_script_tells_the_verdicts_apart(job: Job, candidate: str, code: int, text: str) -> None:
    shutil.rmtree(job.folder / "candidate", ignore_errors=True)
    if candidate != "gone":
        shutil.copytree(job.folder / candidate, job.folder / "candidate")
    (script,) = (text for kind, text in EXAMPLES if kind == "sh")
    job.script(script, {"GITHUB_ACTIONS": ""})
    assert (job.code, text in job.log) == (code, True), job.log
    shutil.rmtree(job.folder / "candidate", ignore_errors=True)
