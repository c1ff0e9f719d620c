"""Generate text with a decoder artifact: prompt in, pieces of text out, one sequence at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest, verify
from runtime.chat_template import Message
from runtime.errors import ArtifactError, PromptError, ServingError
from runtime.sampler import GREEDY, SamplingParams, sample
from runtime.session import DecoderSession
from runtime.tokenizer import Tokenizer

PREFILL_TOKENS: Final = 128  # per forward pass of a prompt

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What was generated, and how fast.

    Attributes:
        text: without special tokens, and without the stop string that ended it.
        token_ids: the generated ids, without the EOS id that ended them.
        prompt_tokens: number of ids of the prompt.
        finish_reason: "stop" at an EOS id or a stop string, "length" at `max_tokens` or the end of the context.
        ttft_s: seconds from the call to the first token, tokenization and prefill included.
        decode_tokens_per_s: rate of the tokens after the first, choosing and decoding to text included; None when
            there are none.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    ttft_s: float
    decode_tokens_per_s: float | None


class TextGenerator:
    """A loaded decoder artifact. It holds one sequence at a time and is not thread-safe."""

    def __init__(self, manifest: Manifest, session: DecoderSession, tokenizer: Tokenizer) -> None:
        self.manifest = manifest
        self.session = session
        self.tokenizer = tokenizer
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
        if manifest.kv_cache is None:
            raise ArtifactError(f"{folder}: is {manifest.described_kind}, expected a decoder; it cannot generate text")
        if context is not None and not 1 <= context <= manifest.context_length:
            raise PromptError(f"context: got {context}, expected 1 to {manifest.context_length} tokens")
        path = Path(folder) / manifest.graphs["model"]
        session = DecoderSession(path, capacity=context or manifest.context_length, threads=threads)
        _check_session(path, manifest, session)
        return cls(manifest, session, Tokenizer.load(folder))

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        sampling: SamplingParams = GREEDY,
        ignore_eos: bool = False,
    ) -> Completion:
        """Generate an answer and return it whole; arguments as for `stream`."""
        stream = self.stream(prompt, max_tokens=max_tokens, stop=stop, sampling=sampling, ignore_eos=ignore_eos)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        sampling: SamplingParams = GREEDY,
        ignore_eos: bool = False,
    ) -> TextStream:
        """Start to generate an answer, to be read piece by piece.

        The prompt is checked at once and computed when the first piece is asked for. A later call takes the cache over:
        of two streams only the younger can be read on.

        Args:
            prompt: a text to continue, or messages `{"role": ..., "content": ...}` for the chat template.
            max_tokens: most tokens to generate; the context may end the answer earlier.
            stop: strings that end the answer; they are not part of it.
            sampling: how tokens are chosen.
            ignore_eos: go on after an EOS id, as benchmarks do.

        Raises:
            PromptError: when the prompt is empty, leaves no room in the context, or an argument is out of range.
        """
        started = time.perf_counter()
        if max_tokens < 1:
            raise PromptError(f"max_tokens: got {max_tokens}, expected at least 1")
        if isinstance(stop, str) or not all(stop):
            raise PromptError(f"stop: got {stop!r}, expected a sequence of non-empty strings")
        ids = self._encode(prompt)
        request = _Request(
            ids=np.array(ids, np.int64),
            max_tokens=min(max_tokens, self.session.capacity - len(ids)),
            stop=tuple(stop),
            sampling=sampling,
            eos=frozenset() if ignore_eos else frozenset(self.manifest.eos_token_ids),
            started=started,
        )
        self._current = TextStream(self, request)
        return self._current

    def is_current(self, stream: TextStream) -> bool:
        """Whether the cache still belongs to this stream."""
        return self._current is stream

    def _encode(self, prompt: str | Sequence[Message]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        if not ids and self.manifest.bos_token_id is not None:
            ids = [self.manifest.bos_token_id]
        if not ids:
            raise PromptError(
                "prompt: is empty, and this model has no token to begin with; give at least one character"
            )
        if max(ids) >= self.session.vocabulary:
            got, limit = max(ids), self.session.vocabulary
            raise ArtifactError(
                f"tokenizer.json: made token {got}, expected ids below {limit}; build the artifact again"
            )
        if len(ids) >= self.session.capacity:
            got, limit = len(ids), self.session.capacity
            raise PromptError(f"prompt: got {got} tokens, expected fewer than the context of {limit}; shorten it")
        return ids


@dataclass(frozen=True)
class _Request:
    ids: NDArray[np.int64]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingParams
    eos: frozenset[int]
    started: float


class TextStream(Iterator[str]):
    """An answer being generated: iterate over its pieces, then ask for `completion`."""

    def __init__(self, generator: TextGenerator, request: _Request) -> None:
        self._generator = generator
        self._session = generator.session
        self._request = request
        self._stops = StopStrings(request.stop)
        self._seen = np.zeros(self._session.vocabulary, np.bool_)
        self._seen[request.ids] = True
        self._ids: list[int] = []
        self._text: list[str] = []
        self._steps = 0
        self._first_at = self._ended_at = self._away_s = 0.0
        self._reason: FinishReason = "length"
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The whole answer.

        Raises:
            ServingError: while pieces are left to be read.
        """
        if not self._ended_at:
            raise ServingError("stream: the answer is not finished; read all its pieces first")
        decode_s = self._ended_at - self._first_at - self._away_s
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._ids),
            prompt_tokens=len(self._request.ids),
            finish_reason=self._reason,
            ttft_s=self._first_at - self._request.started,
            decode_tokens_per_s=self._steps / decode_s if self._steps else None,
        )

    def _run(self) -> Iterator[str]:
        """Turn tokens into pieces of text that neither split a character nor show the beginning of a stop string."""
        detokenizer = self._generator.tokenizer.detokenizer()
        for token in self._tokens():
            yield from self._hand_out(self._stops.add(detokenizer.add(token)))
            if self._stops.found:
                break
        else:
            yield from self._hand_out(self._stops.add(detokenizer.finish()) + self._stops.finish())
        if self._stops.found:
            self._reason = "stop"
        self._ended_at = time.perf_counter()

    def _hand_out(self, piece: str) -> Iterator[str]:
        if piece:
            self._text.append(piece)
            left = time.perf_counter()
            yield piece
            self._away_s += time.perf_counter() - left  # the reader's time, not ours

    def _tokens(self) -> Iterator[int]:
        """Yield ids until an EOS id or `max_tokens`."""
        token = self._choose(self._prefill())
        self._first_at = time.perf_counter()
        while token not in self._request.eos:
            self._ids.append(token)
            yield token
            if len(self._ids) == self._request.max_tokens:
                return
            self._check_current()
            token = self._choose(self._session.step(token, self._position - 1))
            self._steps += 1
        self._reason = "stop"

    @property
    def _position(self) -> int:
        """Index in the sequence of the token to be chosen next."""
        return len(self._request.ids) + len(self._ids)

    def _prefill(self) -> NDArray[np.float32]:
        """Run the prompt and return the logits [V] after its last token."""
        self._check_current()
        past = 0
        logits: NDArray[np.float32] = np.empty((0, 0), np.float32)
        for size in prefill_chunks(len(self._request.ids)):
            logits = self._session.run(self._request.ids[past : past + size], past, rows=[size - 1])
            past += size
        last: NDArray[np.float32] = logits[0]
        return last

    def _choose(self, logits: NDArray[np.float32]) -> int:
        sampling = self._request.sampling
        seen = np.flatnonzero(self._seen) if sampling.repetition_penalty != 1 else None
        token = sample(logits, sampling, self._position, seen)
        self._seen[token] = True
        return token

    def _check_current(self) -> None:
        if not self._generator.is_current(self):
            raise ServingError("stream: a later call has taken the cache over; read one answer at a time")


