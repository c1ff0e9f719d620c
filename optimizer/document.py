"""YAML text to nodes that know their line and column; bounded, without aliases, with YAML 1.2 scalars."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from optimizer.errors import Mistake, RecipeError

LARGEST_BYTES = 1 << 20
DEEPEST = 32
SET = "--set "
BESIDE_PASS = ("otherwise", "on_fail")
"""Keys that stand beside a pass in an entry of `passes`."""

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, object] = {"": None, "~": None, "null": None, "true": True, "false": False}


def mistake_at(mark: Any, message: str) -> Mistake:
    """Place a message at a YAML mark; what `--set` gave has no line."""
    if mark.name.startswith(SET):
        return Mistake(mark.name, 0, 0, message)
    return Mistake(mark.name, mark.line + 1, mark.column + 1, message)


def compose(text: str, name: str) -> Node:
    """Read one YAML document; raise RecipeError when it is not one, too large, too deep or has aliases or tags."""
    if len(text) > LARGEST_BYTES:
        raise RecipeError([Mistake(name, 1, 1, f"got {len(text)} characters, expected at most {LARGEST_BYTES}")])
    stream = _Named(text, name)
    try:
        _check_events(stream)
        node = _Loader(stream).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"not YAML: {error.problem or error.context}"
        raise RecipeError([mistake_at(mark, message) if mark else Mistake(name, 1, 1, message)]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        message = f"not YAML: the character {chr(error.character)!r} is not allowed"
        raise RecipeError([Mistake(name, line, column, message)]) from None
    if node is None:
        raise RecipeError([Mistake(name, 1, 1, "got an empty document, expected a recipe")])
    return node


def scalar(node: ScalarNode) -> object:
    """Return the value of a scalar by YAML 1.2's core rules: `yes` is text, `1e-3` a number; no infinity, no NaN."""
    text = node.value
    if node.style is not None:
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text) and len(text) < 20:
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def override(root: Node, settings: Sequence[str]) -> list[Mistake]:
    """Apply `passes.0.group_size=32` and its like to the nodes in place; return what could not be applied."""
    mistakes = []
    for setting in settings:
        name = SET + setting
        path, equals, text = setting.partition("=")
        if not equals or not all(path.split(".")):
            mistakes.append(Mistake(name, 0, 0, f"got {setting!r}, expected PATH=VALUE such as passes.0.group_size=32"))
            continue
        try:
            _assign(root, path.split("."), compose(text or "null", name))
        except RecipeError as error:
            mistakes.extend(error.mistakes)
    return mistakes


class _Loader(yaml.SafeLoader):
    """A SafeLoader whose marks carry the recipe's name."""

    def __init__(self, stream: _Named) -> None:
        super().__init__(stream.text)
        self.name = stream.name


class _Named:
    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name


def _check_events(stream: _Named) -> None:
    """Refuse aliases, tags and deep nesting before PyYAML recurses into them."""
    loader = _Loader(stream)
    depth = 0
    while loader.check_event():
        event: yaml.Event = loader.get_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError([mistake_at(event.start_mark, f"got the alias *{event.anchor}, expected its value")])
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise RecipeError([mistake_at(event.start_mark, f"got the tag {tag}, expected a plain value")])
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise RecipeError([mistake_at(event.start_mark, f"nested deeper than {DEEPEST} levels")])


def _assign(root: Node, path: Sequence[str], value: Node) -> None:
    parent = root
    for depth, step in enumerate(path[:-1]):
        child = _child(parent, step, path[:depth], value)
        if child is None:
            child = MappingNode("tag:yaml.org,2002:map", [], value.start_mark, value.end_mark)
            _put(parent, step, child)
        is_pass = list(path[:depth]) == ["passes"] and path[depth + 1] not in BESIDE_PASS
        parent = _options(parent, step, child) if is_pass else child
    _child(parent, path[-1], path[:-1], value)
    _put(parent, path[-1], value)


def _child(parent: Node, step: str, path: Sequence[str], value: Node) -> Node | None:
    """Return what `step` names below `parent`, None when a mapping lacks it; raise RecipeError when it cannot be."""
    where = ".".join(path) or "the recipe"
    if isinstance(parent, SequenceNode):
        if step.isdecimal() and int(step) < len(parent.value):
            return _as_node(parent.value[int(step)])
        message = f"{where}: got entry {step!r}, expected 0 to {len(parent.value) - 1}"
        raise RecipeError([mistake_at(value.start_mark, message)])
    if isinstance(parent, MappingNode):
        return next((child for key, child in parent.value if key.value == step), None)
    raise RecipeError([mistake_at(value.start_mark, f"{where}: is a single value, it has no {step!r}")])


def _put(parent: Node, step: str, value: Node) -> None:
    if isinstance(parent, SequenceNode):
        parent.value[int(step)] = value
        return
    for index, (key, _) in enumerate(parent.value):
        if key.value == step:
            parent.value[index] = (key, value)
            return
    parent.value.append((ScalarNode("tag:yaml.org,2002:str", step, value.start_mark, value.end_mark), value))


def _options(passes: Node, index: str, entry: Node) -> Node:
    """Return the mapping of a pass's options, made when the pass is written by its bare name."""
    if isinstance(entry, ScalarNode):
        entry = MappingNode("tag:yaml.org,2002:map", [(entry, _empty(entry))], entry.start_mark, entry.end_mark)
        _put(passes, index, entry)
    named = entry.value if isinstance(entry, MappingNode) else []
    places = [place for place, (name, _) in enumerate(named) if name.value not in BESIDE_PASS]
    if len(places) != 1:
        return entry
    name, options = entry.value[places[0]]
    if isinstance(options, ScalarNode) and scalar(options) is None:
        options = _empty(name)
        entry.value[places[0]] = (name, options)
    return _as_node(options)


def _empty(node: Node) -> MappingNode:
    return MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)


def _as_node(value: object) -> Node:
    assert isinstance(value, Node)
    return value
