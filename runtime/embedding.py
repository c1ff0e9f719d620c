"""Turn texts into vectors with an embedder artifact."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest, Sentence, verify
from runtime.batching import equal_length_batches
from runtime.errors import ArtifactError, PromptError
from runtime.session import EncoderSession, pad_id
from runtime.tokenizer import Tokenizer

VECTOR = "sentence_embedding"


class TextEmbedder:
    """A loaded embedder artifact; not thread-safe."""

    def __init__(self, manifest: Manifest, session: EncoderSession, tokenizer: Tokenizer, sentence: Sentence) -> None:
        self.manifest = manifest
        self.session = session
        self.tokenizer = tokenizer
        self.sentence = sentence

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, threads: int | None = None, digest: str | None = None
    ) -> TextEmbedder:
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
    def from_verified(cls, folder: str | os.PathLike[str], manifest: Manifest, *, threads: int | None) -> TextEmbedder:
        """Load an artifact that `verify` has just returned this manifest for."""
        if manifest.kind != "embedder":
            raise ArtifactError(f"{folder}: is {manifest.described_kind}, expected an embedder; it makes no vectors")
        if manifest.sentence is None or manifest.outputs[0].name != VECTOR:
            raise ArtifactError(
                f"{folder}: ends in {manifest.outputs[0].name}, expected {VECTOR}: its source has no modules.json of "
                "sentence-transformers that says how tokens become one vector; add one to the source, build it again"
            )
        session = EncoderSession(Path(folder) / manifest.graphs["model"], threads=threads, pad_id=pad_id(folder))
        return cls(manifest, session, Tokenizer.load(folder, max_tokens=manifest.context_length), manifest.sentence)

    @property
    def width(self) -> int:
        """Return how many numbers a vector has."""
        return int(self.manifest.outputs[0].shape[-1])

    def embed(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        """Return the vector of each text, float32 `[n, width]`, in the order given.

        Texts longer than the model reads are cut. What a text gets does not depend on the others: only texts of equal
        length run together.

        Args:
            texts: any number of texts.
            prompt: name of the prompt put before each of them, such as "query"; None takes the model's default, which
                is none for most.

        Raises:
            PromptError: the model has no such prompt, or a text cannot be encoded.
        """
        before = self._prompt(prompt)
        read = [before + text for text in texts]
        return self.vectors(
            self.tokenizer.encode_batch([text.lower() for text in read] if self.sentence.lower_case else read)
        )

    def vectors(self, batch_of_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors `[n, width]` of n sequences of token ids, in the order given."""
        result = np.empty((len(batch_of_ids), self.width), np.float32)
        for indices in equal_length_batches([len(ids) for ids in batch_of_ids]):
            result[indices] = self.session.run([batch_of_ids[index] for index in indices])
        return result

    def _prompt(self, name: str | None) -> str:
        prompts, name = self.sentence.prompts, self.sentence.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in prompts:
            known = ", ".join(prompts) or "none: this model has no prompts"
            raise PromptError(f"prompt: got {name!r}, expected {known}")
        return prompts[name]
