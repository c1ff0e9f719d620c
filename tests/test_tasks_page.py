"""docs/tasks.md names every task, and the tasks it shows can be read."""

import re
from pathlib import Path

import pytest

from optimizer.catalogue import installed
from optimizer.recipe_reader import parse

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^ {4}(?:evaluate: \{)?(\w+): +(\{task: .*?\})\}?(?: +#.*)?$", PAGE, re.MULTILINE)
DATA = ("mine", "arc", "yesno", "gsm8k")
RECIPE = """\
name: page
model: org/model@main
data: {{{data}}}
evaluate:
  {name}: {task}
passes: [export_onnx]
"""


def test_the_table_holds_every_task() -> None:
    assert set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)) == set(installed().tasks)


def test_the_page_shows_tasks() -> None:
    assert len(SHOWN) == 6


@pytest.mark.parametrize(("name", "task"), SHOWN, ids=[name for name, _ in SHOWN])
def test_each_task_that_is_shown_can_be_read(tmp_path: Path, name: str, task: str) -> None:
    (tmp_path / "d.jsonl").touch()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine\n")
    data = ", ".join(f"{entry}: {{json: d.jsonl}}" for entry in DATA)
    recipe = parse(RECIPE.format(data=data, name=name, task=task), "recipe.yaml", (tmp_path,))
    assert list(recipe.evaluate) == [name]
