"""Serves an artifact: verify, load, one forward pass at a time.

    from runtime import load
    model = load("artifacts/stdlib-llama-int4")
    print(model.generate("def main():").text)

It needs numpy, tokenizers, jinja2 and one build of ONNX Runtime, and loads each only when it is used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, cast

from runtime.artifact import Manifest, verify
from runtime.errors import ArtifactError, DigestError, PromptError, SamplingError, ServingError, SessionError

if TYPE_CHECKING:
    from runtime.async_engine import AsyncEngine
    from runtime.embedding import TextEmbedder
    from runtime.engine import Engine, Ticket
    from runtime.generation import TextGenerator, TextStream
    from runtime.logprobs import TokenLogprob
    from runtime.prediction import Prediction, TextClassifier
    from runtime.request import Completion, Piece, Request
    from runtime.reranking import Ranked, TextReranker
    from runtime.sampler import SamplingParams
    from runtime.session import DecoderSession, EncoderSession
    from runtime.tokenizer import Tokenizer

__all__ = [
    "ArtifactError",
    "AsyncEngine",
    "Completion",
    "DecoderSession",
    "DigestError",
    "EncoderSession",
    "Engine",
    "Manifest",
    "Piece",
    "Prediction",
    "PromptError",
    "Ranked",
    "Request",
    "SamplingError",
    "SamplingParams",
    "ServingError",
    "SessionError",
    "TextClassifier",
    "TextEmbedder",
    "TextGenerator",
    "TextReranker",
    "TextStream",
    "Ticket",
    "TokenLogprob",
    "Tokenizer",
    "load",
    "verify",
]

_LATE = {
    "AsyncEngine": "async_engine",
    "Completion": "request",
    "Piece": "request",
    "Request": "request",
    "TokenLogprob": "logprobs",
    "Engine": "engine",
    "Ticket": "engine",
    "TextGenerator": "generation",
    "TextStream": "generation",
    "TextEmbedder": "embedding",
    "Prediction": "prediction",
    "TextClassifier": "prediction",
    "Ranked": "reranking",
    "TextReranker": "reranking",
    "SamplingParams": "sampler",
    "DecoderSession": "session",
    "EncoderSession": "session",
    "Tokenizer": "tokenizer",
}


def load(
    folder: str | os.PathLike[str], *, threads: int | None = None, context: int | None = None, digest: str | None = None
) -> TextGenerator | TextClassifier | TextReranker | TextEmbedder:
    """Verify an artifact and load what it holds.

    Args:
        folder: the artifact.
        threads: threads per operator; None takes what this process was given.
        context: most tokens of one sequence, for a decoder; None takes all that the model can.
        digest: the identity to insist on, as `Manifest.digest` gives it.

    Returns:
        A TextGenerator (`generate`, `stream`) for a decoder, a TextClassifier (`predict`) for a classifier, a
        TextReranker (`rank`, `scores`) for a reranker, a TextEmbedder (`embed`) for an embedder.

    Raises:
        ServingError: one line that says what is wrong.
    """
    manifest = verify(folder, digest)
    if manifest.kind == "decoder":
        from runtime.generation import TextGenerator

        return TextGenerator.from_verified(folder, manifest, threads=threads, context=context)
    from runtime.encoder import open_encoder

    return cast("TextClassifier | TextReranker | TextEmbedder", open_encoder(folder, manifest, threads))


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(importlib.import_module(f"runtime.{_LATE[name]}"), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
