"""Speed gates on real models: what a user sees, what is kept, and what a run that ends early leaves behind."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from optimizer.cli import main
from runtime.artifact import verify

from .conftest import Finished
from .projects import Project, write_classifier_project
from .test_reliability import INTERRUPTED, start, when

SHORT = ("--set", "gate.workload={input_tokens: 16, new_tokens: 4}")
LAX = ("--set", "gate.decode_tokens_per_s={min_ratio: 0.001}")
STRICT = ("--set", "gate.latency_ms={max: 0.00001}")
NO_QUANTIZATION = """\
name: lowered
model: model
target: {device: cpu, threads: 1}
passes:
  - export_onnx
  - fuse_norm
"""


@pytest.fixture(scope="module")
def timed(decoder: Finished, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project of which a run with a lax budget has just been made, its own words beside it."""
    project = decoder.project.copy(tmp_path_factory.mktemp("timed"))
    done = project.run(*SHORT, *LAX)
    assert done.returncode == 0, done.stdout + done.stderr
    (project.folder / "said.txt").write_text(done.stdout)
    return project


@pytest.mark.slow
def test_lax_budget_passes_and_is_told_with_both_rates(timed: Project) -> None:
    said = (timed.folder / "said.txt").read_text()
    number = r"[\d,]+"
    told = rf"^decode_tokens_per_s {number} -> {number}, x\d+\.\d+ \[\d+\.\d+, \d+\.\d+\] of at least x0\.001: PASS$"
    assert re.search(told, said, re.MULTILINE), said
    assert re.search(
        r"^speed: 8 restarts of 8 pairs, 16 tokens, 4 new, 1 threads on \d+ cores, load", said, re.MULTILINE
    )


@pytest.mark.slow
def test_evidence_holds_every_restart(timed: Project) -> None:
    verify(timed.output)
    record = json.loads((timed.output / "evidence" / "run.json").read_text())
    (speed,) = record["speeds"]
    assert (speed["outcome"], speed["restarts"], len(speed["by_restart"])) == ("pass", 8, 8)
    assert speed["lower"] <= speed["estimate"] <= speed["upper"]
    assert (record["timing"]["new_tokens"], record["timing"]["threads"]) == (4, 1)


@pytest.mark.slow
def test_reference_is_the_source_exported_and_fused_and_is_stored(
    timed: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = timed.folder / "lowered.yaml"
    recipe.write_text(NO_QUANTIZATION)
    assert main([str(recipe), "--store", str(timed.store), "--output", str(tmp_path / "out"), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["is_stored"] for step in steps[1:]] == [True, True]


@pytest.mark.slow
def test_strict_budget_is_exit_1_and_no_artifact(
    decoder: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(decoder.project.recipe), "--store", str(decoder.project.store), "--output", str(tmp_path / "out")]
    assert main([*arguments, *SHORT, *STRICT]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"latency_ms [\d.]+ \[[\d.]+, [\d.]+\] of at most 0\.00001: FAIL", line) for line in lines)
    assert "latency_ms: FAIL, shown to be slower than the budget allows" in lines
    assert not (tmp_path / "out").exists()


def test_nothing_is_measured_of_a_chain_that_was_not_finished(
    decoder: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(decoder.project.recipe), "--store", str(decoder.project.store), "--output", str(tmp_path / "out")]
    assert main([*arguments, *SHORT, *STRICT, "--stop-after", "export_onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speeds"] == []


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "decode_tokens_per_s: {min: 1}",
            "gate.decode_tokens_per_s: cannot be measured of a model of kind classifier, expected texts_per_s or "
            "latency_ms\n",
        ),
        (
            "latency_ms: {max: 9}",
            "gate.workload: got input_tokens of 128, expected at most 64, the model's context\n",
        ),
    ],
)
def test_what_the_model_cannot_do_is_exit_4_before_any_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str, message: str
) -> None:
    write_classifier_project(tmp_path, items=10)
    recipe = tmp_path / "fast.yaml"
    recipe.write_text(f"gate:\n  {budget}\n{NO_QUANTIZATION}")
    capsys.readouterr()
    code = main([str(recipe), "--store", str(tmp_path / "store"), "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err) == (4, "", message)


def workers(project: Project) -> list[Path]:
    """Return the processes that measure this project's graphs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "runtime.bench" in words and any(word.startswith(str(project.store)) for word in words):
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_ctrl_c_while_measuring_ends_the_processes(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path)
    running = start(project, *SHORT, *STRICT)
    assert when(running, lambda: bool(workers(project)))
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate()
    assert err == "interrupted; the next run continues from here\n"
    assert running.returncode in INTERRUPTED
    assert workers(project) == []
    assert not project.output.exists()
