"""What a gate will be able to show, said before any model is run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gate import Budget
from .statistics import clusters, paired, power, rate
from .statistics.sequential import INFLATION

WANTED = 0.8
_BY_RECORD = ("accuracy", "f1")
_BCA_ITEMS = 500
_BCA_CHANGES = 20


@dataclass(frozen=True)
class Forecast:
    """What a number of items can be expected to show when nothing is truly lost.

    Attributes:
        power: probability of a pass.
        items: that give a pass with probability 0.8; None where none do, because the loss assumed is not within the
            budget.
        floor: fewest items that can pass at all, even when nothing changes.
    """

    power: float
    items: int | None
    floor: int

    def can_pass(self, n: int) -> bool:
        """Tell whether `n` items can pass at all."""
        return n >= self.floor


def forecast(
    budget: Budget,
    n: int,
    spread: float,
    *,
    alpha: float = 0.05,
    loss: float = 0.0,
    top_up: bool = False,
    score: float = 1.0,
) -> Forecast:
    """Return what `n` items will show.

    Exact for accuracy, looks included, and for flips; the others are normal approximations, and f1 counts as accuracy
    with the same share of changed answers.

    Args:
        budget: the loss allowed.
        n: the most items: of accuracy and f1 items, of flips positions, of the others documents. Where they share
            groups, the effective number, such as an earlier `Verdict.n_effective`.
        spread: what an earlier `Verdict.spread` tells. accuracy: discordance, the share of items that exactly one of
            the models answers right; f1: share of answers that change; flips: their rate; perplexity, nats_per_byte,
            kl: standard deviation of a document's residual loss in nats; others: of the score, times the root of n.
        alpha: one-sided level of the pass claim.
        loss: true loss assumed, in the unit of the limit; kl, which is never 0, needs one.
        top_up: whether the gate looks at an eighth, a quarter, a half and all of the items.
        score: the source's own, for a relative budget.

    Raises:
        ValueError: `spread` is not a number above or at 0.
    """
    if not spread >= 0:
        raise ValueError(f"forecast: spread out of range, got {spread}, expected 0 or more")
    margin = budget.limit * (score if budget.relative and budget.metric != "perplexity" else 1.0)
    if budget.metric in _BY_RECORD:
        return _by_record(budget.metric, margin, n, min(spread, 1.0), alpha, loss, top_up)
    factor = INFLATION if top_up else 1.0
    if budget.metric == "flips":
        return _by_rate(margin, math.floor(n / factor), min(spread, 1.0), alpha, factor)
    if budget.metric == "perplexity":
        margin, loss = math.log1p(margin), math.log1p(loss)
    floor = _BCA_ITEMS if budget.metric == "spearman" else clusters.FEWEST_GROUPS
    reached = power.mean_power(margin, spread, n / factor, alpha, loss) if n >= floor else 0.0
    return Forecast(reached, _documents(margin - loss, spread, alpha, factor, floor), floor)


def _by_record(metric: str, margin: float, n: int, changed: float, alpha: float, loss: float, top_up: bool) -> Forecast:
    floor = rate.zero_change_floor(margin, alpha)
    loss = min(max(loss, -changed), changed)

    def reached(items: int) -> float:
        if metric == "f1" and items < _BCA_ITEMS and items * changed >= _BCA_CHANGES:
            return 0.0
        return power.power(margin, changed, items, alpha, loss, top_up=top_up)

    if loss >= margin:
        return Forecast(reached(n), None, floor)
    first = paired.items_needed(margin, changed, alpha, WANTED, loss)
    first = math.ceil(INFLATION * first) if top_up else first
    least = _BCA_ITEMS if metric == "f1" and first * changed >= _BCA_CHANGES else floor
    return Forecast(reached(n), power.enough(reached, first, least, alpha, WANTED), floor)


def _by_rate(margin: float, n: int, expected: float, alpha: float, factor: float) -> Forecast:
    floor = rate.zero_change_floor(margin, alpha)
    reached = power.rate_power(margin, expected, n, alpha)
    if expected >= margin:
        return Forecast(reached, None, floor)

    def power_of(positions: int) -> float:
        return power.rate_power(margin, expected, positions, alpha)

    positions = power.enough(power_of, rate.positions_needed(expected, margin, alpha, WANTED), floor, alpha, WANTED)
    return Forecast(reached, math.ceil(factor * positions) if positions > floor else floor, floor)


def _documents(distance: float, deviation: float, alpha: float, factor: float, floor: int) -> int | None:
    """Count the documents that tell a loss from the budget: ((z_alpha + z_beta) s / distance)^2."""
    from scipy.special import ndtri

    if distance <= 0:
        return None
    units = (float(ndtri(1 - alpha) + ndtri(WANTED)) * deviation / distance) ** 2
    return max(floor, math.ceil(factor * units))
