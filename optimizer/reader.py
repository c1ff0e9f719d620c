"""YAML nodes to typed, frozen dataclasses: strict, every mistake collected, each at its line and column.

Written by hand on the nodes, not with a validation library over plain data: positions, units (`1%`, `1pt`) and wording
come out of one walk, with no translation of another library's errors.
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from optimizer.document import mistake_at, scalar
from optimizer.errors import Mistake
from optimizer.quantities import describe_range, range_mistake
from passes.base import PassError

T = TypeVar("T")
Special = Callable[[Node, str], Any]
"""Reads the value of one key, given its node and its place; returns BAD when it recorded a mistake."""
BAD: Any = object()
"""What a value that could not be read becomes; the mistake is already recorded."""


@dataclass(frozen=True)
class Entry:
    """One `key: value` of a mapping."""

    key: Node
    value: Node


@dataclass(frozen=True)
class Reference:
    """A text that must be a name defined elsewhere in the recipe."""

    section: str
    name: str
    node: Node
    where: str


@dataclass
class Reader:
    """Turns nodes into values of declared types and keeps every mistake met on the way.

    Attributes:
        folders: where a relative path is looked for, in this order.
    """

    folders: tuple[Path, ...] = ()
    mistakes: list[Mistake] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)

    def mistake(self, node: Node, where: str, message: str) -> Any:
        """Record a mistake at `node`; return BAD."""
        self.mistakes.append(mistake_at(node.start_mark, f"{where}: {message}" if where else message))
        return BAD

    def entries(self, node: Node, where: str, expected: str = "a mapping") -> dict[str, Entry]:
        """Return a mapping's entries by key; keys are texts, each there once."""
        if isinstance(node, ScalarNode) and scalar(node) is None:
            return {}
        if not isinstance(node, MappingNode):
            self.mistake(node, where, f"got {describe_node(node)}, expected {expected}")
            return {}
        found: dict[str, Entry] = {}
        for key, value in node.value:
            name = scalar(key) if isinstance(key, ScalarNode) else None
            if not isinstance(name, str):
                self.mistake(key, where, f"got {describe_node(key)} as a key, expected a name")
            elif name in found:
                first = found[name].key.start_mark.line + 1
                self.mistake(key, where, f"the key {name!r} is here twice, first in line {first}")
            else:
                found[name] = Entry(key, value)
        return found

    def unknown_key(self, entry: Entry, where: str, known: Iterable[str], what: str = "key") -> None:
        """Record that a key is none of the known ones."""
        name = str(scalar(entry.key)) if isinstance(entry.key, ScalarNode) else ""
        self.mistake(entry.key, where, f"unknown {what} {name!r}{suggest(name, known)}")

    def record(self, node: Node, kind: type[T], where: str, special: Mapping[str, Special] = MappingProxyType({})) -> T:
        """Read a mapping into the dataclass `kind`, the keys in `special` by functions of their own; BAD when wrong."""
        before = len(self.mistakes)
        entries = self.entries(node, where)
        if len(self.mistakes) > before and not entries:
            return BAD  # type: ignore[no-any-return]
        options, types_of = recipe_fields(kind), hints(kind)
        values = {}
        for name, option in options.items():
            if name in entries and name in special:
                values[name] = special[name](entries[name].value, join(where, name))
            elif name in entries:
                values[name] = self.option(entries[name].value, types_of[name], option, join(where, name))
            elif is_required(option):
                self.mistake(node, where, f"missing key {name!r}, expected {describe_type(types_of[name])}")
        for name, entry in entries.items():
            if name not in options and name in special:
                special[name](entry.value, join(where, name))
            elif name not in options:
                self.unknown_key(entry, where, {**options, **special})
        if len(self.mistakes) > before:
            return BAD  # type: ignore[no-any-return]
        try:
            return kind(**values)
        except (ValueError, PassError) as error:
            return self._refused(node, entries, where, str(error))  # type: ignore[no-any-return]

    def option(self, node: Node, hint: Any, option: Field[Any], where: str) -> Any:
        """Read the value of one field: its type, its range, and the section it names an entry of."""
        value = self.value(node, hint, where)
        if value is BAD:
            return BAD
        expected = range_mistake(value, option.metadata)
        if expected:
            return self.mistake(node, where, f"got {describe_node(node)}, expected {expected}")
        if "names" in option.metadata and isinstance(value, str):
            self.references.append(Reference(option.metadata["names"], value, node, where))
        return value

    def value(self, node: Node, hint: Any, where: str) -> Any:
        """Read a value of the type `hint`; BAD when it is not one."""
        for kind in alternatives(hint):
            if accepts(node, kind):
                return self._accepted(node, kind, where)
        got = describe_node(node)
        guess = _closest(node, hint)
        return self.mistake(node, where, f"got {got}, expected {describe_type(hint)}{guess}")

    def _accepted(self, node: Node, kind: Any, where: str) -> Any:
        if is_dataclass(kind) and not hasattr(kind, "parse"):
            return self.record(node, cast(type, kind), where)
        if isinstance(node, SequenceNode):
            item = get_args(kind)[0]
            values = [self.value(child, item, join(where, str(index))) for index, child in enumerate(node.value)]
            return BAD if any(value is BAD for value in values) else tuple(values)
        if isinstance(node, MappingNode):
            item = get_args(kind)[1]
            pairs = {
                name: self.value(entry.value, item, join(where, name))
                for name, entry in self.entries(node, where).items()
            }
            return BAD if any(value is BAD for value in pairs.values()) else pairs
        assert isinstance(node, ScalarNode)
        if kind is Path:
            return self._file(node, where)
        if hasattr(kind, "parse"):
            return kind.parse(node.value)
        return float(node.value) if kind is float else scalar(node)

    def _file(self, node: ScalarNode, where: str) -> Any:
        path = self.find(node.value)
        if path is None:
            folders = " or ".join(dict.fromkeys(str(folder) for folder in self.folders))
            return self.mistake(node, where, f"no such file, got {node.value!r}, looked in {folders}")
        if not path.is_file():
            return self.mistake(node, where, f"got {node.value!r}, which is a folder, expected a file")
        return path

    def find(self, written: str) -> Path | None:
        """Return the first existing path that `written` names, None when there is none."""
        candidates = (folder / Path(written).expanduser() for folder in self.folders)
        try:
            return next((path for path in candidates if path.exists()), None)
        except (OSError, ValueError):  # a name too long, or with a null character
            return None

    def check_references(self, sections: Mapping[str, Iterable[str]]) -> None:
        """Record each reference to a name its section does not define."""
        for reference in self.references:
            names = sections[reference.section]
            if reference.name not in names:
                message = f"{reference.section} has no entry {reference.name!r}{suggest(reference.name, names)}"
                self.mistake(reference.node, reference.where, message)

    def _refused(self, node: Node, entries: Mapping[str, Entry], where: str, message: str) -> Any:
        """Record what a dataclass refused; a message that starts with `field:` is placed at that field."""
        name, colon, rest = message.partition(": ")
        if colon and name in entries:
            return self.mistake(entries[name].value, join(where, name), rest)
        return self.mistake(node, where, message)


