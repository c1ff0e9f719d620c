"""How likely a gate is to decide, and after how many items: for the exact paired test by enumeration, looks included.

The state between two looks is the distribution of (lost, gained), an array; items in between add to it by a
convolution. What a look decides is taken out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from . import paired
from .clusters import Array
from .rate import zero_change_floor
from .sequential import Spending, looks

_FAR = 9.0  # deviations from the mean count, beyond which lies less than 1e-16
_CORRECTIONS = 5
_CLOSE = 0.01


@dataclass(frozen=True, eq=False)
class Look:
    """What `n` items must show: for every count of gains the most losses that pass, of losses the most gains that fail.

    -1 where none do.
    """

    n: int
    passes: NDArray[np.int64]
    fails: NDArray[np.int64]


@dataclass(frozen=True)
class Chances:
    """How a gate ends: probability of pass and of fail, expected number of items."""

    passed: float
    failed: float
    items: float


def looks_of(
    marks: Sequence[int], margin: float, alpha: float, fail_alpha: float | None = None, is_rough: bool = False
) -> tuple[Look, ...]:
    """Return the looks that a gate takes at `marks`, the last of which are all items; those too early are left out.

    Args:
        marks: items after which to look, ascending.
        margin: budget, in fractions of the items.
        alpha: level of the pass claim over all looks.
        fail_alpha: level of the fail claim over all looks; None: nothing ever fails, which is found faster.
        is_rough: as in `paired.critical_region`.
    """
    taken: list[Look] = []
    for n in marks:
        spending = Spending(marks[-1], taken[-1].n if taken else 0)
        if n == marks[-1] or n >= zero_change_floor(margin, spending.level(alpha, n)):
            passes = _region(n, margin, spending.level(alpha, n), is_rough)
            nothing = np.full(n + 1, -1)
            fails = nothing if fail_alpha is None else _region(n, -margin, spending.level(fail_alpha, n), is_rough)
            taken.append(Look(n, passes, fails))
    return tuple(taken)


@lru_cache(maxsize=256)
def _region(n: int, margin: float, level: float, is_rough: bool) -> NDArray[np.int64]:
    return paired.critical_region(n, margin, level, is_rough)


def chances(taken: Sequence[Look], discordance: float, loss: float = 0.0) -> Chances:
    """Return how a gate ends where a share `discordance` of the items changes and `loss` more are lost than gained."""
    state, items = Counts(np.ones((1, 1)), 0, 0), 0
    passed = failed = expected = 0.0
    for look in taken:
        state = state.after(look.n - items, (discordance + loss) / 2, (discordance - loss) / 2)
        expected += (look.n - items) * (1 - passed - failed)
        items = look.n
        passes, fails = state.lost <= look.passes[state.gained], state.gained <= look.fails[state.lost]
        passed += float(state.mass[passes].sum())
        failed += float(state.mass[fails].sum())
        state = Counts(np.where(passes | fails, 0, state.mass), state.first_lost, state.first_gained)
    return Chances(passed, failed, expected)


@dataclass(frozen=True, eq=False)
class Counts:
    """Probability of every (lost, gained) that is not out of reach [B, C], from the first counts on."""

    mass: Array
    first_lost: int
    first_gained: int

    @property
    def lost(self) -> NDArray[np.int64]:
        """Return the counts of losses [B, 1]."""
        return (self.first_lost + np.arange(self.mass.shape[0]))[:, None]

    @property
    def gained(self) -> NDArray[np.int64]:
        """Return the counts of gains [1, C]."""
        return (self.first_gained + np.arange(self.mass.shape[1]))[None, :]

    def after(self, items: int, p_lost: float, p_gained: float) -> Counts:
        """Return the counts once so many more items have come."""
        from scipy.signal import fftconvolve

        more = trinomial(items, p_lost, p_gained)
        mass = more.mass if self.mass.size == 1 else np.maximum(fftconvolve(self.mass, more.mass), 0)
        return Counts(mass, self.first_lost + more.first_lost, self.first_gained + more.first_gained)


def trinomial(n: int, p_lost: float, p_gained: float) -> Counts:
    """Return how probable every (lost, gained) is in `n` items, those out of reach left out."""
    from scipy.special import gammaln, xlogy

    lost, gained = (_reachable(n, p) for p in (p_lost, p_gained))
    agreed = n - lost[:, None] - gained[None, :]
    ways = gammaln(n + 1) - gammaln(lost + 1)[:, None] - gammaln(gained + 1)[None, :]
    ways = ways - gammaln(np.maximum(agreed, 0) + 1)
    log_mass = ways + xlogy(lost, p_lost)[:, None] + xlogy(gained, p_gained)[None, :]
    log_mass = log_mass + xlogy(np.maximum(agreed, 0), max(1 - p_lost - p_gained, 0.0))
    return Counts(np.where(agreed >= 0, np.exp(log_mass), 0), int(lost[0]), int(gained[0]))


def _reachable(n: int, p: float) -> NDArray[np.int64]:
    reach = _FAR * math.sqrt(n * p) + 12
    return np.arange(max(0, int(n * p - reach)), min(n, int(n * p + reach)) + 1)


def power(margin: float, discordance: float, n: int, alpha: float, loss: float = 0.0, *, top_up: bool = False) -> float:
    """Return the probability that `n` items show a loss within `margin`, to about half a point.

    Args:
        margin: budget, in fractions of the items.
        discordance: share of items that exactly one of the models answers right.
        n: items.
        alpha: level of the pass claim.
        loss: true loss, of at most `discordance`.
        top_up: the items come in parts, with a look after each.
    """
    marks = looks(n) if top_up else (n,)
    return chances(looks_of(marks, margin, alpha, is_rough=True), discordance, loss).passed


def rate_power(margin: float, rate: float, n: int, alpha: float) -> float:
    """Return the probability that Clopper & Pearson's upper bound of a rate over `n` positions is within `margin`."""
    from scipy.special import bdtr

    counts = np.arange(n + 1)
    passing = counts[bdtr(counts.astype(np.float64), n, margin) <= alpha]
    return float(bdtr(float(passing[-1]), n, rate)) if len(passing) else 0.0


def mean_power(margin: float, deviation: float, n: float, alpha: float, loss: float = 0.0) -> float:
    """Return the probability that `n` documents show a mean loss within `margin`; normal approximation.

    Args:
        margin: budget, in the unit of the loss.
        deviation: of a document's residual loss (`ratio.document_deviation`).
        n: documents.
        alpha: level of the pass claim.
        loss: true loss.
    """
    from scipy.special import ndtr, ndtri

    if deviation <= 0:
        return float(loss <= margin)
    return float(ndtr((margin - loss) * math.sqrt(n) / deviation + ndtri(alpha)))


def enough(power_of: Callable[[int], float], first: int, floor: int, alpha: float, wanted: float = 0.8) -> int:
    """Count the items from which `power_of` is at least `wanted`, starting from a guess.

    Good to about 2 %, for power does not grow with every single item: at a discordance of 0.5 % one more item makes it
    0.82 instead of 0.73.
    """
    from scipy.special import ndtri

    n, found = max(first, floor), 0
    for _ in range(_CORRECTIONS):
        reached = power_of(n)
        if reached >= wanted:
            found = min(found or n, n)
        if wanted <= reached <= wanted + _CLOSE or (n == floor and found):
            break
        aimed, seen = (
            float(ndtri(1 - alpha) + ndtri(p)) for p in (wanted + _CLOSE / 2, min(max(reached, 0.01), 0.999))
        )
        n = max(floor, math.ceil(n * (max(aimed, 0.1) / max(seen, 0.1)) ** 2))
    return found or n
