"""What every served encoder has: a verified artifact of its kind, a session, a tokenizer that cuts at the context."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final, Self

from runtime.artifact import Manifest, verify
from runtime.errors import ArtifactError
from runtime.session import EncoderSession, pad_id
from runtime.tokenizer import Tokenizer

LINES_NAMED: Final = 10
_KINDS: Final = {
    "classifier": ("runtime.prediction", "TextClassifier"),
    "reranker": ("runtime.reranking", "TextReranker"),
    "embedder": ("runtime.embedding", "TextEmbedder"),
}


def open_encoder(folder: str | os.PathLike[str], manifest: Manifest, threads: int | None) -> TextEncoder:
    """Load an encoder artifact of any kind that `verify` has just returned this manifest for.

    Raises:
        ArtifactError: it is no encoder, or lacks what serving it needs.
        SessionError: its graph cannot be loaded.
    """
    if manifest.kind not in _KINDS:
        raise ArtifactError(f"{folder}: is {manifest.described_kind}, expected an encoder")
    module, name = _KINDS[manifest.kind]
    encoder: type[TextEncoder] = getattr(importlib.import_module(module), name)
    return encoder.from_verified(folder, manifest, threads=threads)


class TextEncoder:
    """A loaded encoder artifact of one kind; not thread-safe.

    Attributes:
        kind: of the artifacts it loads.
        task: what an artifact of another kind cannot do, for the message that says so.
        reads_pairs: whether a sequence holds two texts, which the graph is told apart.
    """

    kind: ClassVar[str]
    task: ClassVar[str]
    reads_pairs: ClassVar[bool] = False

    def __init__(self, manifest: Manifest, session: EncoderSession, tokenizer: Tokenizer) -> None:
        self.manifest = manifest
        self.session = session
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, threads: int | None = None, digest: str | None = None) -> Self:
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
    def from_verified(cls, folder: str | os.PathLike[str], manifest: Manifest, *, threads: int | None) -> Self:
        """Load an artifact that `verify` has just returned this manifest for."""
        if manifest.kind != cls.kind:
            article = "an" if cls.kind[0] in "aeiou" else "a"
            raise ArtifactError(f"{folder}: is {manifest.described_kind}, expected {article} {cls.kind}; {cls.task}")
        cls.require(folder, manifest)
        session = EncoderSession(Path(folder) / manifest.graphs["model"], threads=threads, pad_id=pad_id(folder))
        return cls(manifest, session, Tokenizer.load(folder, max_tokens=manifest.context_length))

    def cut_note(self, is_cut: Sequence[bool]) -> str:
        """Say how many texts were cut to the context, and in which lines the first of them are; "" if none was.

        Args:
            is_cut: of each text, a line each, whether it was cut.
        """
        lines = [str(number) for number, each in enumerate(is_cut, 1) if each]
        if not lines:
            return ""
        was, line = ("was", "line") if len(lines) == 1 else ("were", "lines")
        more = f" and {len(lines) - LINES_NAMED} more" if len(lines) > LINES_NAMED else ""
        return (
            f"{len(lines)} of {len(is_cut)} texts {was} cut to {self.manifest.context_length} tokens: "
            f"{line} {', '.join(lines[:LINES_NAMED])}{more}"
        )

    @classmethod
    def require(cls, folder: str | os.PathLike[str], manifest: Manifest) -> None:
        """Raise ArtifactError where an artifact of this kind lacks what serving it needs."""
