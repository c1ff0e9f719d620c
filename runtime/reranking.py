"""Score documents against a query with a reranker artifact, a model that reads both texts at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest, verify
from runtime.batching import equal_length_batches
from runtime.errors import ArtifactError
from runtime.session import EncoderSession, pad_id
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ranked:
    """One document of a ranking.

    Attributes:
        index: its place among the documents given.
        score: larger is better; from 0 to 1 where the model's activation is the sigmoid.
        document: its text.
    """

    index: int
    score: float
    document: str


class TextReranker:
    """A loaded reranker artifact; not thread-safe."""

    def __init__(self, manifest: Manifest, session: EncoderSession, tokenizer: Tokenizer) -> None:
        self.manifest = manifest
        self.session = session
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, threads: int | None = None, digest: str | None = None
    ) -> TextReranker:
        """Verify an artifact and load it.

        Args:
            folder: the artifact.
            threads: threads per operator; None takes what this process was given.
            digest: the identity to insist on.

        Raises:
            ServingError: one line that says what is wrong.
        """
        return cls.from_verified(folder, verify(folder, digest), threads=threads)

    @classmethod
    def from_verified(cls, folder: str | os.PathLike[str], manifest: Manifest, *, threads: int | None) -> TextReranker:
        """Load an artifact that `verify` has just returned this manifest for."""
        if manifest.kind != "reranker":
            raise ArtifactError(
                f"{folder}: is {manifest.described_kind}, expected a reranker; it does not score two texts"
            )
        session = EncoderSession(Path(folder) / manifest.graphs["model"], threads=threads, pad_id=pad_id(folder))
        return cls(manifest, session, Tokenizer.load(folder, max_tokens=manifest.context_length))

    def rank(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """Return the documents, best first; equal scores stay in the order given."""
        scores = self.scores([(query, document) for document in documents])
        order = sorted(range(len(documents)), key=lambda index: -scores[index])
        return [Ranked(index, float(scores[index]), documents[index]) for index in order]

    def scores(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return the score of each pair of texts `[n]`, in the order given.

        A pair too long for the model loses tokens of its longer text. Only pairs of equal length run together, so that
        a score does not depend on the other pairs.
        """
        encoded = self.tokenizer.encode_pairs(pairs)
        logits = np.empty(len(encoded), np.float32)
        for indices in equal_length_batches([len(ids) for ids, _ in encoded]):
            ids, types = zip(*(encoded[index] for index in indices), strict=True)
            logits[indices] = self.session.run(ids, types)[:, 0]
        return _sigmoid(logits) if self.manifest.activation == "sigmoid" else logits


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 1 / (1 + exp(-x)), from the side on which exp cannot overflow."""
    weight = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + weight), weight / (1 + weight)).astype(np.float32)
