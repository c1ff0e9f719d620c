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
from runtime.errors import ArtifactError, PromptError, SessionError
from runtime.logprobs import MOST_LOGPROBS, TokenLogprob, token_logprobs
from runtime.sampler import GREEDY, Draw, SamplingParams, TokenCounts, choose
from runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[Message] | Sequence[int]
"""A text to continue, messages `{"role": ..., "content": ...}` for the chat template, or token ids as they are."""


class Options(TypedDict, total=False):
    """What may be said of an answer beside its prompt; `RequestReader.read` has the defaults.

    Attributes:
        max_tokens: most tokens to generate; the context may end the answer earlier. 0, which only scores the prompt,
            needs `prompt_logprobs`.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: ids that end the answer as an EOS id does.
        min_tokens: until so many are generated, EOS and stop ids are forbidden, and stop strings do not count.
        sampling: how tokens are chosen.
        ignore_eos: go on after an EOS id, as benchmarks do.
        logprobs: return the logprob of each token, and of so many of the likeliest in its place; None for none.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    max_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    sampling: SamplingParams
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None


@dataclass(frozen=True)
class Piece:
    """What an answer grew by.

    Attributes:
        text: what is certain now, often empty: it neither ends within a character nor begins a stop string.
        token_ids: the ids that came; their text may follow with later pieces.
        logprobs: one for each id where they were asked for, otherwise empty.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What was generated, and how fast.

    Attributes:
        text: without special tokens, and without the stop string that ended it.
        token_ids: the generated ids, without the EOS or stop id that ended them.
        prompt_tokens: number of ids of the prompt.
        finish_reason: "stop" at an EOS or stop id or a stop string, "length" at `max_tokens` or the end of the context.
        ttft_s: seconds from the call to the first token, tokenization and prefill included.
        decode_tokens_per_s: rate of the tokens after the first, choosing and decoding to text included; None when
            there are none.
        logprobs: one for each of `token_ids`; None where they were not asked for.
        prompt_logprobs: one for each id of the prompt, None for the first; None where they were not asked for.
        stop_reason: the stop string or stop id that ended the answer; None when something else did.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    ttft_s: float
    decode_tokens_per_s: float | None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop_reason: str | int | None = None


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
        stop_ids: further ids that end it, which are told as the reason.
        min_tokens: tokens to generate before anything but the context may end it.
        logprobs: likeliest ids to return beside each token; None for no logprobs.
        prompt_logprobs: the same for the prompt.
    """

    ids: NDArray[np.int64]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingParams
    eos: frozenset[int]
    started: float
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


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
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        sampling: SamplingParams = GREEDY,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> Request:
        """Check a prompt and its `Options`; return the request.

        Raises:
            PromptError: when the prompt is empty, leaves no room in the context, or an argument is out of range.
        """
        started = time.perf_counter()
        if max_tokens < 1 and (max_tokens < 0 or prompt_logprobs is None):
            raise PromptError(f"max_tokens: got {max_tokens}, expected at least 1, or 0 with prompt_logprobs")
        if not 0 <= min_tokens <= max_tokens:
            raise PromptError(f"min_tokens: got {min_tokens}, expected 0 to max_tokens, which is {max_tokens}")
        if isinstance(stop, str) or not all(stop):
            raise PromptError(f"stop: got {stop!r}, expected a sequence of non-empty strings")
        for name, count in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if count is not None and not 0 <= count <= MOST_LOGPROBS:
                raise PromptError(f"{name}: got {count}, expected 0 to {MOST_LOGPROBS}")
        _require_known("stop_token_ids", stop_token_ids, self.vocabulary)
        _require_known("logit_bias", [token for token, _ in sampling.logit_bias], self.vocabulary)
        ids = self._ids(prompt, least_new=min(max_tokens, 1))
        return Request(
            ids=np.array(ids, np.int64),
            max_tokens=min(max_tokens, self.context - len(ids)),
            stop=tuple(stop),
            sampling=sampling,
            eos=frozenset() if ignore_eos else frozenset(self.manifest.eos_token_ids),
            started=started,
            stop_ids=frozenset(stop_token_ids),
            min_tokens=min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _ids(self, prompt: Prompt, least_new: int) -> list[int]:
        ids = _given_ids(prompt, self.vocabulary) or self._encode(prompt)
        if len(ids) + least_new > self.context:
            got, limit = len(ids), self.context
            expected = f"fewer than the context of {limit}" if least_new else f"at most the context of {limit}"
            raise PromptError(f"prompt: got {got} tokens, expected {expected}; shorten it")
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
    _require_known("prompt", ids, vocabulary)
    return ids


def _require_known(name: str, ids: Sequence[int], vocabulary: int) -> None:
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise PromptError(f"{name}: got token {wrong[0]}, expected ids from 0 to {vocabulary - 1}")


class Answer:
    """One request's answer, grown a token at a time.

    Attributes:
        request: what was asked.
        ids: the tokens chosen so far, without the EOS or stop id that ended them.
        logprobs: one for each of them where they were asked for.
        prompt_logprobs: of the tokens of the prompt that were scored so far, None for the first.
        error: what is wrong with logits that were to score the prompt.
        finish_reason: None while more tokens are wanted.
        stop_reason: the stop string or stop id that ended it.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.error: SessionError | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(request.stop)
        self._counts = TokenCounts(request.ids) if request.sampling.needs_counts else None
        self._text: list[str] = []
        self._chosen = 0  # with the EOS id
        self._first_at = self._ended_at = 0.0

    def draw(self) -> Draw:
        """Return what decides about the next token beside its logits."""
        request, ended = self.request, len(self.ids) >= self.request.min_tokens
        banned = () if ended else (*request.eos, *request.stop_ids)
        return Draw(request.sampling, len(request.ids) + len(self.ids), self._counts, banned)

    def take(self, token: int, logits: NDArray[np.float32]) -> Piece:
        """Grow by a token that was chosen by these logits `[V]`; an answer of no tokens ends without it."""
        if not self._first_at:
            self._first_at = time.perf_counter()
        if self.request.max_tokens:
            self._chosen += 1
            piece = self._ended_by(token) or self._grown_by(token, logits)
        else:
            self.finish_reason, piece = "length", Piece("")
        self._text.append(piece.text)
        if self.finish_reason is not None:
            self._ended_at = time.perf_counter()
        return piece

    def score(self, logits: NDArray[np.float32], past: int) -> None:
        """Note the logprobs of the prompt's tokens that follow those from `past` on, of which these are the logits.

        Args:
            logits: `[T, V]`; if they are no numbers, that is noted as `error`.
            past: tokens of the prompt before the first of the T.
        """
        assert self.request.prompt_logprobs is not None
        next_ids = self.request.ids[past + 1 : past + 1 + len(logits)].tolist()
        try:
            scored = token_logprobs(logits[: len(next_ids)], next_ids, self.request.prompt_logprobs)
        except SessionError as error:
            self.error = error
        else:
            self.prompt_logprobs += scored

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
            logprobs=None if self.request.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if self.request.prompt_logprobs is None else tuple(self.prompt_logprobs),
            stop_reason=self.stop_reason,
        )

    def _ended_by(self, token: int) -> Piece | None:
        if token not in self.request.eos | self.request.stop_ids:
            return None
        self.finish_reason = "stop"
        self.stop_reason = None if token in self.request.eos else token
        return Piece(self._rest())

    def _grown_by(self, token: int, logits: NDArray[np.float32]) -> Piece:
        self.ids.append(token)
        if self._counts is not None:
            self._counts.add(token)
        logprobs: Sequence[TokenLogprob] = ()
        if self.request.logprobs is not None:
            logprobs = token_logprobs(logits[None], [token], self.request.logprobs)
            self.logprobs += logprobs
        text = self._before_stop(self._detokenizer.add(token))
        if not self.finish_reason and len(self.ids) == self.request.max_tokens:
            self.finish_reason = "length"
            text += self._rest()
        return Piece(text, (token,), tuple(logprobs))

    def _before_stop(self, text: str) -> str:
        """Return what of further text is certain to stand before a stop string; end at one."""
        if len(self.ids) <= self.request.min_tokens:
            return text
        text = self._stops.add(text)
        if self._stops.found:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        return text

    def _rest(self) -> str:
        return self._before_stop(self._detokenizer.finish()) + self._stops.finish()


def take_next(answers: Sequence[Answer], logits: NDArray[np.float32]) -> list[Piece | SessionError]:
    """Let each answer grow by a token, chosen by its row of logits `[B, V]`; return the pieces.

    A row that is no numbers gives an error in place of a piece, and says nothing about the others.
    """
    tokens = choose(logits, [answer.draw() for answer in answers])
    return [_piece_or_error(answer, token, row) for answer, token, row in zip(answers, tokens, logits, strict=True)]


def _piece_or_error(answer: Answer, token: int | SessionError, logits: NDArray[np.float32]) -> Piece | SessionError:
    if isinstance(token, SessionError):
        return token
    return answer.error or answer.take(token, logits)


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
