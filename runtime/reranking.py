"""Score documents against a query with a reranker artifact, a model that reads both texts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.batching import equal_length_batches
from runtime.encoder import TextEncoder
from runtime.tokenizer import Encoded


@dataclass(frozen=True)
class Ranked:
    """One document of a ranking.

    Attributes:
        index: its place among the documents given.
        score: larger is better; from 0 to 1 where the model's activation is the sigmoid.
        document: its text.
        is_cut: whether the end of it, or of the query if that is longer, was left out, for the model reads no more.
    """

    index: int
    score: float
    document: str
    is_cut: bool = False


class TextReranker(TextEncoder):
    """A loaded reranker artifact; not thread-safe."""

    kind = "reranker"
    task = "it does not score two texts"
    reads_pairs = True

    def rank(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """Return the documents, best first; equal scores stay in the order given."""
        encoded = self.tokenizer.encode_pairs([(query, document) for document in documents])
        scores = self._scores(encoded)
        order = sorted(range(len(documents)), key=lambda index: -scores[index])
        return [Ranked(index, float(scores[index]), documents[index], encoded[index].is_cut) for index in order]

    def scores(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return the score of each pair of texts `[n]`, in the order given.

        A pair too long for the model loses tokens of its longer text. Only pairs of equal length run together, so that
        a score does not depend on the other pairs.
        """
        return self._scores(self.tokenizer.encode_pairs(pairs))

    def _scores(self, encoded: Sequence[Encoded]) -> NDArray[np.float32]:
        logits = np.empty(len(encoded), np.float32)
        for indices in equal_length_batches([len(pair.ids) for pair in encoded]):
            part = [encoded[index] for index in indices]
            logits[indices] = self.session.run([pair.ids for pair in part], [pair.types for pair in part])[:, 0]
        return self.activated(logits)

    def activated(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores of logits, as the model's activation has them."""
        return _sigmoid(logits) if self.manifest.activation == "sigmoid" else logits


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 1 / (1 + exp(-x)), from the side on which exp cannot overflow."""
    weight = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + weight), weight / (1 + weight)).astype(np.float32)
