"""What users get wrong: each is refused in one clear line, with the right exit code, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optimizer.cli import main

from .projects import ROOT, Project, edit_json

Break = Callable[[Project], object]
WRONG, CANNOT = 2, 4


def replaced(old: str, new: str) -> Break:
    """Change the recipe's text."""

    def change(project: Project) -> None:
        text = project.recipe.read_text(encoding="utf-8")
        assert old in text
        project.recipe.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def config(**changes: object) -> Break:
    """Change the model's config.json; None removes a key."""
    return lambda project: edit_json(project.model / "config.json", changes)


def removed(name: str) -> Break:
    """Remove a file of the project."""
    return lambda project: (project.folder / name).unlink()


def written(name: str, content: str | bytes) -> Break:
    """Write a file of the project."""
    data = content.encode() if isinstance(content, str) else content
    return lambda project: (project.folder / name).write_bytes(data)


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Break:
    """Change the model's tensors."""

    def rewrite(project: Project) -> None:
        path = project.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return rewrite


def truncated(project: Project) -> None:
    path = project.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard_missing(project: Project) -> None:
    path = project.model / "model.safetensors"
    first = "model-00001-of-00002.safetensors"
    index = dict.fromkeys(load_file(path), first)
    index["model.norm.weight"] = "model-00002-of-00002.safetensors"
    path.rename(project.model / first)
    (project.model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def pickled(project: Project) -> None:
    (project.model / "model.safetensors").rename(project.model / "pytorch_model.bin")


def not_a_number(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan


def no_passes(project: Project) -> None:
    text = project.recipe.read_text(encoding="utf-8")
    project.recipe.write_text(text.partition("passes:")[0] + "passes: []\n", encoding="utf-8")


def texts(*rows: object) -> Break:
    return written("texts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


OTHER_TOKENIZER = written("model/tokenizer.json", '{"model": {"vocab": {"a": 0}}}')
RECIPES: list[tuple[str, Break, int, str]] = [
    ("broken YAML", replaced("model: model", "model: [model"), WRONG, "recipe.yaml:3:"),
    ("tab in YAML", replaced("  perplexity:", "\tperplexity:"), WRONG, "recipe.yaml:7:1: "),
    ("empty recipe", written("recipe.yaml", ""), WRONG, "recipe.yaml:1:1: got an empty document"),
    ("recipe in another encoding", written("recipe.yaml", b"name: \xff\n"), WRONG, "1:7: got the byte 0xff"),
    ("unknown key", replaced("target:", "traget:"), WRONG, "3:1: unknown key 'traget'; did you mean 'target'?"),
    ("key twice", replaced("model: model", "model: model\nname: again"), WRONG, "the key 'name' is here twice"),
    ("unknown pass", replaced("- fuse_norm", "- fuse_nrm"), WRONG, "did you mean 'fuse_norm'?"),
    ("unknown task", replaced("task: agreement", "task: agrement"), WRONG, "did you mean 'agreement'?"),
    ("unknown option of a pass", replaced("format: int8", "bits: 8"), WRONG, "unknown key 'bits'"),
    ("wrong type", replaced("context: 32}\n  agr", "context: many}\n  agr"), WRONG, "got 'many', expected a whole"),
    ("out of range", replaced("threads: 1", "threads: 0"), WRONG, "target.threads: got 0, expected"),
    ("not one of the choices", replaced("int8", "int7"), WRONG, "format: got 'int7', expected one of"),
    ("budget without unit", replaced("5%", "lots"), WRONG, "max_increase: got 'lots'"),
    ("gate on nothing", replaced("gate:\n", "gate:\n  speed: {max_drop: 1%}\n"), WRONG, "unknown key 'speed'"),
    ("chain without export", replaced("  - export_onnx\n", ""), WRONG, "got a model at stage torch"),
    ("chain without end", replaced("  - export_onnx\n  - fuse_norm\n", ""), WRONG, "the chain ends at stage torch"),
    ("no passes", no_passes, WRONG, "passes: got an empty list"),
    ("model is nowhere", replaced("model: model", "model: nowhere"), WRONG, "model: no such folder, got 'nowhere'"),
    ("model is a file", replaced("model: model", "model: texts.jsonl"), WRONG, "which is a file, expected a folder"),
    ("data file is nowhere", replaced("texts.jsonl", "gone.jsonl"), WRONG, "no such file, got 'gone.jsonl'"),
    ("data of no such name", replaced("data: texts,", "data: text,"), WRONG, "no entry 'text'; did you mean 'texts'?"),
    ("empty data", written("texts.jsonl", ""), WRONG, "texts.jsonl: is empty, expected rows"),
    ("data is no JSON", written("texts.jsonl", "{text: }\n"), WRONG, "texts.jsonl: cannot be read as json"),
    ("column missing", texts({"words": "alpha beta"}), WRONG, "texts.jsonl: no column 'text' for the text"),
    ("text missing", texts({"text": "alpha beta"}, {"text": None}), WRONG, "texts.jsonl: row 2: text: got nothing"),
    ("text is a number", texts({"text": 3}), WRONG, "texts.jsonl: row 1: text: got 3, expected a text"),
    ("texts too short", texts({"text": ""}), WRONG, "got no text of two tokens or more"),
    ("group column missing", replaced("texts.jsonl", "texts.jsonl, group: book"), WRONG, "no column 'book'"),
]  # fmt: skip

MODELS: list[tuple[str, Break, int, str]] = [
    ("weights as pickle", pickled, CANNOT, "weights as pickle (pytorch_model.bin), which can run code"),
    ("no weights", removed("model/model.safetensors"), CANNOT, "no weights, expected model.safetensors"),
    ("truncated weights", truncated, CANNOT, "model.safetensors: "),
    ("weights are no safetensors", written("model/model.safetensors", "hello"), CANNOT, "model.safetensors: "),
    ("shard missing", shard_missing, CANNOT, "model-00002-of-00002.safetensors"),
    ("NaN in a weight", weights(not_a_number), CANNOT, "NaN or infinity in tensor model.layers.1.mlp.up_proj.weight"),
    ("tensor missing", weights(lambda t: t.pop("model.norm.weight")), CANNOT, "first model.norm.weight"),
    ("tensor of another shape", weights(lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)})),
     CANNOT, "tensor model.norm.weight has shape [7], config.json asks for [32]"),
    ("tensor of another dtype", weights(lambda t: t.update({"model.norm.weight": np.ones(32)})), CANNOT, "dtype F64"),
    ("adapter", written("model/adapter_config.json", "{}"), CANNOT, "an adapter, not a model"),
    ("quantized already", config(quantization_config={"quant_method": "gptq"}), CANNOT, "already quantized (gptq)"),
    ("remote code", config(auto_map={"AutoModel": "m.M"}, model_type="mine"), CANNOT, "remote code (auto_map)"),
    ("no config.json", removed("model/config.json"), CANNOT, "no config.json"),
    ("broken config.json", written("model/config.json", "{"), CANNOT, "config.json: cannot be read as JSON"),
    ("config.json is a list", written("model/config.json", "[]"), CANNOT, "config.json: got a JSON list"),
    ("no model_type", config(model_type=None), CANNOT, "config.json: no model_type"),
    ("no architectures", config(architectures=None), CANNOT, "config.json: no `architectures`; expected"),
    ("unknown architecture", config(architectures=["OrakelForCausalLM"]), CANNOT, "OrakelForCausalLM"),
    ("unknown model type", config(model_type="orakel"), CANNOT, "orakel"),
    ("model of another kind", config(architectures=["BertForMaskedLM"]), CANNOT, "BertForMaskedLM cannot be lowered"),
    ("more layers than weights", config(num_hidden_layers=3), CANNOT, "model.layers.2"),
    ("no tokenizer", removed("model/tokenizer.json"), CANNOT, "no tokenizer.json"),
    ("broken tokenizer", written("model/tokenizer.json", "{}"), CANNOT, "tokenizer.json: no vocabulary in it"),
    ("tokenizer of another format", OTHER_TOKENIZER, CANNOT, "tokenizer.json: is not a tokenizer"),
    ("tokenizer larger than the model", config(vocab_size=200), CANNOT, "tokenizer.json: does not fit the model"),
    ("embedding unlike vocab_size", config(vocab_size=5000), CANNOT, "expected vocab_size 5000 of config.json"),
    ("vocab_size missing", config(vocab_size=None), CANNOT, "config.json: vocab_size: got None"),
    ("context length missing", config(max_position_embeddings=None), CANNOT, "max_position_embeddings: got None"),
    ("context length is 0", config(max_position_embeddings=0), CANNOT, "max_position_embeddings: got 0"),
]  # fmt: skip

