"""Any task of EleutherAI's lm-evaluation-harness (the extra `lm-eval`), answered by the model at its stage.

lm-eval makes the requests and scores the answers; the model is ours, for an onnx stage that of the runtime. A metric
whose value is 0 or 1 for each document (acc, acc_norm, exact_match) can be gated like any accuracy. Others are reported
as lm-eval aggregates them: of a mean of other values, or of a ratio of sums, it does not say how it varies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from optimizer.errors import CannotRun, OptimizeError
from optimizer.evaluate.flips import Changed, changed_items, effects
from optimizer.evaluate.items import Item, items_hash
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Scores
from optimizer.quantities import Drop, check_ranges
from optimizer.record import Flip
from passes._kind import first_line
from passes.base import Progress
from runtime.errors import ServingError

if TYPE_CHECKING:
    from optimizer.evaluate.scorers import Scorer
    from optimizer.gate import Budget

FEWSHOT_SEED = 1234
"""lm-eval's own default."""


@dataclass(frozen=True, kw_only=True)
class LmEvalBudget:
    """How much of its score the model may lose."""

    max_drop: Drop = field(metadata={"help": "largest loss: 1pt is a percentage point, 1% a share of the source's"})
    metric: str = field(
        default="acc", metadata={"help": "which of the task's metrics; after a comma its filter, if that is not none"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.max_drop.value < 1:
            raise ValueError(f"max_drop: got {self.max_drop}, expected above 0 and below 100")

    def limits(self, task: LmEval) -> tuple[Budget, ...]:
        """Return the gate's budget."""
        from optimizer.gate import Budget

        return (Budget("accuracy", self.max_drop.value, relative=self.max_drop.relative, score=self.metric),)


@dataclass(frozen=True)
class Document(Item):
    """One document of an lm-eval task; its requests are made by lm-eval.

    Attributes:
        requests: sha256 of the texts of its requests.
    """

    requests: str = ""


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """A task of lm-evaluation-harness; needs `pip install 'optimize-models[lm-eval]'`; an item is a document."""

    budget: ClassVar[type[LmEvalBudget]] = LmEvalBudget
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    needs_labels: ClassVar[bool] = False
    is_divisible: ClassVar[bool] = False
    data: ClassVar[str] = ""  # lm-eval's tasks name their own

    name: str | None = field(default=None, metadata={"help": "task or group that comes with lm-eval, such as arc_easy"})
    file: Path | None = field(default=None, metadata={"help": "YAML file of a task or group of your own"})
    trust_task_code: bool = field(
        default=False, metadata={"help": "allow a task of your own: its templates and functions are code"}
    )
    shots: int | None = field(default=None, metadata={"help": "examples in a prompt; else the task says", "ge": 0})
    chat: bool = field(default=False, metadata={"help": "ask through the model's chat template"})
    context: int | None = field(
        default=None, metadata={"help": "tokens of a request; longer ones are cut on the left", "ge": 2}
    )
    items: int | None = field(default=None, metadata={"help": "use the first so many documents of each task", "ge": 1})

    def __post_init__(self) -> None:
        check_ranges(self)
        if (self.name is None) == (self.file is None):
            raise ValueError(f"got {'neither' if self.name is None else 'both'}, expected one of name, file")
        if self.file is not None and not self.trust_task_code:
            raise ValueError(f"file: {self.file.name} is code: read it, then set `trust_task_code: true` to run it")

    def identity(self) -> Mapping[str, Any]:
        """Return the fields, lm-eval's version, and the hash of the files of a task of the user's own."""
        fields = asdict(self) | {"file": None, "lm_eval": version("lm_eval") if _is_installed() else ""}
        return fields if self.file is None else fields | {"file_sha256": _code_hash(self.file)}

    @property
    def reading(self) -> LmEval:
        """Return the task itself: every field decides its items."""
        return self

    def load_own(self, reader: TextReader) -> list[Item]:
        """Let lm-eval read its data and make its requests.

        Raises:
            CannotRun: lm-eval is not installed, does not know the task, or cannot read its data.
        """
        items: list[Item] = []
        with _lm_eval_errors(self._called()):
            for name, task in self._tasks()["tasks"].items():
                self._build(task, reader)
                requests: dict[int, list[Any]] = {}
                for instance in task.instances:
                    requests.setdefault(instance.doc_id, []).append([instance.request_type, *instance.args])
                for number, asked in requests.items():
                    items.append(Document((), f"{name}/{number}", requests=_sha256(asked)))
        if not items:
            raise CannotRun(f"lm_eval: {self._called()}: got no documents, expected at least one")
        return items

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return None: lm-eval does not say what guessing gets right."""
        return None

    def tally(self, items: Sequence[Item], kind: str, source: TaskResult | None) -> LmEvalInquiry:
        """Return what lets lm-eval ask a model; the source's result says which metrics are right or wrong."""
        return LmEvalInquiry(self, items, items_hash(items, self.context), source)

    def flips(self, items: Sequence[Item], before: TaskResult, after: TaskResult, reader: TextReader) -> Changed | None:
        """Return the documents that became right or wrong by the first metric that says so; lm-eval keeps the texts."""
        named = [name for name, scores in before.scores.items() if scores.metric == "accuracy" and name in after.scores]
        if not named:
            return None
        was, now = (result.scores[named[0]].values["correct"] == 1 for result in (before, after))
        effect = effects(was, now)

        def tell(index: int) -> Flip:
            first, second = ("right" if side[index] else "wrong" for side in (was, now))
            return Flip(index + 1, items[index].group, first, second, None, effect[index])

        return changed_items(was != now, effect, tell)

    def evaluate(self, lm: Any) -> Mapping[str, Any]:
        """Return what `lm_eval.evaluate` says, documents included."""
        from lm_eval.evaluator import evaluate

        with _lm_eval_errors(self._called()):
            found: Mapping[str, Any] = evaluate(
                lm, self._tasks(), limit=self.items, bootstrap_iters=0, log_samples=True, apply_chat_template=self.chat
            )
        return found

    def _called(self) -> str:
        return self.name or str(self.file)

    def _tasks(self) -> Any:
        """Load the task, or those of a group, with the number of examples that `lm_eval.simple_evaluate` would give."""
        from lm_eval.tasks import TaskManager

        if self.file is None:
            found = _shipped_tasks().load([self.name])
        else:
            found = TaskManager(include_path=self.file.parent, include_defaults=False).load([_name_in(self.file)])
        for task in found["tasks"].values():
            given = task.get_config("num_fewshot")
            if given is None or (self.shots is not None and given != 0):
                task.set_config(key="num_fewshot", value=self.shots or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return found

    def _build(self, task: Any, reader: TextReader) -> None:
        template = partial(chat_text, reader) if self.chat else None
        task.build_all_requests(limit=self.items, apply_chat_template=self.chat, chat_template=template)


def chat_text(reader: TextReader, history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """Return a conversation as the model's chat template writes it."""
    if reader.chat_template is None:
        raise CannotRun("tokenizer_config.json: has no chat_template; leave `chat` out, or use a model with one")
    return reader.chat_template.render(history, add_generation_prompt=add_generation_prompt)


class LmEvalInquiry:
    """Lets lm-eval ask a model, and turns what it finds of each document into scores."""

    def __init__(self, task: LmEval, items: Sequence[Item], name: str, source: TaskResult | None) -> None:
        self._task, self._items, self._name, self._source = task, items, name, source
        self._found: Mapping[str, Any] = {}
        self._broken: set[tuple[str, int]] = set()
        self._cut: set[tuple[str, int]] = set()

    def ask(self, scorer: Scorer, reader: TextReader | None, progress: Progress) -> None:
        """Let the model answer every request."""
        from optimizer.evaluate.lm_eval_model import ScorerLM

        if reader is None:
            raise ValueError("lm_eval: got no reader, expected the model's own to turn ids into text")
        stderr = sys.stderr

        def told(done: int, total: int, what: str) -> None:
            with redirect_stderr(stderr):
                progress(done, total, what)

        lm = ScorerLM(scorer, reader, self._task.context, told)
        self._found = self._task.evaluate(lm)
        self._broken, self._cut = lm.broken, lm.cut

    def result(self) -> TaskResult:
        """Return every metric: document by document where each value is 0 or 1, else lm-eval's own number."""
        values: dict[str, dict[str, Any]] = {}
        for task, samples in self._found["samples"].items():
            for sample in samples:
                for metric in sample["metrics"]:
                    kept = values.setdefault(_score_name(metric, sample["filter"]), {})
                    kept[f"{task}/{sample['doc_id']}"] = sample[metric]
        groups = tuple(item.group for item in self._items)
        scores = {}
        for name, of_document in values.items():
            if set(of_document) == set(groups):
                scores[name] = self._scores(name, groups, [of_document[group] for group in groups])
        is_cut = np.array([_key(group) in self._cut for group in groups])
        if is_cut.any():
            scores["cut"] = Scores("cut", self._name, groups, {"cut": is_cut}, float(is_cut.mean()))
        return TaskResult(scores)

    def _scores(self, name: str, groups: tuple[str, ...], values: Sequence[Any]) -> Scores:
        if not self._is_right_or_wrong(name, values):
            return Scores(name, self._name, groups, {}, self._aggregated(name))
        is_broken = np.array([_key(group) in self._broken for group in groups])
        correct = np.array(values, bool)
        if is_broken.any():
            correct = np.where(is_broken, np.nan, correct)
        return Scores("accuracy", self._name, groups, {"correct": correct}, float(np.mean(correct)))

    def _is_right_or_wrong(self, name: str, values: Sequence[Any]) -> bool:
        """Say whether every value is 0 or 1, and was for the source."""
        before = None if self._source is None else self._source.scores.get(name)
        if before is not None and before.metric != "accuracy":
            return False
        return all(isinstance(value, bool | int | float | np.number) and value in (0, 1) for value in values)

    def _aggregated(self, name: str) -> float:
        """Return lm-eval's own number, NaN where there are several tasks, or where the model gave no number."""
        metric, _, filtered = name.partition(",")
        results = self._found["results"]
        if len(results) != 1 or self._broken:
            return float("nan")
        (result,) = results.values()
        return float(result[f"{metric},{filtered or 'none'}"])


def _key(group: str) -> tuple[str, int]:
    task, _, number = group.rpartition("/")
    return task, int(number)


def _score_name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _name_in(file: Path) -> str:
    """Return the task or group that a YAML file defines; its other tags are lm-eval's to read."""
    for line in file.read_text(encoding="utf-8").splitlines():
        key, colon, value = line.partition(":")
        if colon and key in ("task", "group") and value.strip():
            return value.strip().strip("'\"")
    raise CannotRun(f"{file}: got no name, expected a line `task: NAME` or `group: NAME`")


def _code_hash(file: Path) -> str:
    """Return the hash of all that stands beside a task's file and may be part of it."""
    files = sorted(path for path in file.parent.iterdir() if path.suffix in (".yaml", ".yml", ".py"))
    return _sha256({path.name: path.read_text(encoding="utf-8", errors="replace") for path in files})


@cache
def _shipped_tasks() -> Any:
    """Return the index of the tasks that come with lm-eval: reading thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


@contextmanager
def _lm_eval_errors(called: str) -> Iterator[None]:
    """Keep lm-eval's log and progress bars off the terminal, and say in one line what it could not do."""
    if not _is_installed():
        raise CannotRun("lm_eval: is not installed; install it with: pip install 'optimize-models[lm-eval]'")
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    except (OptimizeError, ServingError):
        raise
    except Exception as error:  # lm-eval and the tasks' own code raise whatever goes wrong
        raise CannotRun(f"lm_eval: {called}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        log.setLevel(level)
