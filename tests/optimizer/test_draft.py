import json
from pathlib import Path

import pytest
import yaml

from optimizer.catalogue import installed
from optimizer.cli import main
from optimizer.draft import draft, recipe_name
from optimizer.errors import CannotRun, RecipeError
from optimizer.recipe_reader import load

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
RECIPES = Path(__file__).parents[2] / "recipes"
BERT = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}


def write_model(folder: Path, architecture: str, **config: object) -> Path:
    folder.mkdir()
    family = architecture.partition("For")[0].removesuffix("Model").lower()
    content = {"architectures": [architecture], "model_type": family, "max_position_embeddings": 256, **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("architecture", "labels", "tasks"),
    [
        ("LlamaForCausalLM", 0, ["perplexity", "agreement"]),
        ("BertForSequenceClassification", 2, ["accuracy"]),
        ("BertForSequenceClassification", 1, ["similarity"]),
        ("BertModel", 0, ["similarity"]),
    ],
)
def test_drafted_recipe_is_right_once_its_data_is_there(
    architecture: str, labels: int, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "Toy Model", architecture, num_labels=labels)
    assert main(["init", "Toy Model", "--output", "new.yaml"]) == 0
    with pytest.raises(RecipeError, match=r"new\.yaml:10:11: data\.held_out\.json: no such file"):
        load("new.yaml")
    (tmp_path / "held_out.jsonl").write_text("")
    recipe = load("new.yaml")
    assert list(recipe.evaluate) == tasks == list(recipe.gate.budgets)
    assert {task.context for task in recipe.evaluate.values()} == {256}  # type: ignore[attr-defined]


def test_draft_takes_the_users_file_by_its_format() -> None:
    text = draft("org/model", LLAMA, installed(), data="texts.csv")
    assert '    csv: "texts.csv"\n' in text
    assert "context: 1024" in text


def test_draft_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "toy", "LlamaForCausalLM")
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    assert main(["init", str(model), "--output", str(mine)]) == 2
    assert capsys.readouterr().err == f"{mine}: exists already; name another file with --output\n"
    assert mine.read_text() == "mine"


def test_draft_refuses_an_architecture_it_has_no_recipe_for() -> None:
    with pytest.raises(
        CannotRun, match=r"org/model: config\.json: BertForMaskedLM cannot be lowered; expected a \.\.\.For"
    ):
        draft("org/model", {"architectures": ["BertForMaskedLM"]}, installed())


def test_draft_refuses_a_decoder_whose_state_no_pass_lowers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "toy", "MambaForCausalLM", num_hidden_layers=2)
    assert main(["init", str(model), "--output", str(tmp_path / "new.yaml")]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{model}: export_onnx: MambaForCausalLM keeps other state than keys and values: ")
    assert not (tmp_path / "new.yaml").exists()


def test_draft_is_made_where_the_configuration_does_not_tell() -> None:
    config = {"architectures": ["BltForCausalLM"], "model_type": "blt"}  # whose layers are counted elsewhere
    assert "`optimize plan` tells whether they can take this model" in draft("org/model", config, installed())


def test_draft_refuses_a_model_type_that_transformers_does_not_know() -> None:
    with pytest.raises(CannotRun, match=r"org/model: config\.json: model_type lama is not in transformers"):
        draft("org/model", {**LLAMA, "model_type": "lama"}, installed())


def test_draft_proposes_for_a_classifier_what_its_recipe_does() -> None:
    proposed = yaml.safe_load(draft("org/model", BERT, installed()))
    shown = yaml.safe_load((RECIPES / "minilm-banking77.yaml").read_text())
    assert shown["passes"] == [{"quantize_int8": {"embedding": "int8"}}, "export_onnx", "fuse_attention"]
    assert proposed["passes"] == [*shown["passes"][:2], {"fuse_attention": {"optional": True}}]


def columns_in(text: str) -> dict[str, str]:
    """Return what the drafted recipe says of its data, but for the file."""
    return {key: name for key, name in yaml.safe_load(text)["data"]["held_out"].items() if key not in {"csv", "json"}}


@pytest.mark.parametrize(
    ("config", "name", "content", "columns"),
    [
        (BERT, "d.csv", "text,category\nx,y\n", {"text": "text", "label": "category"}),
        (BERT, "d.csv", "\ufeffIntent,Utterance\nx,y\n", {"text": "Utterance", "label": "Intent"}),
        (BERT, "d.csv", 'topic,Text,"text"\nx,y,z\n', {"text": "text", "label": "topic"}),
        (BERT, "d.jsonl", '{"sentence": "a", "label": 1}\n{"x": 1}\n', {"text": "sentence", "label": "label"}),
        (BERT, "d.json", '[\n{"sentence": "a", "label": 1}]', {"text": "sentence", "label": "label"}),
        (LLAMA, "d.jsonl", '{"document": "a", "content": "b"}', {"text": "content", "group": "document"}),
        (
            {**BERT, "num_labels": 1},
            "d.csv",
            "query,passage,score\na,b,1\n",
            {"text": "query", "pair": "passage", "score": "score"},
        ),
    ],
)
def test_draft_takes_the_columns_that_are_there(
    config: dict[str, object], name: str, content: str, columns: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    assert columns_in(draft("org/model", config, installed(), data=str(tmp_path / name))) == columns


def test_draft_lists_the_columns_where_none_is_called_as_one_would_think(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text,"a\nb",mood\nx,y,z\n')
    lines = [line.strip() for line in draft("org/model", BERT, installed(), data=str(path)).splitlines()]
    place = lines.index(f'# set `label` to one of the columns of "{path}": "text", "a\\nb", "mood"')
    assert lines[place - 1].startswith("text: text ")
    assert lines[place + 1].startswith("label: label ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": ', "cannot be read as json: "),
        ("d.jsonl", '"text"', "row 1: got 'text', expected an object with a text in it"),
        ("d.jsonl", "{}", "got no columns, expected rows with a text"),
        ("d.csv", "", "is empty, expected rows"),
        ("d.csv", "\n", "got no columns, expected rows with a text"),
        ("d.csv", '"text', "header (line 1): its double quotes do not match"),
    ],
)
def test_draft_refuses_data_whose_columns_cannot_be_read(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = write_model(tmp_path / "toy", "BertForSequenceClassification"), tmp_path / name
    path.write_text(content)
    assert main(["init", str(model), "--data", str(path), "--output", str(tmp_path / "new.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: {message}")
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_config_that_is_no_object_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["init", str(tmp_path)]) == 4
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/My_Model-1.5@main", "my_model-1.5-int4"), ("a b/", "a-b-int4"), ("org/模型", "model-int4")],
)
def test_recipe_is_named_after_the_model(model: str, name: str) -> None:
    assert recipe_name(model, "int4") == name
