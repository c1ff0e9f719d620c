"""A recipe: what to make of which model, on what it is judged, and what it may lose. Frozen data, no reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from optimizer.errors import CommandError
from optimizer.evaluate.task import Task, TaskBudget
from optimizer.quantities import check_ranges
from optimizer.reader import suggest
from optimizer.speed import LatencyBudget, RateBudget, SpeedLimit
from passes.base import ONNX, TORCH, Pass
from runtime.bench import METRICS, Workload

SERVED = {"cpu": ONNX}
"""The stage the runtime serves on each device."""


def changes_weights(kind: type[Pass]) -> bool:
    """Say whether a pass makes another model of it, rather than lower it: the reference artifact goes without."""
    return (kind.reads, kind.writes) == (TORCH, TORCH)


class Name(str):
    """A name that is also a folder's."""

    pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    expected = "a name of letters, digits, '.', '_' and '-'"

    @classmethod
    def parse(cls, text: str) -> Name:
        """Read a name; raise ValueError for one that cannot be a folder's."""
        if len(text) > 100 or not re.fullmatch(cls.pattern, text):
            raise ValueError(cls.expected)
        return cls(text)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the artifact will run."""

    device: Literal["cpu"] = field(default="cpu", metadata={"help": "what the artifact runs on"})
    threads: int | None = field(default=None, metadata={"help": "threads to use; all there are if not given", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Texts from local files; exactly one of `json` (one object per line, or an array) and `csv`."""

    json: Path | tuple[Path, ...] | None = field(default=None, metadata={"help": "JSON file or files"})
    csv: Path | tuple[Path, ...] | None = field(default=None, metadata={"help": "CSV file or files with a header"})
    text: str = field(default="text", metadata={"help": "column with the text"})
    pair: str | None = field(default=None, metadata={"help": "column with a second text"})
    label: str | None = field(default=None, metadata={"help": "column with the label"})
    score: str | None = field(default=None, metadata={"help": "column with how similar the two texts are, a number"})
    group: str | None = field(
        default=None, metadata={"help": "column that ties items together: same passage, document or template"}
    )
    items: int | None = field(default=None, metadata={"help": "use the first so many", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)
        if (self.json is None) == (self.csv is None):
            given = "neither" if self.json is None else "both"
            raise ValueError(f"got {given}, expected one of json, csv")
        if self.score is not None and self.pair is None:
            raise ValueError(f"score: got {self.score!r} and no pair, expected `pair: COLUMN` with the second text")
        if not self.files:
            raise ValueError("got an empty list, expected a file or files")

    @property
    def format(self) -> Literal["json", "csv"]:
        """Return the builder of `datasets` that reads the files."""
        return "csv" if self.json is None else "json"

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files, in the order of the recipe."""
        given = self.csv if self.json is None else self.json
        return given if isinstance(given, tuple) else (given,) if given else ()


@dataclass(frozen=True, kw_only=True)
class SizeBudget:
    """How large the artifact's weights may be."""

    max_ratio: float = field(metadata={"help": "largest size as a share of the source's weights", "gt": 0})

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What the artifact may lose against the source.

    Attributes:
        budgets: by the name of the evaluation they judge.
    """

    alpha: float = field(
        default=0.05, metadata={"help": "chance of passing a model that is over budget", "gt": 0, "lt": 0.5}
    )
    fail_alpha: float | None = field(
        default=None, metadata={"help": "chance of failing a model within budget; else alpha", "gt": 0, "lt": 0.5}
    )
    size: SizeBudget | None = field(default=None, metadata={"help": "budget of the weights' size"})
    prefill_tokens_per_s: RateBudget | None = field(default=None, metadata={"help": "budget of a decoder's prompts"})
    decode_tokens_per_s: RateBudget | None = field(default=None, metadata={"help": "budget of a decoder's answers"})
    texts_per_s: RateBudget | None = field(default=None, metadata={"help": "budget of an encoder's batches"})
    ttft_ms: LatencyBudget | None = field(default=None, metadata={"help": "budget of the time to a first token"})
    latency_ms: LatencyBudget | None = field(default=None, metadata={"help": "budget of the time of one whole request"})
    workload: Workload = field(default=Workload(), metadata={"help": "what is asked where speed is measured"})
    budgets: Mapping[str, TaskBudget] = field(default_factory=dict, metadata={"in_recipe": False})

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def speeds(self) -> tuple[SpeedLimit, ...]:
        """Return what is demanded of the artifact's speed."""
        given = ((metric, getattr(self, metric)) for metric in METRICS)
        return tuple(limit for metric, budget in given if budget for limit in budget.limits(metric))


@dataclass(frozen=True, kw_only=True)
class Keep:
    """A rung of `otherwise`: the same pass, the layers it damages most in another format."""

    worst: int = field(metadata={"help": "so many layers, those whose change alone does most harm", "ge": 1})
    format: str = field(metadata={"help": "their format, one the pass takes in `overrides`"})
    calibration: str | None = field(
        default=None,
        metadata={"help": "entry of `data` with texts to find them by; else items that choose", "names": "data"},
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Skip:
    """A rung of `otherwise`: the model goes on as it was."""


Rung: TypeAlias = Pass | Keep | Skip
OnFail: TypeAlias = Literal["stop", "report"]


def rung_text(rung: Rung) -> str:
    """Return a rung as a recipe says it, in a few words."""
    if isinstance(rung, Skip):
        return "skip"
    if isinstance(rung, Keep):
        return f"keep worst {rung.worst} in {rung.format}"
    changed = [option for option in fields(rung) if getattr(rung, option.name) != option.default]
    return " ".join([rung.name(), *(f"{option.name} {getattr(rung, option.name)}" for option in changed)])


@dataclass(frozen=True)
class Fallback:
    """What follows where the gate after a pass fails.

    Attributes:
        otherwise: tried in this order, once the pass itself does not do.
        on_fail: "stop" ends the run when nothing is left to try; "report" says so and goes on. None: "stop", but
            "report" before a pass that recovers what this one may lose.
    """

    otherwise: tuple[Rung, ...] = ()
    on_fail: OnFail | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to make of which model, on what it is judged, and what it may lose.

    Attributes:
        fallbacks: of each pass; empty where no pass has any.
        model_folder: the folder `model` names, None when it names a model of the Hub.
        text: the recipe as YAML with every `--set` applied.
    """

    name: Name = field(metadata={"help": "name of the artifact"})
    model: str = field(metadata={"help": "folder of a Hugging Face model, or org/name@revision of the Hub"})
    target: Target = field(default=Target(), metadata={"help": "where the artifact will run"})
    data: Mapping[str, DataSource] = field(default_factory=dict, metadata={"help": "texts, by name"})
    evaluate: Mapping[str, Task] = field(default_factory=dict, metadata={"help": "what is scored after every pass"})
    gate: Gate = field(default=Gate(), metadata={"help": "what each score may lose against the source"})
    passes: tuple[Pass, ...] = field(metadata={"help": "the steps, in order"})
    fallbacks: tuple[Fallback, ...] = field(default=(), metadata={"in_recipe": False})
    model_folder: Path | None = field(default=None, metadata={"in_recipe": False})
    text: str = field(default="", metadata={"in_recipe": False})

    def limits(self, evaluation: str) -> tuple[Any, ...]:
        """Return the `gate.Budget` of each metric of an evaluation; empty when it is only reported."""
        return _limits(self.gate, self.evaluate, evaluation)

    def fallback(self, index: int) -> Fallback:
        """Return what follows where the gate after a pass fails."""
        return self.fallbacks[index] if self.fallbacks else Fallback()

    def reports_only(self, index: int) -> bool:
        """Tell whether the gate after a pass is only reported: demanding more would forbid to prune, then distil."""
        asked = self.fallback(index).on_fail
        is_recovered = self.passes[index].loses and any(later.recovers for later in self.passes[index + 1 :])
        return asked == "report" or (asked is None and is_recovered)

    @property
    def rungs(self) -> int:
        """Return how many models the recipe may offer at most: one, and one more for each rung of a fallback."""
        return 1 + sum(len(fallback.otherwise) for fallback in self.fallbacks)

    def index_of(self, pass_name: str) -> int:
        """Return where a pass first stands in the chain; raise CommandError when it does not."""
        names = [step.name() for step in self.passes]
        if pass_name not in names:
            raise CommandError(f"--stop-after: unknown pass {pass_name!r}{suggest(pass_name, names)}")
        return names.index(pass_name)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """On what two artifacts are compared, and what the second may lose against the first: sections of a recipe.

    Attributes:
        is_recipe: it stands in a whole recipe, whose budgets of size and speed count against the source there.
    """

    target: Target = field(default=Target(), metadata={"help": "where the artifacts run"})
    data: Mapping[str, DataSource] = field(default_factory=dict, metadata={"help": "texts, by name"})
    evaluate: Mapping[str, Task] = field(default_factory=dict, metadata={"help": "what is scored"})
    gate: Gate = field(default=Gate(), metadata={"help": "what each score may lose against the baseline"})
    is_recipe: bool = field(default=False, metadata={"in_recipe": False})

    def limits(self, evaluation: str) -> tuple[Any, ...]:
        """Return the `gate.Budget` of each metric of an evaluation; empty when it is only reported."""
        return _limits(self.gate, self.evaluate, evaluation)


def _limits(gate: Gate, tasks: Mapping[str, Task], evaluation: str) -> tuple[Any, ...]:
    return gate.budgets[evaluation].limits(tasks[evaluation]) if evaluation in gate.budgets else ()
