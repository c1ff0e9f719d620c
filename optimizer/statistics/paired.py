"""Two models answer the same items, right or wrong: is the share lost within the margin?

`lost` counts items that the source answers right and the candidate wrong, `gained` the reverse; the loss is
d = (lost - gained) / n. The test orders tables by a score and takes its p-value from the exact distribution of
(lost, gained) at the worst nuisance parameter, so its size is at most its level; Tango's own asymptotic interval passes
falsely up to 6.8 % of the time at a nominal 5 % (n = 268, margin 1 point).

The score is Tango's, at levels below 0.04 corrected for skewness. In Tango's own order many changes that cancel come
before no change at all: its p-value of no change is 1.5 times (1 - margin)^n at a level of 0.0125, 5 times at 0.0008,
and 750 items without a change would not show a loss below 1 point at 0.0031. Corrected, it is (1 - margin)^n at every
level; at 0.05 Tango's order is as good there, and 1 to 3 points more powerful where 4 to 8 % of the items change.

Cost: about 40 ms a p-value and 0.5 s a bound at n = 3000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .clusters import Array, design_effect, sum_by_group
from .rate import zero_change_floor

_NUISANCE_POINTS = 400
_REFINED_PEAKS = 3
_ROUGH_POINTS = 48
_TIE = 1e-10  # statistics closer than this are one outcome: floating point, not evidence
_RESOLUTION = 2e-6  # of a bound, in fractions of the items
_WIDEST = 1 - 1e-9
_UNCORRECTED_LEVEL = 0.04


def score_statistic(lost: ArrayLike, gained: ArrayLike, n: int, margin: float, corrected: bool = False) -> Array:
    """Return the score statistic of H0: d = `margin`; negative speaks for a smaller loss.

    `corrected`: the normal quantile that the score is after its skewness is taken off.

    Source: Tango 1998, Statistics in Medicine 17:891-908; the restricted maximum likelihood estimate of
    P(gained) is that of Nam 1997, Biometrics 53:1422-1430. Correction: Gart & Nam 1990, Biometrics 46:637-643, solved
    for the quantile as in Laud 2017, Pharmaceutical Statistics 16:334-348.
    """
    lost, gained = np.asarray(lost, np.float64), np.asarray(gained, np.float64)
    linear = (2 * n - lost + gained) * margin - lost - gained
    root = np.sqrt(np.maximum(linear**2 + 8 * n * gained * margin * (1 - margin), 0))
    p_gained = np.maximum((root - linear) / (4 * n), max(0.0, -margin))
    variance = np.maximum(2 * p_gained + margin * (1 - margin), 1e-300)
    statistic: Array = (lost - gained - n * margin) / np.sqrt(n * variance)
    if not corrected:
        return statistic
    third_moment = margin * (1 - 6 * p_gained - 3 * margin + 2 * margin**2)
    sixth = third_moment / variance**1.5 / math.sqrt(n) / 6
    shifted = statistic + sixth
    quantile: Array = 2 * shifted / (1 + np.sqrt(np.maximum(1 + 4 * sixth * shifted, 0)))
    return quantile


def is_shown(lost: int, gained: int, n: int, margin: float, alpha: float) -> bool:
    """Tell whether the items show, at level `alpha`, a loss below `margin`: the test that every bound inverts."""
    return p_value(lost, gained, n, margin, _is_corrected(alpha)) <= alpha


def _is_corrected(alpha: float) -> bool:
    return alpha < _UNCORRECTED_LEVEL


def p_value(lost: int, gained: int, n: int, margin: float, corrected: bool = False) -> float:
    """Return the exact unconditional p-value of H0: d >= `margin`; small shows that the loss is below the margin.

    The supremum over d >= margin sits at d = margin, because the statistic meets Barnard's condition; over the nuisance
    P(gained) it is taken on 400 points equally spaced in its square root, then refined around the three highest.

    `corrected`: order the tables by the score corrected for skewness.

    Source: Hsueh, Liu & Chen 2001, Biometrics 57:478-483; Sidik 2003, Statistics in Medicine 22:265-278.
    """
    threshold = float(score_statistic(lost, gained, n, margin, corrected)) + _TIE
    return _Tail(threshold, n, margin, corrected).highest_probability()


def critical_region(n: int, margin: float, alpha: float, is_rough: bool = False) -> NDArray[np.int64]:
    """Find for every count of gains [n + 1] the most losses that still show a loss below `margin` (-1: none do).

    A rough region takes the supremum over 48 points and its threshold to 0.002: it may hold a few tables too many or
    too few, costs a tenth, and is good enough to plan with.
    """
    from scipy.special import ndtri

    corrected, resolution = _is_corrected(alpha), 2e-3 if is_rough else 1e-7
    low, high = float(ndtri(alpha)) - 3, float(ndtri(alpha)) + 3
    while high - low > resolution:
        middle = (low + high) / 2
        tail = _Tail(middle, n, margin, corrected)
        if (tail.rough_probability() if is_rough else tail.highest_probability()) <= alpha:
            low = middle
        else:
            high = middle
    return _Tail(low, n, margin, corrected).most_losses


class _Tail:
    """The tables whose score is at or below a threshold, and how probable they are when d = margin."""

    def __init__(self, threshold: float, n: int, margin: float, corrected: bool) -> None:
        from scipy.special import gammaln

        self.n, self.margin = n, margin
        self.gains = np.arange(n + 1)
        self.most_losses = self._most_losses(threshold, corrected)
        self.log_choose = gammaln(n + 1) - gammaln(self.gains + 1) - gammaln(n - self.gains + 1)

    def _most_losses(self, threshold: float, corrected: bool) -> NDArray[np.int64]:
        """Find for every count of gains the most losses that stay at or below the threshold (-1: none) [n + 1].

        Bisection, for the statistic increases in the losses. It decreases in the gains, but for the corrected one at
        margins beyond half of the items: there the tail is made one that does, as Barnard's condition asks.
        """
        low, high = np.full(self.n + 1, -1), self.n - self.gains
        while np.any(low < high):
            middle = (low + high + 1) // 2
            is_in = score_statistic(middle, self.gains, self.n, self.margin, corrected) <= threshold
            low, high = np.where(is_in, middle, low), np.where(is_in, high, middle - 1)
        return np.minimum(np.maximum.accumulate(low), self.n - self.gains)

    def rough_probability(self) -> float:
        """Return the highest probability of the tail over a coarse grid of P(gained)."""
        return max(self.probability(q) for q in self._grid(_ROUGH_POINTS))

    def _grid(self, points: int) -> Array:
        return np.linspace(math.sqrt(max(0.0, -self.margin)), math.sqrt((1 - self.margin) / 2), points) ** 2

    def highest_probability(self) -> float:
        """Return the probability of the tail at the worst P(gained)."""
        grid = self._grid(_NUISANCE_POINTS)
        heights = np.array([self.probability(q) for q in grid])
        highest = float(heights.max())
        for peak in np.argsort(heights)[-_REFINED_PEAKS:]:
            left, right = grid[max(peak - 1, 0)], grid[min(peak + 1, len(grid) - 1)]
            highest = max(highest, *(self.probability(q) for q in np.linspace(left, right, 15)))
        return float(min(highest, 1.0))

    def probability(self, p_gained: float) -> float:
        """Return the probability of the tail at P(gained) = `p_gained`, P(lost) = `p_gained` + margin."""
        from scipy.special import bdtr, xlog1py, xlogy

        reach = int(9 * math.sqrt(self.n * p_gained) + 12)  # beyond nine deviations lies less than 1e-16
        centre = int(self.n * p_gained)
        gains = self.gains[max(0, centre - reach) : centre + reach + 1]
        gains = gains[self.most_losses[gains] >= 0]
        if not len(gains):
            return 0.0
        rest = self.n - gains
        log_pmf = self.log_choose[gains] + xlogy(gains, p_gained) + xlog1py(rest, -p_gained)
        losses = np.minimum(self.most_losses[gains], rest).astype(np.float64)
        p_lost = min(max((p_gained + self.margin) / (1 - p_gained), 0.0), 1.0)  # rounding leaves the unit interval
        cdf = np.where(losses >= rest, 1.0, bdtr(losses, rest, p_lost))
        return float(np.sum(np.exp(log_pmf) * cdf))


def upper_bound(lost: int, gained: int, n: int, alpha: float) -> float:
    """Return the upper 1 - `alpha` bound of the loss: the smallest margin that the exact test rejects.

    With nothing lost or gained this is 1 - alpha^(1/n).
    """
    if lost == gained == 0:
        return float(1 - alpha ** (1 / n))
    if lost == n:
        return 1.0
    low, high = _bracket(lost, gained, n, alpha)
    while high - low > _RESOLUTION:
        middle = (low + high) / 2
        if is_shown(lost, gained, n, middle, alpha):
            high = middle
        else:
            low = middle
    return high


def _bracket(lost: int, gained: int, n: int, alpha: float) -> tuple[float, float]:
    """Find two margins around Tango's asymptotic bound, the lower not rejected, the upper rejected."""
    floor = max((lost - gained) / n, -_WIDEST)
    low = high = _asymptotic_upper_bound(lost, gained, n, alpha)
    step = 0.5 / n
    while high < _WIDEST and not is_shown(lost, gained, n, high, alpha):
        low, high, step = high, min(high + step, _WIDEST), 2 * step
    if low < high:
        return low, high
    while low > floor and is_shown(lost, gained, n, low, alpha):
        low, high, step = max(low - step, floor), low, 2 * step
    return low, high


