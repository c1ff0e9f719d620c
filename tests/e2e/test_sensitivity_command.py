"""`optimize sensitivity`: on which texts, of which pass, in which form; and the rung that keeps the worst layers."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from optimizer.cli import main

from .projects import ROOT, Project, documents, optimize, write_texts

INT2 = ("--set", "passes.0.format=int2")


def said(
    project: Project, capsys: pytest.CaptureFixture[str], *arguments: object, command: str = "sensitivity"
) -> tuple[int, str, str]:
    """Run a command on a project in this process; return its exit code and what it printed, out and err."""
    code = main([command, *map(str, (project.recipe, "--store", project.store, *arguments))])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_layer_is_listed_worst_first_and_a_second_run_only_reads(
    decoder_source: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(decoder_source, capsys, *INT2, "--items", 8)
    title, header, *rows, total, _ = out.splitlines()
    assert (code, err) == (0, "")
    assert title.startswith(
        "quantize_rtn, each layer alone: KL, nats per token; 8 of 40 items of evaluate.perplexity, "
    )
    assert header.split() == ["layer", "format", "damage", "bounds", "MB", "saved", "share"]
    damages = [float(row.split()[2]) for row in rows]
    assert len(rows) == 14 and damages == sorted(damages, reverse=True) and damages[0] > 0
    assert total.startswith("14 layers, 0.0")
    start = time.perf_counter()
    _, again, _ = said(decoder_source, capsys, *INT2, "--items", 8)
    assert again.splitlines()[:-1] == out.splitlines()[:-1]
    assert float(again.splitlines()[-1].split()[0]) <= time.perf_counter() - start


def test_it_is_written_as_json_markdown_and_a_drawing(
    decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(decoder_source, capsys, *INT2, "--items", 8, "--json", "--output", tmp_path / "a.svg")
    found = json.loads(out)
    assert (code, err) == (0, f"wrote {tmp_path / 'a.svg'}\n")
    assert (found["step"], found["items"], len(found["layers"])) == ("quantize_rtn", 8, 14)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    _, out, _ = said(decoder_source, capsys, *INT2, "--items", 8, "--output", tmp_path / "a.md")
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'a.md'}"
    assert (tmp_path / "a.md").read_text().count("\n| `model.layers.") == 14


def test_calibration_texts_come_first_and_another_pass_can_be_named(
    decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    recipe = project.recipe.read_text()
    recipe = recipe.replace(
        "  texts: {json: texts.jsonl}\n", "  texts: {json: texts.jsonl, items: 30}\n  more: {json: more.jsonl}\n"
    )
    static = "  - smooth_quant: {calibration: more}\n  - quantize_int8: {activations: static, calibration: more}\n"
    project.recipe.write_text(recipe.replace("  - quantize_rtn: {format: int8}\n", static))
    texts = (project.folder / "texts.jsonl").read_text().splitlines(keepends=True)
    (project.folder / "texts.jsonl").write_text("".join(texts[:30]))
    (project.folder / "more.jsonl").write_text("".join(texts[30:]))
    code, out, err = said(project, capsys, "--pass", "quantize_int8")
    assert (code, err) == (0, "")
    assert out.startswith("quantize_int8, each layer alone: KL, nats per token; 10 of 10 texts of data.more, ")
    assert len(out.splitlines()) == 2 + 14 + 2


def test_what_cannot_be_measured_is_said_before_any_work(
    decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    assert said(project, capsys, "--pass", "quantize_rtm")[::2] == (
        2, "--pass: no quantizing pass 'quantize_rtm' in this recipe; did you mean 'quantize_rtn'?\n",
    )  # fmt: skip
    assert said(project, capsys, "--output", "a.png")[::2] == (
        2, "--output: got a.png, expected a name that ends in .svg or .md\n",
    )  # fmt: skip
    assert said(project, capsys, "--items", 1)[0] == 2
    whole = project.recipe.read_text()
    project.recipe.write_text(whole.replace("  - quantize_rtn: {format: int8}\n", ""))
    assert said(project, capsys)[::2] == (
        2,
        "passes: none quantizes layers, got export_onnx, fuse_norm, expected one of quantize_autoround, quantize_gptq, "
        "quantize_int8, quantize_mixed, quantize_rtn among them\n",
    )
    project.recipe.write_text(whole.partition("evaluate:")[0] + "passes:" + whole.partition("passes:")[2])
    assert said(project, capsys)[::2] == (
        2, "got no texts to measure with, expected `evaluate`, or a pass with `calibration`\n",
    )  # fmt: skip
    project.recipe.write_text(whole)
    code, _, err = said(project, capsys, "--set", "passes.0.exclude=[nothing]")
    assert code == 4
    assert err.startswith("quantize_rtn: exclude pattern 'nothing' matches no module")
    assert not list((project.store / "entries").glob("*/damage.npz"))


@pytest.mark.slow
def test_ctrl_c_ends_it_with_130_and_the_next_run_goes_on(decoder_source: Project, tmp_path: Path) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    command = optimize("sensitivity", project.recipe)
    running = subprocess.Popen(
        command, cwd=ROOT, env=project.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(project.store.glob("partial/*/share-*.npz")) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    if running.returncode:  # it may have ended before the signal came
        assert (running.returncode, err) == (130, "interrupted; the next run continues from here\n")
    done = subprocess.run(command, cwd=ROOT, env=project.environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_keeping_the_worst_layers_wins_back_what_two_bits_lose(
    decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    write_texts(project.folder / "texts.jsonl", documents(80))  # enough to set some aside for choosing
    ladder = "  - quantize_rtn: {format: int2}\n    otherwise:\n      - keep: {worst: 4, format: int8}\n"
    recipe = project.recipe.read_text().replace("  - quantize_rtn: {format: int8}\n", ladder)
    project.recipe.write_text(recipe.replace("max_kl: 0.5", "max_kl: 0.00002"))
    code, out, err = said(project, capsys, "--stop-after", "quantize_rtn", command="run")
    assert (code, err) == (3, ""), out  # the few items that choose decide nothing
    assert "quantize_rtn gives way: search agreement kl: the loss seen is above the budget" in out
    assert "4 in int8, of 14 layers" in out
    _, damages, _ = said(project, capsys, *INT2, "--json")
    worst = {name for layer in json.loads(damages)["layers"][:4] for name in layer["layers"]}
    assert set(out.partition("kept in int8: ")[2].partition("\n")[0].split(", ")) == worst
    made = [json.loads(path.read_text()) for path in project.store.glob("entries/*/quantization.json")]
    kept = [{name for name, spec in specs.items() if spec["format"]["bits"] == 8} for specs in made]
    assert sorted(kept, key=len) == [set(), worst]
