"""What the dataclasses say: JSON Schemas of what is read and told for programs, the table of passes for people."""

from __future__ import annotations

import inspect
import re
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from optimizer.catalogue import Catalogue
from optimizer.markdown import table
from optimizer.planned import FORMAT as PLAN_FORMAT
from optimizer.planned import Plan
from optimizer.reader import alternatives, describe_option, hints, is_required, recipe_fields
from optimizer.recipe import Gate, Keep, OnFail, Recipe
from optimizer.record import FORMAT, Against, Comparison, Run, SizeVerdict
from passes.base import Pass

JsonSchema = dict[str, Any]
_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", types.NoneType: "null"}


def recipe_schema(choices: Catalogue) -> JsonSchema:
    """Return the JSON Schema (draft 7, which editors know best) of a recipe."""
    schema = record_schema(Recipe)
    sections = schema["properties"]
    tasks = [_task_schema(name, task) for name, task in choices.tasks.items()]
    sections["evaluate"] |= {"type": "object", "additionalProperties": {"anyOf": tasks}}
    budgets = [record_schema(task.budget) for task in choices.tasks.values()]
    sections["gate"] |= {**record_schema(Gate), "additionalProperties": {"anyOf": budgets}}
    sections["passes"] |= {"type": "array", "minItems": 1, "items": _passes_schema(choices.passes)}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "optimize recipe", **schema}


def run_schema() -> JsonSchema:
    """Return the JSON Schema (draft 7) of what `optimize RECIPE --json` prints."""
    return _told(Run, "optimize run", {"size": _size_schema()})


def compare_schema() -> JsonSchema:
    """Return the JSON Schema (draft 7) of what `optimize compare --json` prints."""
    against = document_schema(Against)
    against["properties"]["size"] = _size_schema()
    return _told(Comparison, "optimize compare", {"against": {"type": "array", "items": against}})


def plan_schema() -> JsonSchema:
    """Return the JSON Schema (draft 7) of what `optimize plan --json` prints."""
    return _told(Plan, "optimize plan", {}, {"format": {"const": PLAN_FORMAT}})


_RECORD: JsonSchema = {"format": {"const": FORMAT}, "exit_code": {"enum": [0, 1, 3]}}


def _told(kind: type, title: str, changes: JsonSchema, added: JsonSchema = _RECORD) -> JsonSchema:
    """Return the schema of a document, with `added` before all else."""
    schema = document_schema(kind)
    schema["properties"] = added | schema["properties"] | changes
    schema["required"] = list(schema["properties"])
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title, **schema}


def _size_schema() -> JsonSchema:
    size = document_schema(SizeVerdict)
    more = {"ratio": {"type": "number"}, "outcome": {"enum": ["pass", "fail"]}}
    size |= {"properties": size["properties"] | more, "required": [*size["required"], *more]}
    return {"anyOf": [size, {"type": "null"}]}


def document_schema(kind: Any) -> JsonSchema:
    """Return the schema of a dataclass as it is printed: every field is there; a number that is not finite is null."""
    told = _attributes(kind)
    properties = {
        option.name: ({"description": told[option.name]} if option.name in told else {})
        | _printed_schema(hints(kind)[option.name])
        for option in fields(kind)
    }
    return {
        "type": "object",
        "description": first_line(kind),
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


def record_schema(kind: type) -> JsonSchema:
    """Return the schema of a dataclass: its fields with their help, ranges, choices and defaults."""
    options = recipe_fields(kind)
    schema: JsonSchema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _option_schema(hints(kind)[name], option) for name, option in options.items()},
    }
    required = [name for name, option in options.items() if is_required(option)]
    return schema | ({"required": required} if required else {})


def pass_table(choices: Catalogue) -> str:
    """Return the passes and their options as a Markdown table, and one of the options that several passes share."""
    described = {name: _own_lines(kind) for name, kind in choices.passes.items()}
    uses = Counter(line for lines in described.values() for line in lines.items())
    shared = {line for line, count in uses.items() if count > 1}
    rows = []
    for name, kind in choices.passes.items():
        own = [f"`{option}`: {text}" for option, text in described[name].items() if (option, text) not in shared]
        others = [f"`{option}`" for option, text in described[name].items() if (option, text) in shared]
        options = "<br>".join([*own, *([", ".join(others)] if others else [])])
        rows.append((f"`{name}`", first_line(kind), f"{kind.reads} → {kind.writes}", options or "none"))
    once = [(f"`{option}`", text) for option, text in uses if (option, text) in shared]
    tables = [table(("pass", "what it does", "reads → writes", "options"), _piped(rows))]
    if once:
        tables.append(table(("option of several passes", "what it is"), _piped(once)))
    return "\n\n".join(tables) + "\n"


