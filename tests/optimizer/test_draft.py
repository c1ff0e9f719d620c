import json
from pathlib import Path

import pytest

from optimizer.catalogue import installed
from optimizer.cli import main
from optimizer.draft import draft, recipe_name
from optimizer.errors import CannotRun, RecipeError
from optimizer.recipe_reader import load


def write_model(folder: Path, architecture: str, **config: object) -> Path:
    folder.mkdir()
    content = {"architectures": [architecture], "max_position_embeddings": 256, **config}
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
    text = draft("org/model", {"architectures": ["LlamaForCausalLM"]}, installed(), data="texts.csv")
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
