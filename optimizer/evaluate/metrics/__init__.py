"""Metrics as modules of the `evaluate` library, shipped so that no Hub is needed, or loaded from the user's file.

A metric of the Hub would be remote code and is refused. The file of a metric is read once: what is hashed is what runs.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import CannotRun
from optimizer.scores import ARRAYS

SHIPPED = ("accuracy", "f1")


@dataclass(frozen=True)
class Metric:
    """A loaded metric.

    Attributes:
        name: "accuracy", "f1" or the stem of the user's file.
        sha256: of the module's bytes, in hexadecimal.
        score: `_compute` of the module's `evaluate.Metric`.
    """

    name: str
    sha256: str
    score: Callable[..., Mapping[str, Any]]

    def compute(self, answers: NDArray[np.int64], references: NDArray[np.int64]) -> float:
        """Return the score of class indices [n] against the right ones [n].

        Raises:
            CannotRun: the metric fails, returns several numbers, none of them under its own name, or no number.
        """
        # `Metric.compute` would write both arrays to an Arrow file first: 7.7 ms a call against 0.01 ms.
        try:
            scores = self.score(predictions=answers, references=references)
        except Exception as error:  # the user's code, on thousands of resamples
            raise CannotRun(f"metric {self.name}: {type(error).__name__}: {error}") from None
        value = next(iter(scores.values())) if len(scores) == 1 else scores.get(self.name)
        if not isinstance(value, int | float | np.number):
            got = ", ".join(map(str, scores)) or "nothing"
            raise CannotRun(f"metric {self.name}: got the scores {got}, expected one number named {self.name!r}")
        return float(value)


def load_metric(name: str, *, trust: bool = False) -> Metric:
    """Load a shipped metric by name, or any metric module by the path of its file.

    Args:
        name: "accuracy", "f1" or a path.
        trust: whether the user allowed code that is not shipped to run.

    Raises:
        CannotRun: the metric is neither shipped nor a file, is not trusted, or the file holds no `evaluate.Metric`.
    """
    is_shipped = name in SHIPPED
    path = Path(__file__).with_name(f"{name}.py") if is_shipped else Path(name)
    if not path.is_file():
        raise CannotRun(
            f"metric {name!r}: is neither shipped ({', '.join(SHIPPED)}) nor a file; the Hub's metrics are remote code "
            "and are never fetched: save the module to a file and give its path"
        )
    if not is_shipped and path.stem in ARRAYS:
        raise CannotRun(f"metric {name}: is named like a score that is known; call the file differently")
    if not is_shipped and not trust:
        raise CannotRun(f"metric {name}: is code that is not shipped; read it, then set `trust_metric_code: true`")
    code = path.read_bytes()
    return Metric(path.stem, hashlib.sha256(code).hexdigest(), _metric_class(path, code)()._compute)


def _metric_class(path: Path, code: bytes) -> Callable[[], Any]:
    """Run a module's code and return what makes its metric."""
    import evaluate

    module = ModuleType(f"optimize_metric_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)
    except Exception as error:
        raise CannotRun(f"metric {path}: cannot be run: {type(error).__name__}: {error}") from None
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, evaluate.Metric) and kind.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise CannotRun(f"metric {path}: got the subclasses of evaluate.Metric {names}, expected exactly one")

    def make() -> Any:
        # Its constructor makes a folder for the Arrow files that `_compute` never writes.
        with tempfile.TemporaryDirectory(prefix="optimize-metric-") as folder:
            return found[0](cache_dir=folder)

    return make