def _piped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Return cells that may hold what would end them."""
    return [[cell.replace("|", r"\|") for cell in row] for row in rows]


def _own_lines(kind: type) -> dict[str, str]:
    """Return the options of a pass but for those that all have."""
    return {option: text for option, text in option_lines(kind).items() if option not in recipe_fields(Pass)}


def passes_text(choices: Catalogue) -> str:
    """Return the passes and their options as plain text."""
    lines = []
    for name, kind in choices.passes.items():
        lines += [f"{name}  {kind.reads} → {kind.writes}", f"  {first_line(kind)}."]
        lines += [f"    {option}: {text}" for option, text in option_lines(kind).items()]
    return "\n".join(lines) + "\n"


def option_lines(kind: type) -> dict[str, str]:
    """Return what each field of a dataclass is, takes and defaults to, in one line."""
    lines = {}
    for name, option in recipe_fields(kind).items():
        parts = [option.metadata.get("help", ""), describe_option(hints(kind)[name], option), _default_text(option)]
        lines[name] = "; ".join(part for part in parts if part)
    return lines


def first_line(kind: type) -> str:
    """Return the first sentence of a class's docstring."""
    return (kind.__doc__ or "").strip().split("\n")[0].rstrip(".")


def written(value: Any) -> str:
    """Return a default as a recipe writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(written(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {written(item)}' for name, item in value.items())}}}"
    return str(value)


def _default_text(option: Field[Any]) -> str:
    if is_required(option):
        return "required"
    return f"default {written(option.default)}" if option.default not in {MISSING, None} else ""


def _task_schema(name: str, task: type) -> JsonSchema:
    schema = record_schema(task)
    schema["properties"] = {"task": {"const": name, "description": first_line(task)}, **schema["properties"]}
    return schema | {"required": ["task", *schema.get("required", [])]}


def _passes_schema(passes: Mapping[str, type[Pass]]) -> JsonSchema:
    bare = [name for name, kind in passes.items() if not any(map(is_required, recipe_fields(kind).values()))]
    options = {name: record_schema(kind) | {"description": first_line(kind)} for name, kind in passes.items()}
    one = {"type": "object", "additionalProperties": False, "minProperties": 1}
    keep = one | {"properties": {"keep": record_schema(Keep) | {"description": first_line(Keep)}}}
    rungs = {"anyOf": [{"enum": [*bare, "skip"]}, one | {"maxProperties": 1, "properties": options}, keep]}
    beside = {
        "otherwise": {
            "type": "array",
            "minItems": 1,
            "items": rungs,
            "description": "tried in this order where the gate after the pass fails",
        },
        "on_fail": {"enum": list(get_args(OnFail)), "description": "what a gate that fails does once nothing is left"},
    }
    return {"anyOf": [{"enum": bare}, one | {"maxProperties": 1 + len(beside), "properties": options | beside}]}


def _option_schema(hint: Any, option: Field[Any]) -> JsonSchema:
    schemas = [_type_schema(kind, option.metadata) for kind in alternatives(hint)]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if "help" in option.metadata:
        schema = {"description": option.metadata["help"]} | schema
    if isinstance(option.default, bool | int | float | str | tuple):
        schema = schema | {"default": list(option.default) if isinstance(option.default, tuple) else option.default}
    return schema


def _type_schema(kind: Any, metadata: Mapping[str, Any]) -> JsonSchema:
    origin = get_origin(kind)
    if hasattr(kind, "parse"):
        return {"type": "string", "pattern": kind.pattern}
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _type_schema(get_args(kind)[0], {})}
    if origin is not None:
        item = get_args(kind)[1]
        return {"type": "object", "additionalProperties": _type_schema(item, {}) if _is_closed(item) else {}}
    if kind in _SCALARS:
        limits = {word: metadata[key] for key, word in _LIMITS.items() if key in metadata}
        return {"type": _SCALARS[kind], **(limits if kind in {int, float} else {})}
    return record_schema(kind) if _is_closed(kind) else {}


def _printed_schema(hint: Any) -> JsonSchema:
    kinds = alternatives(hint)
    if len(kinds) > 1:
        return {"anyOf": [_printed_schema(kind) for kind in kinds]}
    origin = get_origin(hint)
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin is tuple:
        return {"type": "array", "items": _printed_schema(get_args(hint)[0])}
    if origin is not None:
        return {"type": "object", "additionalProperties": _printed_schema(get_args(hint)[1])}
    if hint is float:
        return {"type": ["number", "null"]}
    return {"type": _SCALARS[hint]} if hint in _SCALARS else document_schema(hint)


def _attributes(kind: type) -> dict[str, str]:
    """Return what the `Attributes:` of a docstring say, by name."""
    _, _, text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.+(?:\n     .+)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


def _is_closed(kind: Any) -> bool:
    return get_origin(kind) is not None or kind in _SCALARS or hasattr(kind, "__dataclass_fields__")
