"""Choose the next tokens, from a row of logits each.

The token at position t is a pure function of (logits, parameters, seed, t, ids seen so far): neither the batch it runs
in nor the tokens drawn before it move the noise (runtime/gumbel.py). Each token id has its own noise at each position,
so two models with nearly equal logits choose the same token nearly always, and a filter never changes how the tokens it
keeps compare.

The order is that of vLLM: logit bias, ids forbidden until `min_tokens`, repetition penalty, frequency and presence
penalties, temperature; then the filters as in transformers: top-k, top-p of what that leaves, min-p. Each filter is a
least logit, so no filter sorts the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.blocks import block_maxima, fault, largest
from runtime.errors import SamplingError, SessionError
from runtime.gumbel import noise_key, race

_MOST_SEED: Final = 2**64 - 1
LEAST_TEMPERATURE: Final = 1e-3


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    whole = name in ("top_k", "seed")
    if not holds or isinstance(value, bool) or (whole and not isinstance(value, int)):
        raise SamplingError(f"{name}: got {value!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k largest logits (and what ties with the k-th); 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this (Holtzman et al. 2020,
            arXiv:1904.09751, section 3.1).
        min_p: keep tokens at least this likely relative to the most likely one (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: logits of ids in the prompt or the answer so far are divided (positive) or multiplied
            (negative) by it (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 leaves them.
        presence_penalty: taken from the logits of ids in the answer so far.
        frequency_penalty: taken from them as often as they occur there.
        logit_bias: (id, bias) pairs; the bias is added to the id's logit.
        seed: 64-bit integer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        hot = LEAST_TEMPERATURE <= self.temperature <= 100
        _require("temperature", self.temperature, self.temperature == 0 or hot, "0 (greedy) or 0.001 to 100")
        _require("top_k", self.top_k, self.top_k >= 0, "an integer of at least 0 (0: all tokens)")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0.01 <= penalty <= 100, "a number from 0.01 to 100 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(name, value, -2 <= value <= 2, "a number from -2 to 2 (0: none)")
        _require("seed", self.seed, 0 <= self.seed <= _MOST_SEED, "an integer from 0 to 2**64 - 1")
        for token, bias in self.logit_bias:
            if type(token) is not int or token < 0 or not -100 <= bias <= 100:
                raise SamplingError(f"logit_bias: got {bias!r} for {token!r}, expected -100 to 100 for token ids")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise SamplingError("logit_bias: got a token id twice, expected each once")

    @property
    def needs_counts(self) -> bool:
        """Whether it matters which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def weighs_all(self) -> bool:
        """Whether top-p has to weigh all tokens, not only those that top-k leaves."""
        return self.top_p < 1 and not self.top_k


GREEDY: Final = SamplingParams()