class StopStrings:
    """Cuts a stream of text before the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """Take a piece and return the text that is certain to stand before any stop string."""
        if self.found or not piece:
            return ""
        text = self._held + piece
        hits = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if hits:
            at, self.found = min(hits)
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back, now that nothing follows; nothing after a stop string."""
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[len(text) - size :])), 0)


def prefill_chunks(tokens: int, size: int = PREFILL_TOKENS) -> Iterator[int]:
    """Yield the lengths of the forward passes of a prompt: `size` each, and none of one token unless it is the prompt.

    A pass of one token takes another path through the kernels and rounds differently; prompt positions should not.
    """
    while tokens > 0:
        take = min(size, tokens)
        if tokens - take == 1 and take > 2:
            take -= 1
        yield take
        tokens -= take


def _check_session(path: Path, manifest: Manifest, session: DecoderSession) -> None:
    """Refuse a graph that is not the one its manifest describes."""
    assert manifest.kv_cache is not None
    listed = manifest.kv_cache
    wanted = (listed.layers, listed.heads, listed.head_width, manifest.vocabulary)
    got = (session.layers, session.heads, session.head_width, session.vocabulary)
    if got != wanted:
        text = f"got layers, cache heads, head width, vocabulary {got}, expected {wanted} of the manifest"
        raise ArtifactError(f"{path}: {text}; build the artifact again")
