"""Macro-F1: the mean, over the classes seen in the references, of each class's F1."""

import datasets  # noqa: TID253 - a metric module is loaded by path, when it is needed
import evaluate  # noqa: TID253
import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import f1_score  # noqa: TID253


class F1(evaluate.Metric):  # type: ignore[misc]
    """Macro-F1 of class indices."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean F1 over the classes seen in the references.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        # The classes are fixed by the references: otherwise a wrong answer in a new class would change the denominator.
        labels = np.unique(references)
        return {"f1": float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0))}
