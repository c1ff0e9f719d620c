"""Turn texts into vectors with an embedder artifact."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest, Sentence
from runtime.batching import equal_length_batches
from runtime.encoder import TextEncoder
from runtime.errors import ArtifactError, PromptError
from runtime.tokenizer import Encoded

VECTOR = "sentence_embedding"


class TextEmbedder(TextEncoder):
    """A loaded embedder artifact; not thread-safe."""

    kind = "embedder"
    task = "it makes no vectors"

    @classmethod
    def require(cls, folder: str | os.PathLike[str], manifest: Manifest) -> None:
        """Refuse an embedder whose source did not say how tokens become one vector."""
        if manifest.sentence is None or manifest.outputs[0].name != VECTOR:
            raise ArtifactError(
                f"{folder}: ends in {manifest.outputs[0].name}, expected {VECTOR}: its source has no modules.json of "
                "sentence-transformers that says how tokens become one vector; add one to the source, build it again"
            )

    @property
    def sentence(self) -> Sentence:
        """Return how texts are read; `require` has made sure that it is there."""
        assert self.manifest.sentence is not None
        return self.manifest.sentence

    @property
    def width(self) -> int:
        """Return how many numbers a vector has."""
        return int(self.manifest.outputs[0].shape[-1])

    def embed(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        """Return the vector of each text, float32 `[n, width]`, in the order given.

        Texts longer than the model reads are cut. What a text gets does not depend on the others, but for last bits of
        one that is alone: only texts of equal length run together.

        Args:
            texts: any number of texts.
            prompt: name of the prompt put before each of them, such as "query"; None takes the model's default, which
                is none for most.

        Raises:
            PromptError: the model has no such prompt, or a text cannot be encoded.
        """
        return self.vectors([each.ids for each in self.encode(texts, prompt)])

    def encode(self, texts: Sequence[str], prompt: str | None = None) -> list[Encoded]:
        """Return what `embed` reads of each text, with its prompt.

        Raises:
            PromptError: as `embed`.
        """
        before = self._prompt(prompt)
        read = [before + text for text in texts]
        return self.tokenizer.encode_batch([text.lower() for text in read] if self.sentence.lower_case else read)

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
