"""Artifacts that must not be served, and questions they cannot answer: one clear line, the right exit code."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from optimizer.cli import main
from optimizer.serving_commands import _standard_lines
from runtime.artifact import canonical_json
from runtime.embedding import TextEmbedder
from runtime.reranking import TextReranker

from .projects import ROOT

DECODER = ROOT / "tests/data/artifact-v1"
CLASSIFIER = ROOT / "tests/data/artifact-v1-classifier"
EMBEDDER = ROOT / "tests/data/artifact-v1-embedder"
RERANKER = ROOT / "tests/data/artifact-v1-reranker"
WRONG, CANNOT = 2, 4


def linked(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere.onnx")


def changed(folder: Path) -> None:
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[100] ^= 1
    (folder / "model.onnx.data").write_bytes(content)


def shortened(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes()[:-1])


def with_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"\x80\x04.")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def manifest(**changes: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_bytes(canonical_json(json.loads(path.read_bytes()) | changes))

    return rewrite


def untouched(folder: Path) -> None:
    pass


TAMPERED = [
    ("linked file", linked, "model.onnx: is a symbolic link"),
    ("changed byte", changed, "model.onnx.data: was changed, got sha256"),
    ("truncated file", shortened, "model.onnx.data: was changed, got"),
    ("extra file", with_file("notes.txt"), "holds notes.txt, not listed in manifest.json"),
    ("pickle inside", with_file("weights.pkl"), "weights.pkl: is not data an artifact may hold"),
    ("code inside", with_file("modeling.py"), "modeling.py: is not data an artifact may hold"),
    ("missing file", without("tokenizer.json"), "lacks tokenizer.json, listed in manifest.json"),
    ("missing manifest", without("manifest.json"), "manifest.json: is missing"),
    ("newer format", manifest(format=2), "has format 2, expected at most 1; install a newer optimize-models"),
    ("no format", manifest(format="one"), "format: got 'one', expected 1"),
    ("path that leads out", manifest(files={"../x.json": {"sha256": "0" * 64, "bytes": 1}}), "is not a plain name"),
    ("broken manifest", lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is not JSON"),
    ("no folder", shutil.rmtree, "is not a folder"),
]
GENERATE = ["generate", "--prompt", "a"]
QUESTIONS = [
    ("predict on a decoder", DECODER, ["predict"], CANNOT, "is a decoder, expected a classifier"),
    ("generate on a classifier", CLASSIFIER, GENERATE, CANNOT, "is a classifier, expected a decoder"),
    ("embed on a classifier", CLASSIFIER, ["embed"], CANNOT, "is a classifier, expected an embedder"),
    ("predict on a reranker", RERANKER, ["predict"], CANNOT, "is a reranker, expected a classifier"),
    ("rerank on an embedder", EMBEDDER, ["rerank", "--query", "a"], CANNOT, "is an embedder, expected a reranker"),
    ("rerank without a query", RERANKER, ["rerank"], WRONG, "Missing option '--query'"),
    ("prompt nobody knows", EMBEDDER, ["embed", "--prompt", "x"], WRONG, "prompt: got 'x', expected document, query"),
    ("output of another kind", EMBEDDER, ["embed", "--output", "v.csv"], WRONG, "expected a name that ends in .npy"),
    ("output nowhere", EMBEDDER, ["embed", "--output", "no/v.npy"], WRONG, "no/v.npy: cannot be written, no such"),
    ("prompt longer than the context", DECODER, ["generate", "--prompt", "a " * 9000], WRONG, "prompt"),
    ("temperature below 0", DECODER, [*GENERATE, "--temperature", "-1"], WRONG, "temperature: got -1.0"),
    ("temperature is no number", DECODER, [*GENERATE, "--temperature", "hot"], WRONG, "'--temperature'"),
    ("temperature is nan", DECODER, [*GENERATE, "--temperature", "nan"], WRONG, "temperature: got nan"),
    ("top_p above 1", DECODER, [*GENERATE, "--top-p", "1.5"], WRONG, "top_p: got 1.5"),
    ("top_k below 0", DECODER, [*GENERATE, "--top-k", "-3"], WRONG, "top_k: got -3"),
    ("min_p above 1", DECODER, [*GENERATE, "--min-p", "2"], WRONG, "min_p: got 2.0"),
    ("penalty of 0", DECODER, [*GENERATE, "--repetition-penalty", "0"], WRONG, "repetition_penalty: got 0"),
    ("seed below 0", DECODER, [*GENERATE, "--seed", "-1"], WRONG, "seed: got -1"),
    ("no tokens", DECODER, [*GENERATE, "--max-tokens", "0"], WRONG, "max_tokens: got 0"),
    ("empty stop string", DECODER, [*GENERATE, "--stop", ""], WRONG, "stop: got"),
    ("no threads", DECODER, [*GENERATE, "--threads", "0"], WRONG, "'--threads'"),
    ("wrong digest", DECODER, ["verify", "--digest", "0" * 64], CANNOT, "is another artifact, got digest"),
    ("digest of another length", DECODER, ["verify", "--digest", "123"], WRONG, "digest: got '123', expected 64"),
    ("digest that is not hex", DECODER, ["verify", "--digest", "z" * 64], WRONG, "z', expected 64 hexadecimal digits"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every command two texts on its standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a fox\n日本語\n".encode())))


def test_only_line_ends_separate_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\u2028b\x0cc\r\n\nd".encode())))
    assert _standard_lines() == ["a\u2028b\x0cc", "", "d"]


def said(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and its only line."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return code, line


@pytest.mark.parametrize(("spoil", "text"), [case[1:] for case in TAMPERED], ids=[case[0] for case in TAMPERED])
@pytest.mark.parametrize("command", [["verify"], GENERATE], ids=["verify", "generate"])
def test_artifact_that_was_tampered_with_is_refused(
    command: list[str],
    spoil: Callable[[Path], object],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(DECODER, tmp_path / "artifact")
    spoil(folder)
    code, line = said([*command, folder], capsys)
    assert code == CANNOT
    assert text in line


@pytest.mark.parametrize(
    ("folder", "command", "code", "text"), [case[1:] for case in QUESTIONS], ids=[case[0] for case in QUESTIONS]
)
def test_question_that_cannot_be_answered_is_refused(
    folder: Path, command: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, line = said([*command, folder], capsys)
    assert (got, text in line) == (code, True), line


def answered(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must succeed and return what it printed."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_embed_prints_an_array_per_line_or_one_document(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    vectors = TextEmbedder.load(EMBEDDER, threads=1).embed(["a fox", "日本語"])
    out = answered("embed", EMBEDDER, "--threads", 1, *options, capsys=capsys)
    printed = json.loads(out) if options else [json.loads(line) for line in out.splitlines()]
    assert printed == vectors.tolist()


def test_embed_writes_a_float32_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vectors.npy"
    assert answered("embed", EMBEDDER, "--output", path, capsys=capsys) == f"wrote {path}, 2 vectors of 16\n"
    array = np.load(path, allow_pickle=False)
    assert (array.dtype, array.shape) == (np.float32, (2, 16))


def test_rerank_prints_score_and_document_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    ranking = TextReranker.load(RERANKER, threads=1).rank("fox", ["a fox", "日本語"])
    out = answered("rerank", RERANKER, "--query", "fox", "--threads", 1, capsys=capsys)
    assert out.splitlines() == [f"{ranked.score:.4f}\t{ranked.document}" for ranked in ranking]


def test_rerank_as_json_tells_the_place_among_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    ranking = TextReranker.load(RERANKER, threads=1).rank("fox", ["a fox", "日本語"])
    out = json.loads(answered("rerank", RERANKER, "--query", "fox", "--threads", 1, "--json", capsys=capsys))
    assert out == [asdict(ranked) for ranked in ranking]


CUT = [
    (CLASSIFIER, ["predict"], "1 of 3 texts was cut to 64 tokens: line 2\n"),
    (EMBEDDER, ["embed"], "1 of 3 texts was cut to 24 tokens: line 2\n"),
    (RERANKER, ["rerank", "--query", "fox"], "1 of 3 texts was cut to 64 tokens: line 2\n"),
]


@pytest.mark.parametrize(("folder", "command", "note"), CUT, ids=[case[1][0] for case in CUT])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["", "json"])
def test_texts_that_were_cut_are_told_on_standard_error(
    folder: Path,
    command: list[str],
    note: str,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["a fox", "a fox " * 100, "a"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    assert main([*command, *options, str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == note
    if options and command != ["embed"]:  # whose document is vectors and nothing else
        assert [answer["is_cut"] for answer in json.loads(out)].count(True) == 1