UNBUILDABLE: list[tuple[str, Break]] = [
    ("heads do not divide", config(num_attention_heads=5)),
    ("width is a word", config(hidden_size="wide")),
    ("width is negative", config(hidden_size=-32)),
]


def refused(project: Project, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str]]:
    """Run a project in this process; return the exit code and what it said on standard error."""
    code = main([str(project.recipe), "--output", str(project.output), "--store", str(project.store), *more])
    captured = capsys.readouterr()
    assert not [line for line in captured.out.splitlines() if "artifact" in line]
    return code, captured.err.splitlines()


@pytest.mark.parametrize(
    ("spoil", "code", "text"), [case[1:] for case in RECIPES + MODELS], ids=[case[0] for case in RECIPES + MODELS]
)
def test_mistake_is_one_line_with_its_exit_code_and_nothing_is_written(
    spoil: Break,
    code: int,
    text: str,
    decoder_source: Project,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    spoil(project)
    got, lines = refused(project, capsys)
    assert len(lines) == 1
    assert got == code
    assert text in lines[0]
    assert not project.output.exists()


@pytest.mark.parametrize("spoil", [case[1] for case in UNBUILDABLE], ids=[case[0] for case in UNBUILDABLE])
def test_configuration_that_transformers_refuses_is_one_line_and_exit_4(
    spoil: Break, decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    spoil(project)
    got, lines = refused(project, capsys)
    assert (got, len(lines)) == (CANNOT, 1)


def test_all_mistakes_of_a_recipe_are_told_at_once(
    decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    for old, new in (("threads: 1", "threads: none"), ("int8", "int9"), ("- fuse_norm", "- fuse_nrm")):
        replaced(old, new)(project)
    got, lines = refused(project, capsys, "--set", "gate.alpha=3")
    assert got == WRONG
    assert len(lines) == 4


def files_beside(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")


def web_page(folder: Path) -> None:
    files_beside(folder)
    (folder / "manifest.json").write_text('{"name": "my page", "icons": []}')


def artifact_with_notes(folder: Path) -> None:
    shutil.copytree(ROOT / "tests/data/artifact-v1", folder)
    (folder / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize("prepare", [files_beside, web_page, artifact_with_notes])
def test_output_that_holds_other_files_is_refused_before_the_work(
    prepare: Callable[[Path], None], decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    prepare(project.output)
    got, (line,) = refused(project, capsys)
    assert got == WRONG
    assert line.startswith(f"--output: {project.output} holds ")
    assert (project.output / "thesis.txt").read_text() == "years of work"
    assert not project.store.exists()


@pytest.mark.parametrize("place", ["texts.jsonl", "texts.jsonl/deeper", "/proc/nobody/may"])
def test_output_that_cannot_be_a_folder_is_refused(
    place: str, decoder_source: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = decoder_source.copy(tmp_path, with_store=False)
    got, (line,) = refused(Project(project.recipe, project.store, project.folder / place), capsys)
    assert got == WRONG
    assert line.startswith("--output: ")
