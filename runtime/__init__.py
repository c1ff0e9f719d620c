"""Serves an artifact: verify, load, one forward pass at a time.

    from runtime import load
    model = load("artifacts/stdlib-llama-int4")
    print(model.generate("def main():").text)

It needs numpy, tokenizers, jinja2 and one build of ONNX Runtime, and loads each only when it is used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from runtime.artifact import Manifest, verify
from runtime.errors import ArtifactError, PromptError, SamplingError, ServingError, SessionError

if TYPE_CHECKING:
    from runtime.generation import Completion, TextGenerator, TextStream
    from runtime.prediction import Prediction, TextClassifier
    from runtime.sampler import SamplingParams
    from runtime.session import DecoderSession, EncoderSession
    from runtime.tokenizer import Tokenizer

__all__ = [
    "ArtifactError",
    "Completion",
    "DecoderSession",
    "EncoderSession",
    "Manifest",
    "Prediction",
    "PromptError",
    "SamplingError",
    "SamplingParams",
    "ServingError",
    "SessionError",
    "TextClassifier",
    "TextGenerator",
    "TextStream",
    "Tokenizer",
    "load",
    "verify",
]

_LATE = {
    "Completion": "generation",
    "TextGenerator": "generation",
    "TextStream": "generation",
    "Prediction": "prediction",
    "TextClassifier": "prediction",
    "SamplingParams": "sampler",
    "DecoderSession": "session",
    "EncoderSession": "session",
    "Tokenizer": "tokenizer",
}


def load(
    folder: str | os.PathLike[str], *, threads: int | None = None, context: int | None = None, digest: str | None = None
) -> TextGenerator | TextClassifier:
    """Verify an artifact and load what it holds.

    Args:
        folder: the artifact.
        threads: threads per operator; None takes what this process was given.
        context: most tokens of one sequence, for a decoder; None takes all that the model can.
        digest: the identity to insist on, as `Manifest.digest` gives it.

    Returns:
        A TextGenerator (`generate`, `stream`) for a decoder, a TextClassifier (`predict`) for a classifier.

    Raises:
        ServingError: one line that says what is wrong.
    """
    manifest = verify(folder, digest)
    if manifest.kind == "decoder":
        from runtime.generation import TextGenerator

        return TextGenerator.from_verified(folder, manifest, threads=threads, context=context)
    if manifest.kind == "classifier":
        from runtime.prediction import TextClassifier

        return TextClassifier.from_verified(folder, manifest, threads=threads)
    raise ArtifactError(f"{folder}: is an {manifest.kind}, expected a decoder or a classifier; it cannot be served yet")


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(importlib.import_module(f"runtime.{_LATE[name]}"), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
