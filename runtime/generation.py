"""Generate text with a decoder artifact: prompt in, pieces of text out, one sequence at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Unpack

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest, verify
from runtime.errors import ArtifactError, PromptError, ServingError
from runtime.pace import LEAST_TOKENS, prefill_chunks
from runtime.request import Answer, Completion, Options, Prompt, Request, RequestReader, take_next
from runtime.session import DecoderSession
from runtime.tokenizer import Tokenizer

MOST_LOGITS_BYTES: Final = 2**25


class TextGenerator:
    """A loaded decoder artifact. It holds one sequence at a time and is not thread-safe."""

    def __init__(self, manifest: Manifest, session: DecoderSession, tokenizer: Tokenizer) -> None:
        self.manifest = manifest
        self.session = session
        self.tokenizer = tokenizer
        self._reader = RequestReader(manifest, tokenizer, session.vocabulary, session.capacity)
        self._current: TextStream | None = None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        context: int | None = None,
        digest: str | None = None,
    ) -> TextGenerator:
        """Verify an artifact and load it.

        Args:
            folder: the artifact.
            threads: threads per operator; None takes what this process was given.
            context: most tokens of prompt and answer together; None takes all that the model can.
            digest: the identity to insist on.

        Raises:
            ServingError: one line that says what is wrong.
        """
        return cls.from_verified(folder, verify(folder, digest), threads=threads, context=context)

    @classmethod
    def from_verified(
        cls, folder: str | os.PathLike[str], manifest: Manifest, *, threads: int | None, context: int | None
    ) -> TextGenerator:
        """Load an artifact that `verify` has just returned this manifest for."""
        return cls(manifest, open_decoder(folder, manifest, threads, context), Tokenizer.load(folder))

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Generate an answer and return it whole; arguments as for `stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> TextStream:
        """Start to generate an answer, to be read piece by piece.

        The prompt is checked at once and computed when the first piece is asked for. A later call takes the cache over:
        of two streams only the younger can be read on.

        Args:
            prompt: a text to continue, messages `{"role": ..., "content": ...}` for the chat template, or token ids.
            options: what may be said of the answer, as `Options` has it.

        Raises:
            PromptError: when the prompt is empty, leaves no room in the context, or an argument is out of range.
        """
        self._current = TextStream(self, self._reader.read(prompt, **options))
        return self._current

    def is_current(self, stream: TextStream) -> bool:
        """Whether the cache still belongs to this stream."""
        return self._current is stream


class TextStream(Iterator[str]):
    """An answer being generated: iterate over its pieces, then ask for `completion`."""

    def __init__(self, generator: TextGenerator, request: Request) -> None:
        self._generator = generator
        self._answer = Answer(request, generator.tokenizer)
        self._away_s = 0.0
        self._is_read = False
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The whole answer.

        Raises:
            ServingError: while pieces are left to be read.
        """
        if not self._is_read:
            raise ServingError("stream: the answer is not finished; read all its pieces first")
        return self._answer.completion(self._away_s)

    def _run(self) -> Iterator[str]:
        session, answer = self._generator.session, self._answer
        logits = self._prefill(answer)
        while answer.finish_reason is None:
            (piece,) = take_next([answer], logits)
            if isinstance(piece, ServingError):
                raise piece
            if piece.text:
                left = time.perf_counter()
                yield piece.text
                if answer.finish_reason is None:
                    self._away_s += time.perf_counter() - left  # the reader's time, not ours
            if answer.finish_reason is None:
                self._check_current()
                logits = session.decode([answer.ids[-1]], [len(answer.request.ids) + len(answer.ids) - 1])
        self._is_read = True

    def _prefill(self, answer: Answer) -> NDArray[np.float32]:
        """Run the prompt and return the logits [1, V] after its last token."""
        self._check_current()
        past, logits = 0, np.empty((0, 0), np.float32)
        for size in prefill_chunks(len(answer.request.ids)):
            logits = run_prompt(self._generator.session, answer, past, size)
            past += size
        return logits

    def _check_current(self) -> None:
        if not self._generator.is_current(self):
            raise ServingError("stream: a later call has taken the cache over; read one answer at a time")


def run_prompt(
    session: DecoderSession,
    answer: Answer,
    past: int,
    tokens: int,
    slot: int = 0,
    most_logits_bytes: int = MOST_LOGITS_BYTES,
) -> NDArray[np.float32]:
    """Run a chunk of an answer's prompt and let the answer score it, if it is to.

    Scoring needs the logits of all positions. So that they take no more than `most_logits_bytes`, the chunk may run as
    several, cut as `prefill_chunks` does.

    Args:
        session: whose slot holds the prompt before the chunk.
        answer: whose prompt.
        past: tokens of the prompt before the chunk.
        tokens: length of the chunk.
        slot: of the session.
        most_logits_bytes: as said above, but for logits of 4 tokens at least.

    Returns:
        Logits `[1, V]` after the last token of the chunk, until the next call of the session.
    """
    ids, end = answer.request.ids, past + tokens
    if answer.request.prompt_logprobs is None:
        return session.run(ids[past:end], past, rows=[tokens - 1], slot=slot)
    most = max(LEAST_TOKENS, most_logits_bytes // (4 * session.vocabulary) // 2 * 2)
    logits: NDArray[np.float32] = np.empty((0, 0), np.float32)
    for size in prefill_chunks(tokens, most):
        logits = session.run(ids[past : past + size], past, slot=slot)
        answer.score(logits, past)
        past += size
    return logits[-1:]


def open_decoder(
    folder: str | os.PathLike[str], manifest: Manifest, threads: int | None, context: int | None, slots: int = 1
) -> DecoderSession:
    """Load the graph of an artifact that `verify` has returned this manifest for.

    Args:
        folder: the artifact.
        manifest: its content.
        threads: threads per operator; None takes what this process was given.
        context: most tokens of prompt and answer together; None takes all that the model can.
        slots: how many sequences at once.

    Raises:
        ArtifactError: it is no decoder, or the graph is not the one that its manifest describes.
        PromptError: the model cannot take such a context.
        SessionError: the graph cannot be loaded, or takes no more than one sequence.
    """
    if manifest.kv_cache is None:
        raise ArtifactError(f"{folder}: is {manifest.described_kind}, expected a decoder; it cannot generate text")
    if context is not None and not 1 <= context <= manifest.context_length:
        raise PromptError(f"context: got {context}, expected 1 to {manifest.context_length} tokens")
    path = Path(folder) / manifest.graphs["model"]
    session = DecoderSession(path, capacity=context or manifest.context_length, threads=threads, slots=slots)
    listed = manifest.kv_cache
    wanted = (listed.layers, listed.heads, listed.head_width, manifest.vocabulary)
    got = (session.layers, session.heads, session.head_width, session.vocabulary)
    if got != wanted:
        text = f"got layers, cache heads, head width, vocabulary {got}, expected {wanted} of the manifest"
        raise ArtifactError(f"{path}: {text}; build the artifact again")
    return session
