"""Share of predictions that equal their reference."""

import datasets  # noqa: TID253 - a metric module is loaded by path, when it is needed
import evaluate  # noqa: TID253
from numpy.typing import ArrayLike
from sklearn.metrics import accuracy_score  # noqa: TID253


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Accuracy of class indices."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