class TokenCounts:
    """Which ids a sequence holds, and how often each was generated."""

    def __init__(self, prompt: NDArray[np.integer[Any]] | Sequence[int]) -> None:
        """Begin with a prompt."""
        distinct = np.unique(np.asarray(prompt, np.int64))
        self._at = {token: at for at, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._generated = np.zeros(len(distinct), np.float32)

    def add(self, token: int) -> None:
        """Note a generated token."""
        at = self._at.setdefault(token, len(self._at))
        if at == len(self._ids):
            self._ids = np.append(self._ids, np.zeros(at + 64, np.int64))
            self._generated = np.append(self._generated, np.zeros(at + 64, np.float32))
        self._ids[at] = token
        self._generated[at] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct ids of prompt and answer `[S]`."""
        return self._ids[: len(self._at)]

    @property
    def generated(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the answer `[S]`."""
        return self._generated[: len(self._at)]


@dataclass(frozen=True)
class Draw:
    """What decides about a token beside its logits.

    Attributes:
        params: how to choose.
        position: index of the new token in its sequence, counted from the prompt's first token.
        counts: the tokens before it; needed only where `params.needs_counts`.
        banned: ids that it must not be.
    """

    params: SamplingParams
    position: int
    counts: TokenCounts | None = None
    banned: Sequence[int] = ()

    @property
    def edits(self) -> bool:
        """Whether logits of single ids change before any other step."""
        return bool(self.params.logit_bias or self.banned or self.params.needs_counts)


def sample(
    logits: NDArray[np.float32], params: SamplingParams, position: int, counts: TokenCounts | None = None
) -> int:
    """Return the token id for `position`: `choose` for one row `[V]` and the attributes of a `Draw`.

    Raises:
        SessionError: when the largest logit is not a finite number.
    """
    (token,) = choose(logits[None], [Draw(params, position, counts)])
    if isinstance(token, SessionError):
        raise token
    return token


def choose(logits: NDArray[np.float32], draws: Sequence[Draw]) -> list[int | SessionError]:
    """Return a token id for each row, or what is wrong with the row; no row has a say in another's.

    Args:
        logits: `[B, V]`, which are not changed; -inf forbids a token.
        draws: one for each row.
    """
    logits = edited(logits, draws)
    best = logits.argmax(axis=1).tolist()  # the first NaN, if there is one
    chosen = [fault(row, top) or top for row, top in zip(logits, best, strict=True)]
    hot = [at for at, draw in enumerate(draws) if draw.params.temperature > 0 and isinstance(chosen[at], int)]
    if hot:
        rows = logits if len(hot) == len(draws) else logits[hot]
        for at, token in zip(hot, _drawn(rows, [best[at] for at in hot], [draws[at] for at in hot]), strict=True):
            chosen[at] = token
    return chosen


def edited(logits: NDArray[np.float32], draws: Sequence[Draw]) -> NDArray[np.float32]:
    """Return the logits with bias, bans and penalties: themselves where there are none, otherwise a copy."""
    if not any(draw.edits for draw in draws):
        return logits
    logits = logits.copy()
    for row, draw in zip(logits, draws, strict=True):
        for token, bias in draw.params.logit_bias:
            row[token] += np.float32(bias)
        row[list(draw.banned)] = -np.inf
        if draw.params.needs_counts and draw.counts is not None:
            _penalize(row, draw.counts, draw.params)
    return logits


def _penalize(row: NDArray[np.float32], counts: TokenCounts, params: SamplingParams) -> None:
    old, penalty = row[counts.ids], np.float32(params.repetition_penalty)
    new = np.where(old < 0, old * penalty, old / penalty)
    new -= np.float32(params.frequency_penalty) * counts.generated
    new -= np.float32(params.presence_penalty) * (counts.generated > 0)
    row[counts.ids] = new


def _drawn(logits: NDArray[np.float32], best: Sequence[int], draws: Sequence[Draw]) -> list[int]:
    """Return the ids that are drawn from rows whose largest logits are at `best`.

    Most of what is drawn lies in the nucleus. So top-p, where it has a whole row to weigh, is first asked about the one
    token that wins without it; where that is not kept, another is drawn from those that are.
    """
    params = [draw.params for draw in draws]
    tops = [float(row[at]) for row, at in zip(logits, best, strict=True)]
    maxima = block_maxima(logits)
    least = np.array([_least_kept(*each) for each in zip(logits, maxima, tops, params, strict=True)])
    temperatures = np.array([each.temperature for each in params], np.float64)
    keys = np.array([noise_key(draw.params.seed, draw.position) for draw in draws], np.uint64)
    tokens = race(logits, maxima, temperatures, least, keys)
    again = [
        at
        for at, (row, each) in enumerate(zip(logits, params, strict=True))
        if tokens[at] != best[at] and each.weighs_all and not _is_in_nucleus(row, int(tokens[at]), tops[at], each)
    ]
    if again:
        least[again] = [max(least[at], _least_of_nucleus(logits[at], tops[at], params[at])) for at in again]
        tokens[again] = race(logits[again], maxima[again], temperatures[again], least[again], keys[again])
    chosen: list[int] = tokens.tolist()
    return chosen


def _least_kept(row: NDArray[np.float32], maxima: NDArray[np.float32], best: float, params: SamplingParams) -> float:
    """Return the least logit that the filters keep, but for top-p of a whole row; -inf where there are none.

    Ranks are those of the logits themselves: the division by the temperature can make two of them equal.
    """
    least = -math.inf
    if params.top_k:
        some = row[largest(row, maxima, params.top_k)]
        rank = min(params.top_k, len(row))
        least = float(np.partition(some, -rank)[-rank])
        if params.top_p < 1:
            some = some[some >= least]
            least = _least_with_mass(some, params.top_p * float(_weights(some, best, params).sum()), best, params)
    if params.min_p > 0:
        least = max(least, best + params.temperature * math.log(params.min_p))
    return least


def _is_in_nucleus(row: NDArray[np.float32], token: int, best: float, params: SamplingParams) -> bool:
    """Whether top-p keeps a token: those that are likelier have not enough mass without it."""
    weights = _weights(row, best, params)
    return bool(weights[row > row[token]].sum() < params.top_p * weights.sum())


def _least_of_nucleus(row: NDArray[np.float32], best: float, params: SamplingParams) -> float:
    """Return the least logit that top-p keeps of a whole row.

    Tokens less likely than (1 - top_p) / V weigh less than 1 - top_p together: only the others are sorted.
    """
    weights = _weights(row, best, params)
    total = float(weights.sum())
    some = row[weights >= (1 - params.top_p) * total / len(row) * (1 - 1e-5)]  # 1e-5: roundings of the sum
    return _least_with_mass(some, params.top_p * total, best, params)


def _least_with_mass(some: NDArray[np.float32], mass: float, best: float, params: SamplingParams) -> float:
    """Return the largest logit for which those that are not below it weigh `mass`; the least if all weigh less."""
    ordered = np.sort(some)[::-1]
    masses = np.cumsum(_weights(ordered, best, params), dtype=np.float64)
    return float(ordered[min(int(np.searchsorted(masses, mass)), len(ordered) - 1)])


def _weights(logits: NDArray[np.float32], best: float, params: SamplingParams) -> NDArray[np.float32]:
    """Return probabilities but for a factor, that of the largest logit being 1."""
    weights = logits - np.float32(best)
    weights /= np.float32(params.temperature)
    np.exp(weights, out=weights)
    return weights