def recipe_fields(kind: Any) -> dict[str, Field[Any]]:
    """Return the fields of a dataclass that a recipe may set, those of the class itself before inherited ones."""
    assert is_dataclass(kind)
    names = [name for each in cast(type, kind).__mro__ for name in inspect.get_annotations(each)]
    options = [option for option in fields(kind) if option.init and option.metadata.get("in_recipe", True)]
    return {option.name: option for option in sorted(options, key=lambda option: names.index(option.name))}


def hints(kind: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    return get_type_hints(kind)


def is_required(option: Field[Any]) -> bool:
    """Say whether a field has no default."""
    return option.default is MISSING and option.default_factory is MISSING


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,)


def accepts(node: Node, kind: Any) -> bool:
    """Say whether a node has the outer form of `kind`, which is no union."""
    origin = get_origin(kind)
    if isinstance(node, SequenceNode):
        return origin in {tuple, list}
    if isinstance(node, MappingNode):
        return origin in {Mapping, dict} or (is_dataclass(kind) and not hasattr(kind, "parse"))
    if hasattr(kind, "parse"):
        return _parses(kind, node.value)
    assert isinstance(node, ScalarNode)
    value = scalar(node)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    return type(value) in {int, float} if kind is float else type(value) is (str if kind is Path else kind)


def describe_node(node: Node) -> str:
    """Say what is written, as short as it can be told."""
    if isinstance(node, MappingNode):
        return "a mapping"
    if isinstance(node, SequenceNode):
        return "a list"
    assert isinstance(node, ScalarNode)
    value = scalar(node)
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return "nothing" if value is None else str(node.value)


def describe_type(hint: Any) -> str:
    """Say in words what a type takes."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    return " or ".join(_describe_kind(kind) for kind in kinds)


def describe_option(hint: Any, option: Field[Any]) -> str:
    """Say in words what a field takes, its range included."""
    limits = describe_range(option.metadata)
    return f"{describe_type(hint)}, {limits}" if limits else describe_type(hint)


def _describe_kind(kind: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a file"}
    if hasattr(kind, "parse"):
        return str(kind.expected)
    origin = get_origin(kind)
    if origin is Literal:
        return one_of(get_args(kind))
    if origin is tuple or origin is list:
        return f"a list of {_describe_kind(get_args(kind)[0]).removeprefix('a ')}s"
    return words.get(kind, "a mapping")


def one_of(choices: Iterable[object]) -> str:
    """List what there is to choose from."""
    names = [str(choice) for choice in choices]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for a near miss, else the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f", expected {one_of(known)}" if known else ", and there is none"


def join(where: str, name: str) -> str:
    """Extend a dotted path."""
    return f"{where}.{name}" if where else name


def _closest(node: Node, hint: Any) -> str:
    choices = [str(choice) for kind in alternatives(hint) if get_origin(kind) is Literal for choice in get_args(kind)]
    close = difflib.get_close_matches(node.value, choices, n=1) if isinstance(node, ScalarNode) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _parses(kind: Any, text: str) -> bool:
    try:
        kind.parse(text)
    except ValueError:
        return False
    return True