def _asymptotic_upper_bound(lost: int, gained: int, n: int, alpha: float) -> float:
    from scipy.special import ndtri

    low, high = max((lost - gained) / n, -_WIDEST), _WIDEST
    while high - low > _RESOLUTION:
        middle = (low + high) / 2
        if score_statistic(lost, gained, n, middle) <= ndtri(alpha):
            high = middle
        else:
            low = middle
    return high


def upper_bound_at(margin: float, lost: int, gained: int, n: int, alpha: float) -> float:
    """Return the upper bound, on the same side of `margin` as the test puts it: at or below when the test rejects.

    The p-value is not strictly monotone in the margin, so inversion alone could disagree with the test in the sixth
    digit.
    """
    bound = upper_bound(lost, gained, n, alpha)
    if is_shown(lost, gained, n, margin, alpha):
        return min(bound, margin)
    return max(bound, math.nextafter(margin, math.inf))


def lower_bound_at(margin: float, lost: int, gained: int, n: int, alpha: float) -> float:
    """Return the lower bound, above `margin` exactly when the test shows that the loss is larger.

    The loss of one model is the gain of the other: lower(lost, gained) = -upper(gained, lost).
    """
    bound = -upper_bound(gained, lost, n, alpha)
    if is_shown(gained, lost, n, -margin, alpha):
        return max(bound, math.nextafter(margin, math.inf))
    return min(bound, margin)


