"""A recipe: YAML in, a frozen `Recipe` out, or every mistake at once, each with file, line and column.

A relative path is looked for in the recipe's folder first, then in the working folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from optimizer import catalogue
from optimizer.catalogue import Catalogue
from optimizer.document import BESIDE_PASS, compose, override, scalar
from optimizer.errors import CommandError, Mistake, RecipeError
from optimizer.evaluate.task import Task
from optimizer.hub import HubId
from optimizer.reader import BAD, Reader, Special, join, one_of, recipe_fields, suggest
from optimizer.recipe import (
    SERVED,
    DataSource,
    Fallback,
    Gate,
    Keep,
    OnFail,
    Policy,
    Recipe,
    Skip,
    Target,
    changes_weights,
)
from optimizer.sensitivity import kept_formats
from passes.base import TORCH, Pass, Stage
from runtime.artifact import KINDS
from runtime.bench import METRICS, metrics_of


def load(path: Path | str, settings: Sequence[str] = (), *, choices: Catalogue | None = None) -> Recipe:
    """Read a recipe from a file, with `--set` settings applied.

    Raises:
        CommandError: there is no such file.
        RecipeError: the recipe is wrong; holds every mistake.
    """
    path = Path(path)
    return parse(_text_of(path), str(path), (path.resolve().parent, Path.cwd()), settings, choices=choices)


def load_policy(path: Path, settings: Sequence[str] = (), *, choices: Catalogue | None = None) -> Policy:
    """Read a policy from a file: sections of a recipe, or a whole recipe, of which the others are not looked at.

    Raises:
        CommandError: there is no such file.
        RecipeError: the policy is wrong; holds every mistake.
    """
    root = compose(_text_of(path), str(path))
    mistakes = override(root, settings)
    reader = _RecipeReader((path.resolve().parent, Path.cwd()), choices or catalogue.installed())
    policy = reader.read_policy(root)
    _require_none([*mistakes, *reader.reader.mistakes])
    return policy


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        mistake = Mistake(str(path), line, column, f"got the byte {error.object[error.start]:#x}, expected UTF-8 text")
        raise RecipeError([mistake]) from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be read, {(error.strerror or str(error)).lower()}") from None


def parse(
    text: str,
    name: str,
    folders: tuple[Path, ...] = (),
    settings: Sequence[str] = (),
    *,
    choices: Catalogue | None = None,
) -> Recipe:
    """Read a recipe from text; `name` is the file in messages, `folders` are where relative paths are looked for."""
    root = compose(text, name)
    mistakes = override(root, settings)
    reader = _RecipeReader(folders, choices or catalogue.installed())
    recipe = reader.read(root)
    _require_none([*mistakes, *reader.reader.mistakes])
    if not settings:
        return replace(recipe, text=text)
    comment = " ".join(settings).replace("\n", " ")
    return replace(recipe, text=f"# with {comment}\n{yaml.serialize(root)}")


def _require_none(mistakes: Sequence[Mistake]) -> None:
    if mistakes:
        raise RecipeError(sorted(mistakes, key=lambda mistake: (mistake.file, mistake.line, mistake.column)))


class _RecipeReader:
    """Reads the sections whose shape depends on other sections or on the catalogue."""

    def __init__(self, folders: tuple[Path, ...], choices: Catalogue) -> None:
        self.reader = Reader(folders)
        self.choices = choices
        self.data: dict[str, Any] = {}
        self.tasks: dict[str, Any] = {}
        self.fallbacks: tuple[Fallback, ...] = ()
        self.device = "cpu"
        self.ratios: list[tuple[Node, str]] = []

    def read(self, root: Node) -> Recipe:
        special: dict[str, Special] = {
            "model": self._model,
            "target": self._target,
            "data": self._data,
            "evaluate": self._evaluate,
            "gate": self._gate,
            "passes": self._passes,
        }
        recipe = self.reader.record(root, Recipe, "", special)
        self.reader.check_references({"data": self.data})
        if recipe is BAD:
            return BAD
        return replace(recipe, model_folder=self.reader.find(recipe.model), fallbacks=self.fallbacks)

    def read_policy(self, root: Node) -> Policy:
        def ignored(node: Node, where: str) -> None:
            pass

        def data(node: Node, where: str) -> Any:
            entries = self.reader.entries(node, where)
            self.data |= dict.fromkeys(entries, BAD)  # what no evaluation reads may be elsewhere, as calibration texts
            used = {name: entry for name, entry in entries.items() if name in self._data_used(root)}
            self.data |= {
                name: self.reader.record(each.value, DataSource, join(where, name)) for name, each in used.items()
            }
            return {name: self.data[name] for name in used}

        others = dict.fromkeys(recipe_fields(Recipe).keys() - recipe_fields(Policy).keys(), ignored)
        sections = {"target": self._target, "data": data, "evaluate": self._evaluate, "gate": self._gate}
        policy = self.reader.record(root, Policy, "", {**others, **sections})
        self.reader.check_references({"data": self.data})
        if policy is BAD:
            return BAD
        return replace(policy, is_recipe="passes" in self.reader.entries(root, ""))

    def _data_used(self, root: Node) -> set[str]:
        """Return the entries of `data` that evaluations name; mistakes in them are told when they are read."""
        silent = Reader()
        section = silent.entries(root, "").get("evaluate")
        tasks = silent.entries(section.value, "").values() if section else ()
        named = [silent.entries(task.value, "").get("data") for task in tasks]
        return {str(scalar(each.value)) for each in named if each and isinstance(each.value, ScalarNode)}

    def _model(self, node: Node, where: str) -> Any:
        value = self.reader.value(node, str, where)
        if value is BAD:
            return BAD
        found = self.reader.find(value)
        if found is None and HubId.parse(value) is None:
            message = f"no such folder, got {value!r}, expected a folder or org/name@revision of the Hub"
            return self.reader.mistake(node, where, message)
        if found is not None and not found.is_dir():
            return self.reader.mistake(node, where, f"got {value!r}, which is a file, expected a folder")
        return value

    def _target(self, node: Node, where: str) -> Any:
        target = self.reader.record(node, Target, where)
        self.device = "cpu" if target is BAD else target.device
        return target

    def _data(self, node: Node, where: str) -> Any:
        for name, entry in self.reader.entries(node, where).items():
            self.data[name] = self.reader.record(entry.value, DataSource, join(where, name))
        return self.data

    def _evaluate(self, node: Node, where: str) -> Any:
        for name, entry in self.reader.entries(node, where).items():
            self.tasks[name] = self._task(entry.value, join(where, name))
            if name in Gate.__dataclass_fields__:
                message = f"the name {name!r} is a key of gate itself, expected another name"
                self.reader.mistake(entry.key, where, message)
        return self.tasks

    def _task(self, node: Node, where: str) -> Any:
        before = len(self.reader.mistakes)
        entries = self.reader.entries(node, where)
        if len(self.reader.mistakes) > before:
            return BAD
        known = self.choices.tasks
        if "task" not in entries:
            return self.reader.mistake(node, where, f"missing key 'task', expected {one_of(known)}")
        chosen = entries["task"].value
        name = scalar(chosen) if isinstance(chosen, ScalarNode) else None
        if not isinstance(name, str):
            return self.reader.value(chosen, str, join(where, "task"))
        if name not in known:
            return self.reader.mistake(chosen, join(where, "task"), f"unknown task {name!r}{suggest(name, known)}")
        task = self.reader.record(node, known[name], where, {"task": lambda *_: name})
        if task is not BAD and "data" in entries:
            self._check_columns(name, task, entries["data"].value, join(where, "data"))
        return task

    def _check_columns(self, name: str, task: Task, node: Node, where: str) -> None:
        """Record that a task needs labels and its data names no column with them, or that it would leave out a text."""
        source = self.data.get(task.data, BAD)
        if source is BAD:
            return
        if getattr(task, "needs_labels", False) and source.label is None:
            message = f"data.{task.data} names no column of labels, expected `label: COLUMN` there"
            self.reader.mistake(node, where, message)
        if source.pair is not None and not getattr(task, "reads_pairs", False):
            message = f"data.{task.data} names a second text (pair), expected one text: {name} reads no more"
            self.reader.mistake(node, where, message)

    def _gate(self, node: Node, where: str) -> Any:
        budgets: dict[str, Any] = {}

        def read(name: str, task: Any) -> Special:
            def budget(node: Node, where: str) -> Any:
                if task is not BAD:
                    budgets[name] = self._budget(node, where, task)

            return budget

        gate = self.reader.record(node, Gate, where, {name: read(name, task) for name, task in self.tasks.items()})
        if gate is BAD:
            return BAD
        self._check_speeds(gate, node, where)
        return replace(gate, budgets=budgets)

    def _check_speeds(self, gate: Gate, node: Node, where: str) -> None:
        """Record each budget of a speed that no model has which the tasks can score; remember those of a ratio."""
        entries = self.reader.entries(node, where)
        kinds = [task.kinds for task in self.tasks.values() if task is not BAD]
        possible = [kind for kind in KINDS if all(kind in each for each in kinds)]
        known = [metric for metric in METRICS if any(metric in metrics_of(kind) for kind in possible)]
        for limit in gate.speeds:
            budget = entries[limit.metric]
            if possible and limit.metric not in known:
                message = f"models that {', '.join(self.tasks)} can score have no such speed, expected {one_of(known)}"
                self.reader.mistake(budget.key, join(where, limit.metric), message)
            elif limit.is_ratio:
                self.ratios.append((budget.value, join(where, limit.metric)))

    def _budget(self, node: Node, where: str, task: Task) -> Any:
        budget = self.reader.record(node, task.budget, where)
        if budget is BAD:
            return BAD
        try:
            budget.limits(task)
        except ValueError as error:  # no interval is known for this metric
            return self.reader.mistake(node, where, str(error))
        return budget

    def _passes(self, node: Node, where: str) -> Any:
        if not isinstance(node, SequenceNode) or not node.value:
            got = "an empty list" if isinstance(node, SequenceNode) else "no list"
            return self.reader.mistake(node, where, f"got {got}, expected a list of passes")
        steps = [self._step(child, join(where, str(index))) for index, child in enumerate(node.value)]
        kinds = [kind for kind, _, _ in steps]
        self._check_chain(node.value, kinds, where)
        self._check_ratios(kinds)
        self.fallbacks = tuple(fallback for _, _, fallback in steps)
        return tuple(step for _, step, _ in steps)

    def _step(self, node: Node, where: str) -> tuple[type[Pass] | None, Any, Fallback]:
        """Return the class an entry names, None when it names none, the pass, and what follows where its gate fails."""
        if not isinstance(node, MappingNode):
            return *self._pass(node, where), Fallback()
        beside = {key.value: value for key, value in node.value if key.value in BESIDE_PASS}
        rest = [(key, value) for key, value in node.value if beside.get(key.value) is not value]
        kind, step = self._pass(MappingNode(node.tag, rest, node.start_mark, node.end_mark), where)
        on_fail, otherwise = beside.get("on_fail"), beside.get("otherwise")
        return (
            kind,
            step,
            Fallback(
                otherwise=() if otherwise is None else self._rungs(otherwise, kind, join(where, "otherwise")),
                on_fail=None if on_fail is None else self.reader.value(on_fail, OnFail, join(where, "on_fail")),
            ),
        )

    def _rungs(self, node: Node, kind: type[Pass] | None, where: str) -> Any:
        if not isinstance(node, SequenceNode) or not node.value:
            got = "an empty list" if isinstance(node, SequenceNode) else "no list"
            return self.reader.mistake(node, where, f"got {got}, expected a list of passes, `keep` or `skip`")
        return tuple(self._rung(child, kind, join(where, str(index))) for index, child in enumerate(node.value))

    def _rung(self, node: Node, kind: type[Pass] | None, where: str) -> Any:
        """Read a rung: a pass that takes the place of the first, `keep: {worst: N, format: F}` or `skip`."""
        if isinstance(node, ScalarNode) and scalar(node) == "skip":
            if kind is not None and kind.reads != kind.writes:
                return self.reader.mistake(node, where, f"{kind.name()} cannot be skipped: it lowers the model")
            return Skip()
        if isinstance(node, MappingNode) and "keep" in (entries := self.reader.entries(node, where)):
            if len(entries) > 1:
                return self.reader.mistake(node, where, "got more keys, expected `keep` alone")
            keep = self.reader.record(entries["keep"].value, Keep, join(where, "keep"))
            return keep if keep is BAD or kind is None else self._checked_keep(keep, kind, entries["keep"].value, where)
        other, rung = self._pass(node, where)
        if kind is not None and other is not None and (other.reads, other.writes) != (kind.reads, kind.writes):
            message = f"{other.name()} takes a model from {other.reads} to {other.writes}, expected "
            return self.reader.mistake(node, where, f"{message}{kind.reads} to {kind.writes}, as {kind.name()} does")
        return rung

    def _checked_keep(self, keep: Keep, kind: type[Pass], node: Node, where: str) -> Any:
        known = kept_formats(kind)
        if keep.format in known:
            return keep
        expected = (
            f"a format of {one_of(known)}"
            if known
            else f"another rung: {kind.name()} gives no single layer another format"
        )
        return self.reader.mistake(node, join(where, "keep"), f"got the format {keep.format!r}, expected {expected}")

    def _pass(self, node: Node, where: str) -> tuple[type[Pass] | None, Any]:
        """Return the class an entry names, None when it names none, and the pass, BAD when it is wrong."""
        known = self.choices.passes
        if not isinstance(node, MappingNode):
            name = self.reader.value(node, str, where)
            if name is BAD:
                return None, BAD
            if name not in known:
                return None, self.reader.mistake(node, where, f"unknown pass {name!r}{suggest(name, known)}")
            empty = MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)
            return known[name], self.reader.record(empty, known[name], join(where, name))
        entries = self.reader.entries(node, where)
        name = next((name for name in entries if name in known), None)
        for other, entry in entries.items():
            if name is None:
                self.reader.unknown_key(entry, where, known, "pass")
            elif other != name:
                self.reader.mistake(entry.key, where, f"unknown key {other!r}, expected the pass {name!r} alone")
        if name is None:
            return None, BAD if entries else self.reader.mistake(node, where, "got nothing, expected a pass")
        return known[name], self.reader.record(entries[name].value, known[name], join(where, name))

    def _check_chain(self, nodes: Sequence[Node], kinds: Sequence[type[Pass] | None], where: str) -> None:
        """Record each pass that reads another stage than the one before it wrote, and an end nothing can serve."""
        stage: Stage | None = TORCH
        for index, (node, kind) in enumerate(zip(nodes, kinds, strict=True)):
            if kind is not None and stage is not None and kind.reads != stage:
                place = join(where, f"{index}.{kind.name()}")
                message = f"got a model at stage {stage}, expected {kind.reads}{self._bridge(stage, kind.reads)}"
                self.reader.mistake(node, place, message)
            stage = kind.writes if kind else None
        served = SERVED[self.device]
        if stage is not None and stage != served:
            message = f"the chain ends at stage {stage}, expected {served}, which {self.device} serves"
            self.reader.mistake(nodes[-1], where, message + self._bridge(stage, served))

    def _check_ratios(self, kinds: Sequence[type[Pass] | None]) -> None:
        """Record each ratio of speeds that would compare a graph with itself."""
        if not any(kind is None or changes_weights(kind) for kind in kinds):
            message = "the reference artifact is exported and fused as this chain is, so there is nothing to compare"
            for node, where in self.ratios:
                self.reader.mistake(node, where, f"{message}; expected no ratio, or a pass that changes the weights")

    def _bridge(self, stage: Stage, needed: Stage) -> str:
        names = [name for name, kind in self.choices.passes.items() if (kind.reads, kind.writes) == (stage, needed)]
        return f"; put {' or '.join(names)} between" if names else ""
