"""What a task found out about one model, and how it is kept: `result.json` and `result.npz`, data only, no pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from optimizer.fingerprint import fingerprint
from optimizer.gate import Scores
from optimizer.scores import ARRAYS
from optimizer.statistics.spearman import spearman

FORMAT = 1
LARGEST_LOG = 700.0
"""Its exponential is still a finite number."""
Compute: TypeAlias = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass(frozen=True, eq=False)
class TaskResult:
    """The scores of one task on one model.

    Attributes:
        scores: by name; a score that is the only one of its kind is called like its metric.
        reference: arrays that other models' results are compared with; only a source's agreement has them.
    """

    scores: Mapping[str, Scores]
    reference: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the result into `folder`, which is made; equal results give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[Any]] = {f"reference/{key}": self.reference[key] for key in sorted(self.reference)}
        entries = {}
        for name, scores in sorted(self.scores.items()):
            entries[name] = {"metric": scores.metric, "items": scores.items, "groups": list(scores.groups)}
            # A point may be NaN or infinite, which JSON cannot say.
            arrays[f"point/{name}"] = np.array(scores.point)
            arrays.update({f"values/{name}/{key}": scores.values[key] for key in sorted(scores.values)})
        np.savez(folder / "result.npz", allow_pickle=False, **arrays)
        text = json.dumps({"format": FORMAT, "scores": entries}, sort_keys=True, indent=1)
        (folder / "result.json").write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> TaskResult:
    """Read what `TaskResult.save` wrote.

    Raises:
        ValueError: the folder holds a newer format.
    """
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise ValueError(f"{folder}: result format, got {record['format']}, expected {FORMAT}; evaluate again")
    with np.load(folder / "result.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    scores = {
        name: Scores(
            metric=entry.get("metric", name),
            items=entry["items"],
            groups=tuple(entry["groups"]),
            values=_below(arrays, f"values/{name}/"),
            point=float(arrays[f"point/{name}"]),
        )
        for name, entry in record["scores"].items()
    }
    return TaskResult(scores, _below(arrays, "reference/"))


def joined(parts: Sequence[TaskResult], compute: Compute | None = None) -> TaskResult:
    """Return the result on all items of several results on different items of one task.

    Args:
        parts: in the order of the items.
        compute: takes answers and references [n] of a score that no formula is known for, returns the score.
    """
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part.scores)
    scores = {name: _joined([_score(part, name) for part in parts], compute) for name in names}
    kept = [name for name in parts[0].reference if all(name in part.reference for part in parts)]
    return TaskResult(scores, {name: np.concatenate([part.reference[name] for part in parts]) for name in kept})


def _score(part: TaskResult, name: str) -> Scores:
    """Return a score; one that only other parts have, such as the share of cut prompts, is 0 here."""
    if name in part.scores:
        return part.scores[name]
    other = next(iter(part.scores.values()))
    return Scores(name, other.items, other.groups, {name: np.zeros(len(other.groups), bool)}, 0.0)


def _joined(parts: Sequence[Scores], compute: Compute | None) -> Scores:
    metric = parts[0].metric
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
    return Scores(
        metric=metric,
        items=fingerprint([part.items for part in parts]),
        groups=tuple(group for part in parts for group in part.groups),
        values=values,
        point=_point(metric, values, compute) if all(math.isfinite(part.point) for part in parts) else math.nan,
    )


def _point(metric: str, values: Mapping[str, NDArray[Any]], compute: Compute | None) -> float:
    """Return a score from its per-item values, as the task itself would."""
    if "tokens" in values or "bytes" in values:
        sums, sizes = (values[name] for name in ARRAYS[metric])
        mean = float(sums.sum() / sizes.sum())
        return mean if metric != "perplexity" else math.exp(mean) if mean < LARGEST_LOG else math.inf
    if metric == "spearman":
        return spearman(values["reference"], values["answer"])
    if compute is not None and "reference" in values:
        return compute(values["answer"], values["reference"])
    return float(np.mean(values["correct" if metric == "accuracy" else metric]))


def _below(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
