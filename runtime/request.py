"""What is asked of a decoder, and the answer as it grows: no model runs here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Manifest
from runtime.chat_template import Message
from runtime.errors import ArtifactError, PromptError
from runtime.sampler import GREEDY, SamplingParams, sample
from runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[Message] | Sequence[int]
"""A text to continue, messages `{"role": ..., "content": ...}` for the chat template, or token ids as they are."""


class Options(TypedDict, total=False):
    """What may be said of an answer beside its prompt; `RequestReader.read` has the defaults.

    Attributes:
        max_tokens: most tokens to generate; the context may end the answer earlier.
        stop: strings that end the answer; they are not part of it.
        sampling: how tokens are chosen.
        ignore_eos: go on after an EOS id, as benchmarks do.
    """

    max_tokens: int
    stop: Sequence[str]
    sampling: SamplingParams
    ignore_eos: bool


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer.

    Attributes:
        text: what is certain now; empty while a character or a stop string may be in the making.
        token_ids: the id that was chosen, whether or not its text is held back; none where it ended the answer.
    """

    text: str
    token_ids: tuple[int, ...]


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


@dataclass(frozen=True)
class Request:
    """A prompt as ids, and when and how its answer ends.

    Attributes:
        ids: of the prompt, at least one.
        max_tokens: most tokens to generate; together with the prompt no more than the context.
        stop: strings that end the answer.
        sampling: how tokens are chosen.
        eos: ids that end the answer.
        started: when it was asked, by `time.perf_counter`.
    """

    ids: NDArray[np.int64]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingParams
    eos: frozenset[int]
    started: float


@dataclass(frozen=True)
class RequestReader:
    """Turns what a caller asks of one artifact into requests.

    Attributes:
        manifest: of the artifact.
        tokenizer: its own.
        vocabulary: ids that its graph knows.
        context: most tokens of prompt and answer together.
    """

    manifest: Manifest
    tokenizer: Tokenizer
    vocabulary: int
    context: int

    def read(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        sampling: SamplingParams = GREEDY,
        ignore_eos: bool = False,
    ) -> Request:
        """Check a prompt and its `Options`; return the request.

        Raises:
            PromptError: when the prompt is empty, leaves no room in the context, or an argument is out of range.
        """
        started = time.perf_counter()
        if max_tokens < 1:
            raise PromptError(f"max_tokens: got {max_tokens}, expected at least 1")
        if isinstance(stop, str) or not all(stop):
            raise PromptError(f"stop: got {stop!r}, expected a sequence of non-empty strings")
        ids = self._ids(prompt)
        return Request(
            ids=np.array(ids, np.int64),
            max_tokens=min(max_tokens, self.context - len(ids)),
            stop=tuple(stop),
            sampling=sampling,
            eos=frozenset() if ignore_eos else frozenset(self.manifest.eos_token_ids),
            started=started,
        )

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = _given_ids(prompt, self.vocabulary) or self._encode(prompt)
        if len(ids) >= self.context:
            got, limit = len(ids), self.context
            raise PromptError(f"prompt: got {got} tokens, expected fewer than the context of {limit}; shorten it")
        return ids

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode_chat(cast(Sequence[Message], prompt))
        if not ids and self.manifest.bos_token_id is not None:
            ids = [self.manifest.bos_token_id]
        if not ids:
            raise PromptError(
                "prompt: is empty, and this model has no token to begin with; give at least one character"
            )
        if max(ids) >= self.vocabulary:
            got, limit = max(ids), self.vocabulary
            raise ArtifactError(
                f"tokenizer.json: made token {got}, expected ids below {limit}; build the artifact again"
            )
        return ids


def _given_ids(prompt: Prompt, vocabulary: int) -> list[int] | None:
    """Return the ids of a prompt that is ids, None for any other."""
    if isinstance(prompt, str) or not all(isinstance(item, int | np.integer) for item in prompt):
        return None
    ids = [int(cast(int, item)) for item in prompt]
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise PromptError(f"prompt: got token {wrong[0]}, expected ids from 0 to {vocabulary - 1}")
    return ids


class Answer:
    """One request's answer, grown a token at a time.

    Its pieces of text neither split a character nor show the beginning of a stop string.

    Attributes:
        request: what was asked.
        ids: the tokens chosen so far, without the EOS id that ended them.
        finish_reason: None while more tokens are wanted.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, vocabulary: int) -> None:
        self.request = request
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(request.stop)
        self._seen = np.zeros(vocabulary, np.bool_)
        self._seen[request.ids] = True
        self._text: list[str] = []
        self._chosen = 0  # with the EOS id
        self._first_at = self._ended_at = 0.0

    def take(self, logits: NDArray[np.float32]) -> str:
        """Choose the next token by its logits `[V]`; return the text that is certain now, often empty.

        Raises:
            SessionError: the logits are no numbers.
        """
        token = self._choose(logits)
        piece = self._add(token)
        self._text.append(piece)
        if self.finish_reason is not None:
            self._ended_at = time.perf_counter()
        return piece

    def completion(self, away_s: float = 0.0) -> Completion:
        """Return the whole of a finished answer; seconds that passed elsewhere since its first token do not count."""
        assert self.finish_reason is not None
        decode_s = self._ended_at - self._first_at - away_s
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self.ids),
            prompt_tokens=len(self.request.ids),
            finish_reason=self.finish_reason,
            ttft_s=self._first_at - self.request.started,
            decode_tokens_per_s=(self._chosen - 1) / decode_s if self._chosen > 1 else None,
        )

    def _choose(self, logits: NDArray[np.float32]) -> int:
        sampling, position = self.request.sampling, len(self.request.ids) + len(self.ids)
        seen = np.flatnonzero(self._seen) if sampling.repetition_penalty != 1 else None
        token = sample(logits, sampling, position, seen)
        self._seen[token] = True
        self._chosen += 1
        if self._chosen == 1:
            self._first_at = time.perf_counter()
        return token

    def _add(self, token: int) -> str:
        if token in self.request.eos:
            self.finish_reason = "stop"
            return self._rest()
        self.ids.append(token)
        piece = self._stops.add(self._detokenizer.add(token))
        if self._stops.found:
            self.finish_reason = "stop"
        elif len(self.ids) == self.request.max_tokens:
            piece += self._rest()
            self.finish_reason = "stop" if self._stops.found else "length"
        return piece

    def _rest(self) -> str:
        return self._stops.add(self._detokenizer.finish()) + self._stops.finish()


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
