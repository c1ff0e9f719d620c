"""Classify texts with a classifier artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.encoder import TextEncoder
from runtime.errors import ArtifactError, SessionError

BATCH_TEXTS: Final = 32


@dataclass(frozen=True)
class Prediction:
    """The most likely class of one text.

    Attributes:
        label: its name.
        index: its place among the logits.
        probability: its softmax probability.
        is_cut: whether the end of the text was left out, for the model reads no more.
    """

    label: str
    index: int
    probability: float
    is_cut: bool = False


class TextClassifier(TextEncoder):
    """A loaded classifier artifact; not thread-safe."""

    kind = "classifier"
    task = "it cannot predict labels"

    def predict(self, texts: Sequence[str], batch: int = BATCH_TEXTS) -> list[Prediction]:
        """Return the most likely class of each text, in the order given.

        Texts longer than the model's context are cut to it.

        Args:
            texts: any number of texts.
            batch: texts per forward pass; texts of similar length run together.
        """
        encoded = self.tokenizer.encode_batch(texts)
        logits = self.logits([each.ids for each in encoded], batch)
        labels = self.manifest.labels or [f"LABEL_{index}" for index in range(logits.shape[1])]
        if len(labels) != logits.shape[1]:
            got = f"got {logits.shape[1]} logits, expected one for each of {len(labels)} labels"
            raise ArtifactError(f"{self.manifest.graphs['model']}: {got}; build the artifact again")
        chosen = logits.argmax(axis=1)
        return [
            Prediction(labels[index], int(index), float(probability), each.is_cut)
            for index, probability, each in zip(chosen, _largest_probability(logits), encoded, strict=True)
        ]

    def logits(self, batch_of_ids: Sequence[Sequence[int]], batch: int = BATCH_TEXTS) -> NDArray[np.float32]:
        """Return the logits `[n, labels]` of n sequences of token ids, in the order given."""
        if batch < 1:
            raise SessionError(f"batch: got {batch}, expected at least 1")
        order = sorted(range(len(batch_of_ids)), key=lambda item: len(batch_of_ids[item]))
        result = np.zeros((len(order), len(self.manifest.labels or ())), np.float32)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            rows = self.session.run([batch_of_ids[item] for item in part])
            if start == 0:
                result = np.empty((len(order), rows.shape[1]), np.float32)
            result[part] = rows
        return result


def _largest_probability(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return max softmax of each row `[n, labels]` -> `[n]`."""
    if not logits.size:
        return np.zeros(len(logits))
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities: NDArray[np.float64] = 1 / np.exp(shifted).sum(axis=1)
    return probabilities
