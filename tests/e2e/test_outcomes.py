"""How a run ends: undecided, kept, from Python, from another folder; and an encoder from CSV to labels."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import optimizer
from optimizer.cli import main
from optimizer.errors import ExitCode, OptimizeError
from optimizer.record import Run
from runtime.artifact import verify

from .conftest import Finished, digest_in
from .projects import LABELS, ROOT, Project, call, optimize

TOO_STRICT = ("--set", "gate.agreement.max_kl=0.0000000001")
FEW_ITEMS = ("--set", "data.texts.items=5")


def said(
    project: Project, capsys: pytest.CaptureFixture[str], *arguments: object, output: Path | None = None
) -> tuple[int, list[str]]:
    """Run a project in this process, which has torch loaded already; return the exit code and the lines it printed."""
    places = ["--store", project.store, "--output", output or project.output]
    code = main([str(argument) for argument in (project.recipe, *places, *arguments)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out.splitlines()


def test_few_items_are_undecided_and_say_how_many_would_do(
    decoder: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = said(decoder.project, capsys, *FEW_ITEMS, output=tmp_path / "out")
    (undecided,) = (line for line in lines if line.startswith("perplexity: INCONCLUSIVE"))
    assert code == 3
    assert re.search(r"effective documents; 30 needed; about \d+ items would decide$", undecided)
    assert "nan" not in "".join(lines)
    assert not (tmp_path / "out").exists()


def test_keep_makes_the_artifact_of_an_undecided_run(
    decoder: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = said(decoder.project, capsys, *FEW_ITEMS, "--keep", output=tmp_path / "out")
    assert code == 3
    assert verify(tmp_path / "out").digest == digest_in("\n".join(lines))


def test_keep_makes_the_whole_chain_of_a_failed_run(
    decoder: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = said(decoder.project, capsys, *TOO_STRICT, "--keep", output=tmp_path / "out")
    assert code == 1
    assert any(line.startswith("3/3 fuse_norm") for line in lines)
    assert verify(tmp_path / "out").digest == digest_in("\n".join(lines))


def test_setting_is_part_of_the_recipe_that_the_artifact_carries(
    decoder: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(decoder.project, capsys, "--set", "gate.alpha=0.1", output=tmp_path / "out")
    carried = (tmp_path / "out" / "recipe.yaml").read_text()
    assert carried.startswith("# with gate.alpha=0.1\n")
    assert "alpha: 0.1" in carried
    assert verify(tmp_path / "out").digest != decoder.digest


def test_optional_pass_that_refuses_is_skipped_and_says_why(
    decoder: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--set", "passes.0.optional=true", "--set", "passes.0.exclude=[nothing]", "--stop-after", "quantize_rtn")
    _, lines = said(decoder.project, capsys, *options, output=tmp_path / "out")
    assert lines[1].startswith("1/3 quantize_rtn  skipped: quantize_rtn: exclude pattern 'nothing' matches no module")


def test_quiet_run_says_nothing(decoder: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(decoder.project, capsys, "--quiet") == (0, [])


def test_identity_is_the_same_from_another_checkout_and_working_folder(decoder: Finished, tmp_path: Path) -> None:
    project = decoder.project.copy(tmp_path / "elsewhere")
    done = call(
        optimize("recipe.yaml", "--output", "../made/here", "--store", "../store"),
        cwd=project.folder,
        env={**project.environment(), "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-3:-1] == ["artifact ../made/here", f"digest   {decoder.digest}"]
    assert verify(project.folder.parent / "made" / "here").digest == decoder.digest


def test_evidence_is_outside_the_identity(decoder: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(decoder.project.output, tmp_path / "out"))
    record = json.loads((folder / "evidence" / "run.json").read_text())
    assert [step["name"] for step in record["steps"]] == ["source", "quantize_rtn", "export_onnx", "fuse_norm"]
    assert (folder / "evidence/items/perplexity/source/result.npz").is_file()
    shutil.rmtree(folder / "evidence")
    assert verify(folder).digest == decoder.digest


def test_run_from_python_returns_the_run_again_and_again(decoder: Finished) -> None:
    project = decoder.project
    for _ in range(2):
        done = optimizer.run(project.recipe, output=project.output, store=project.store)
        assert isinstance(done, Run)
        assert (done.exit_code, done.digest, done.artifact) == (ExitCode.PASS, decoder.digest, str(project.output))


@pytest.mark.parametrize(
    ("setting", "code"),
    [("passes.0.format=int9", 2), ("model=nowhere", 2), ("passes.0.exclude=['nothing']", 4)],
    ids=["wrong option", "no model", "pass that refuses"],
)
def test_run_from_python_raises_an_error_with_its_exit_code(
    decoder: Finished, tmp_path: Path, setting: str, code: int
) -> None:
    with pytest.raises(OptimizeError) as raised:
        optimizer.run(decoder.project.recipe, [setting], output=tmp_path / "out", store=decoder.project.store)
    assert raised.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_unknown_stop_is_refused(decoder: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(decoder.project.recipe), "--stop-after", "fuse_nrm"]) == ExitCode.WRONG_INPUT
    assert capsys.readouterr().err == "--stop-after: unknown pass 'fuse_nrm'; did you mean 'fuse_norm'?\n"


def test_terminal_shows_progress_and_breaks_lines_at_its_width(decoder: Finished) -> None:
    if shutil.which("script") is None:
        pytest.skip("needs `script`, which lends a terminal")
    command = " ".join(decoder.project.command())
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env=decoder.project.environment(COLUMNS="80", TERM="xterm"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.rpartition("\x1b[?25h")[2].strip("\r") for line in done.stdout.split("\n")]
    first = next(number for number, line in enumerate(lines) if "1/3 quantize_rtn" in line)
    assert lines[first + 1].startswith(" " * len("1/3 quantize_rtn  agreement".partition("agreement")[0]))
    assert "stored" in lines[first + 1] + lines[first + 2] + lines[first + 3]


def test_classifier_passes_its_gates(classifier: Finished) -> None:
    assert classifier.first.returncode == 0, classifier.first.stdout + classifier.first.stderr
    last = next(line for line in classifier.first.stdout.splitlines() if line.startswith("2/2"))
    assert "accuracy 90.00 % -> " in last
    assert last.count(": PASS") == 2


def test_classifier_artifact_predicts_labels(classifier: Finished) -> None:
    with (classifier.project.folder / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:40]
    done = call(optimize("predict", classifier.project.output), input="\n".join(row["text"] for row in rows))
    told = [line.split("\t") for line in done.stdout.splitlines()]
    right = [label == row["mood"] for (label, _), row in zip(told, rows, strict=True)]
    assert {label for label, _ in told} <= set(LABELS)
    assert all(1 / 3 < float(share) <= 1 for _, share in told)
    assert sum(right) == 36  # the source's own clear answers; every tenth label is wrong on purpose
