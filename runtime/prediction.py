"""Classify texts with a classifier artifact."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest
from runtime.batching import equal_length_batches
from runtime.encoder import TextEncoder
from runtime.errors import ArtifactError


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

    @classmethod
    def require(cls, folder: str | os.PathLike[str], manifest: Manifest) -> None:
        """Refuse a classifier whose names are not as many as its logits."""
        logits, labels = manifest.outputs[0].shape[-1], manifest.labels
        if labels is None and not isinstance(logits, int):
            raise ArtifactError(f"{folder}: says neither labels nor the number of its logits; build the artifact again")
        if labels is not None and isinstance(logits, int) and len(labels) != logits:
            got = f"got {logits} logits, expected one for each of {len(labels)} labels"
            raise ArtifactError(f"{folder}: {got}; build the artifact again")

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the name of each class, in the order of the logits; LABEL_0 and so on where the source had none."""
        if self.manifest.labels is not None:
            return self.manifest.labels
        return tuple(f"LABEL_{index}" for index in range(int(self.manifest.outputs[0].shape[-1])))

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the most likely class of each text, in the order given.

        Texts longer than the model's context are cut to it. What a text gets does not depend on the others, but for
        last bits of one that is alone: only texts of equal length run together.
        """
        encoded = self.tokenizer.encode_batch(texts)
        logits = self.logits([each.ids for each in encoded])
        chosen, labels = logits.argmax(axis=1), self.labels
        return [
            Prediction(labels[index], int(index), float(row[index]), each.is_cut)
            for index, row, each in zip(chosen, probabilities(logits), encoded, strict=True)
        ]

    def logits(self, batch_of_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the logits `[n, labels]` of n sequences of token ids, in the order given."""
        result = np.empty((len(batch_of_ids), len(self.labels)), np.float32)
        for indices in equal_length_batches([len(ids) for ids in batch_of_ids]):
            result[indices] = self.session.run([batch_of_ids[index] for index in indices])
        return result


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the softmax of each row `[n, labels]`."""
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True, initial=-np.inf))
    result: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return result
