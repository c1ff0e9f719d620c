"""How likely a model finds a token: of its own distribution, before any bias, penalty or temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.blocks import block_maxima, fault, largest

MOST_LOGPROBS: Final = 20
"""Most alternatives that may be asked for."""


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and of the likeliest ones in its place.

    Attributes:
        token: its id.
        logprob: at most 0; -inf where the model rules it out.
        top: (id, logprob) of as many of the likeliest as were asked for, the likeliest first, of equal ones the lower
            id; the token itself may be among them or not.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: NDArray[np.float32], tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Return the logprob of each token by its row of logits.

    Args:
        logits: `[R, V]`.
        tokens: an id for each row.
        count: likeliest ids to return beside each; 0 for none.

    Raises:
        SessionError: the largest logit of a row is not a finite number.
    """
    maxima = block_maxima(logits) if count and len(logits) else None
    return [
        _logprob(row, token, () if maxima is None else _likeliest(row, maxima[at], count))
        for at, (row, token) in enumerate(zip(logits, tokens, strict=True))
    ]


def _logprob(row: NDArray[np.float32], token: int, top: Sequence[int]) -> TokenLogprob:
    best = int(row.argmax())
    if (error := fault(row, best)) is not None:
        raise error
    weights = row - row[best]
    np.exp(weights, out=weights)
    weights[best] = 0  # added last, by log1p: a token that is nearly certain keeps its small logprob
    top_logprob = -math.log1p(float(weights.sum()))

    def logprob(each: int) -> float:
        return float(row[each]) - float(row[best]) + top_logprob

    return TokenLogprob(token, logprob(token), tuple((each, logprob(each)) for each in top))


def _likeliest(row: NDArray[np.float32], maxima: NDArray[np.float32], count: int) -> list[int]:
    ids = largest(row, maxima, count)
    ordered: list[int] = ids[np.lexsort((ids, -row[ids]))][:count].tolist()
    return ordered
