from dataclasses import fields, replace
from pathlib import Path

import pytest
from toy_recipes import CHOICES

import passes
from optimizer.catalogue import class_name, installed
from optimizer.errors import CommandError
from optimizer.generated import with_table
from optimizer.reader import recipe_fields
from optimizer.schema import option_lines, pass_table, recipe_schema, record_schema
from passes.base import ONNX, TORCH, Pass


def test_the_folder_of_passes_is_the_catalogue() -> None:
    files = {path.stem for path in Path(passes.__path__[0]).glob("*.py") if not path.stem.startswith("_")}
    assert set(installed().passes) == files - {"base"}


@pytest.mark.parametrize("name", installed().passes)
def test_pass_is_named_after_its_file_and_says_what_it_does(name: str) -> None:
    kind = installed().passes[name]
    assert (kind.name(), kind.__name__) == (name, class_name(name))
    assert kind.__doc__ and not kind.__doc__.startswith(kind.__name__)  # a dataclass without one gets its signature
    assert {kind.reads, kind.writes} <= {TORCH, ONNX}


@pytest.mark.parametrize("name", installed().passes)
def test_every_option_of_a_pass_has_help(name: str) -> None:
    assert all("help" in option.metadata for option in fields(installed().passes[name]))


def test_every_key_of_a_task_and_its_budget_has_help() -> None:
    for task in installed().tasks.values():
        for kind in (task, task.budget):
            assert all("help" in option.metadata for option in recipe_fields(kind).values())


def test_option_line_tells_help_choices_range_and_default() -> None:
    lines = option_lines(CHOICES.passes["quantize_toy"])
    assert lines["format"] == "what weights become; one of int8, int4; default int4"
    assert lines["ratio"] == "share of layers; a number, above 0 and at most 1; default 0.5"
    assert option_lines(CHOICES.passes["fuse_toy"])["pattern"] == "what to fuse; a text; required"


def test_own_options_come_before_inherited_ones() -> None:
    assert list(option_lines(CHOICES.passes["fuse_toy"])) == ["pattern", *option_lines(Pass)]


def test_table_has_one_row_for_each_pass() -> None:
    rows = pass_table(CHOICES).partition("\n\n")[0].splitlines()[2:]
    assert rows[1] == "| `export_toy` | Write a graph | torch → onnx (ort) | none |"
    assert [row.split("`")[1] for row in rows] == list(CHOICES.passes)


def test_an_option_that_passes_share_is_told_once() -> None:
    class Again(CHOICES.passes["quantize_toy"]):  # type: ignore[misc]
        """The same."""

    both = replace(CHOICES, passes={**CHOICES.passes, "again": Again})
    table, _, once = pass_table(both).partition("\n\n")
    told = "what weights become; one of int8, int4; default int4"
    assert told in pass_table(CHOICES) and told not in table
    assert once.count(f"| `format` | {told} |") == 1


def test_schema_of_an_option_holds_help_range_and_default() -> None:
    schema = record_schema(CHOICES.passes["quantize_toy"])
    assert schema["properties"]["ratio"] == {
        "description": "share of layers",
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "default": 0.5,
    }
    assert schema["properties"]["group_size"]["enum"] == [32, 64, "channel"]
    assert schema["properties"]["exclude"] == {"type": "array", "items": {"type": "string"}, "default": []}
    assert schema["additionalProperties"] is False


def test_schema_allows_the_bare_name_only_of_passes_that_need_no_option() -> None:
    bare, with_options = recipe_schema(CHOICES)["properties"]["passes"]["items"]["anyOf"]
    assert bare == {"enum": ["quantize_toy", "export_toy"]}
    assert with_options["properties"]["fuse_toy"]["required"] == ["pattern"]


def test_schema_knows_budgets_by_their_unit() -> None:
    budgets = recipe_schema(CHOICES)["properties"]["gate"]["additionalProperties"]["anyOf"]
    assert budgets[1]["properties"]["max_drop"]["pattern"] == r"^\d+(?:\.\d+)? ?(pt|%)$"


def test_table_replaces_what_stands_between_the_markers() -> None:
    readme = "a\n<!-- passes -->\nold\n<!-- /passes -->\nb\n"
    assert with_table(readme, "| new |\n") == "a\n<!-- passes -->\n| new |\n<!-- /passes -->\nb\n"
    with pytest.raises(CommandError, match="expected <!-- passes -->"):
        with_table("no markers", "| new |\n")
