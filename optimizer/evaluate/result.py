"""What a task found out about one model, and how it is kept: `result.json` and `result.npz`, data only, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.gate import Scores

FORMAT = 1


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


def _below(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