def grouped_design_effect(losses: Array, groups: Sequence[str]) -> float:
    """Return by how much the variance of the mean of `losses` [n], each -1, 0 or 1, exceeds that of ungrouped items."""
    unit_variance = float(np.mean(losses**2) - np.mean(losses) ** 2)
    return design_effect(sum_by_group(losses, groups), sum_by_group(np.ones(len(losses)), groups), unit_variance)


def shrunk(hurting: int, helping: int, n: int, effect: float) -> tuple[int, int, int]:
    """Divide counts by a design effect, rounded against the claim: more that hurts, less that helps, fewer in all."""
    effective = max(1, math.floor(n / effect))
    more = min(math.ceil(hurting / effect), effective)
    return more, min(math.floor(helping / effect), effective - more), effective


def mcnemar_p(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of "the models are right equally often": evidence of any difference.

    Source: McNemar 1947, Psychometrika 12:153-157, with the binomial distribution.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(float(min(lost, gained)), lost + gained, 0.5))) if lost + gained else 1.0


def items_needed(margin: float, discordance: float, alpha: float, power: float = 0.8, loss: float = 0.0) -> int:
    """Count the items that show a loss within `margin` with probability `power`, by formula.

    Args:
        margin: budget, in fractions of the items.
        discordance: share of items that exactly one of the models answers right.
        alpha: level of the pass claim.
        power: probability of a pass.
        loss: true loss, below `margin`.

    Source: Nam 1997, Biometrics 53:1422-1430.
    """
    from scipy.special import ndtri

    linear = (2 - loss) * margin - discordance
    p_gained = (math.sqrt(linear**2 + 4 * (discordance - loss) * margin * (1 - margin)) - linear) / 4
    by_alpha = ndtri(1 - alpha) * math.sqrt(2 * p_gained + margin * (1 - margin))
    spread = by_alpha + ndtri(power) * math.sqrt(discordance - loss**2)
    return max(zero_change_floor(margin, alpha), math.ceil(float(spread / (margin - loss)) ** 2))
