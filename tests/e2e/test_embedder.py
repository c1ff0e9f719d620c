"""A recipe for an embedder, from a folder with sentence-transformers files to vectors; what is refused on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.cli import main
from runtime.artifact import verify

from .conftest import Finished
from .projects import Project, call, edit_json, optimize


def test_the_recipe_passes_on_scores_of_people_and_on_the_sources_own(embedder: Finished) -> None:
    assert embedder.first.returncode == 0, embedder.first.stdout + embedder.first.stderr
    lines = embedder.first.stdout.splitlines()
    assert lines[0].startswith("0/2 source        people spearman 0.")
    (last,) = (line for line in lines if line.startswith("2/2 "))
    assert "source spearman 1.0000 -> 0.99" in last
    assert all(finding in last for finding in ("of 10.00 pt: PASS", "of 5.00 pt: PASS"))


def test_the_artifact_says_how_it_reads_and_pools(embedder: Finished) -> None:
    manifest = verify(embedder.project.output)
    assert (manifest.kind, manifest.context_length) == ("embedder", 24)
    assert manifest.sentence is not None and manifest.sentence.pooling == ("mean",)


def test_the_artifact_embeds_as_the_source_does(embedder: Finished) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    texts = ["alpha beta gamma", "mu " * 50]
    done = call(optimize("embed", embedder.project.output), input="\n".join(texts))
    vectors = np.array([json.loads(line) for line in done.stdout.splitlines()])
    tokenizer = Tokenizer.from_file(str(embedder.project.model / "tokenizer.json"))
    module = BertModel.from_pretrained(embedder.project.model).eval()
    with torch.no_grad():
        ids = [tokenizer.encode(text).ids[:24] for text in texts]
        plain = torch.stack([module(torch.tensor([row])).last_hidden_state[0].mean(0) for row in ids])
    cosines = torch.cosine_similarity(plain, torch.tensor(vectors, dtype=torch.float32))
    assert cosines.min() > 0.999  # 8-bit weights and activations


def test_a_second_run_has_nothing_to_do(embedder: Finished) -> None:
    again = embedder.project.run()
    assert again.returncode == 0
    assert f"digest   {embedder.digest}" in again.stdout
    assert again.stdout.count("stored") == 3


def dense(project: Project) -> None:
    modules = json.loads((project.model / "modules.json").read_text())
    (project.model / "modules.json").write_text(json.dumps([*modules, {"type": modules[0]["type"][:-11] + "Dense"}]))


BROKEN = [
    ("no modules", lambda project: (project.model / "modules.json").unlink(), 4, "without modules.json"),
    ("a dense layer", dense, 4, "modules.json: got Dense, expected Transformer, Pooling"),
    (
        "no JSON",
        lambda project: (project.model / "1_Pooling/config.json").write_text("{"),
        4,
        "config.json: is not JSON",
    ),
    (
        "vectors of another width",
        lambda project: edit_json(project.model / "1_Pooling/config.json", {"word_embedding_dimension": 64}),
        4,
        "got vectors of 64 numbers, expected 32",
    ),
    (
        "column that is not there",
        lambda project: project.recipe.write_text(project.recipe.read_text().replace("pair: two", "pair: tow")),
        2,
        "no column 'tow' for the second text; did you mean 'two'?",
    ),
    (
        "scores without pairs",
        lambda project: project.recipe.write_text(project.recipe.read_text().replace("pair: two, ", "")),
        2,
        "recipe.yaml:5:48: data.pairs.score: got 'gold' and no pair",
    ),
]


@pytest.mark.parametrize(("spoil", "code", "text"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_what_cannot_be_embedded_is_refused_in_one_line(
    embedder_source: Project,
    spoil: Callable[[Project], object],
    code: int,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(embedder_source.folder, tmp_path / "project")
    project = Project(tmp_path / "project" / "recipe.yaml", tmp_path / "store", tmp_path / "out")
    spoil(project)
    assert main([str(project.recipe), "--store", str(project.store), "--output", str(project.output)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert not project.output.exists()
