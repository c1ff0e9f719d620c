"""Speed budgets, and what decides them: a handful of restarts, each a fresh pair of processes that took turns.

A process keeps the luck of its start (where its memory lies, how its threads fell) for as long as it lives, so many
measurements inside one pair of processes say much about that pair and little about the models. The restart is the unit:
its value is the median of the ratios of neighbouring measurements. A ratio is bounded by the signed-rank statistic of
the logarithms, an absolute number by order statistics of its own. Where 8 restarts do not decide, 8 more are made; the
first look takes a quarter of the level, the second the rest.

Source: Kalibera & Jones 2013, ISMM, 63-74 (the unit); Hodges & Lehmann 1963, Annals of Mathematical Statistics
34:598-611 (the estimate). How often this claims too much: benchmarks/speed_gate.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optimizer.gate import Outcome
from optimizer.quantities import check_ranges
from optimizer.statistics.signed_rank import hodges_lehmann, median_bounds, signed_rank_bounds

FIRST_LOOK, LAST_LOOK = 8, 16
"""Restarts after which the gate looks."""

_REASONS: Mapping[Outcome, str] = {
    "pass": "shown to be within the budget",
    "fail": "shown to be slower than the budget allows",
    "inconclusive": "not decided by {} restarts; measure on a machine that does nothing else",
}


@dataclass(frozen=True)
class SpeedLimit:
    """What one metric must reach, or stay below.

    Attributes:
        metric: as in `runtime.bench`.
        value: the budget.
        is_ratio: whether the budget is a share of the reference artifact's value.
    """

    metric: str
    value: float
    is_ratio: bool

    @property
    def is_least(self) -> bool:
        """Say whether more is better."""
        return self.metric.endswith("_per_s")

    def allows(self, value: float) -> bool:
        """Say whether a value is within the budget; nan never is."""
        return value >= self.value if self.is_least else value <= self.value


@dataclass(frozen=True, kw_only=True)
class RateBudget:
    """How much must be done in a second."""

    min_ratio: float | None = field(
        default=None, metadata={"help": "least rate as a share of the reference artifact's", "gt": 0}
    )
    min: float | None = field(default=None, metadata={"help": "least rate on this machine", "gt": 0})

    def __post_init__(self) -> None:
        check_ranges(self)
        _require_one(self, "min_ratio", "min")

    def limits(self, metric: str) -> tuple[SpeedLimit, ...]:
        """Return what is demanded of a metric."""
        return _limits(metric, self.min_ratio, self.min)


@dataclass(frozen=True, kw_only=True)
class LatencyBudget:
    """How long an answer may take."""

    max_ratio: float | None = field(
        default=None, metadata={"help": "longest time as a share of the reference artifact's", "gt": 0}
    )
    max: float | None = field(default=None, metadata={"help": "longest time on this machine", "gt": 0})

    def __post_init__(self) -> None:
        check_ranges(self)
        _require_one(self, "max_ratio", "max")

    def limits(self, metric: str) -> tuple[SpeedLimit, ...]:
        """Return what is demanded of a metric."""
        return _limits(metric, self.max_ratio, self.max)


def _require_one(budget: RateBudget | LatencyBudget, ratio: str, absolute: str) -> None:
    if getattr(budget, ratio) is None and getattr(budget, absolute) is None:
        raise ValueError(f"got neither, expected {ratio} (against the reference artifact) or {absolute}")


def _limits(metric: str, ratio: float | None, absolute: float | None) -> tuple[SpeedLimit, ...]:
    given = ((ratio, True), (absolute, False))
    return tuple(SpeedLimit(metric, value, is_ratio) for value, is_ratio in given if value is not None)


@dataclass(frozen=True)
class Restart:
    """What one pair of processes measured: by metric, one value per turn, those of a pair at the same place.

    Attributes:
        reference: of the reference artifact; empty where nothing is compared with it.
        candidate: of the model that is judged.
    """

    reference: Mapping[str, Sequence[float]]
    candidate: Mapping[str, Sequence[float]]

    def value(self, limit: SpeedLimit) -> float:
        """Return what this restart says of a budget: median ratio of its pairs, or median of the candidate."""
        candidate = self.candidate[limit.metric]
        if not limit.is_ratio:
            return statistics.median(candidate)
        pairs = zip(self.reference[limit.metric], candidate, strict=True)
        return math.exp(statistics.median(math.log(after / before) for before, after in pairs))


@dataclass(frozen=True)
class SpeedVerdict:
    """What a speed gate says, with all that a report needs.

    Attributes:
        metric: what is measured: `prefill_tokens_per_s`, `decode_tokens_per_s`, `texts_per_s`, `ttft_ms`, `latency_ms`.
        outcome: what is shown: "pass", "fail" or neither.
        is_ratio: whether estimate, bounds and limit are shares of the reference artifact's value.
        limit: the budget: a least value for a rate, a largest one for a time.
        reference: median over restarts of the reference artifact; None where nothing is compared with it.
        candidate: median over restarts of the model that is judged.
        estimate: the ratio (Hodges-Lehmann, over restarts), or the candidate's median.
        lower: one-sided bound of the estimate, at the level of the claim it serves.
        upper: the same from above; for a rate `lower` serves the pass claim, for a time `upper`.
        alpha: level of the pass claim over both looks.
        restarts: fresh pairs of processes.
        by_restart: what is estimated, in each of them.
        reason: why, in a clause.
    """

    metric: str
    outcome: Outcome
    is_ratio: bool
    limit: float
    reference: float | None
    candidate: float
    estimate: float
    lower: float
    upper: float
    alpha: float
    restarts: int
    by_restart: tuple[float, ...]
    reason: str


@dataclass(frozen=True)
class Timing:
    """Under what conditions speed was measured.

    Attributes:
        restarts: fresh pairs of processes.
        pairs: pairs of turns in each.
        input_tokens: of a prompt, or of each text.
        new_tokens: that were generated; 0 for an encoder.
        batch: texts read at once for `texts_per_s`; 1 for a decoder.
        threads: per operator.
        cores: that this process may use.
        processor: its name.
        clock_mhz: of its cores on average, before; None where the system does not say.
        governor: what sets the clock; None where the system does not say.
        load_before: average over the last minute.
        load_after: the same at the end, the measurement itself included.
        seconds: that it took.
    """

    restarts: int
    pairs: int
    input_tokens: int
    new_tokens: int
    batch: int
    threads: int
    cores: int
    processor: str
    clock_mhz: float | None
    governor: str | None
    load_before: float
    load_after: float
    seconds: float


def decide(
    limits: Sequence[SpeedLimit], restart: Callable[[int], Restart], *, alpha: float, fail_alpha: float
) -> tuple[SpeedVerdict, ...]:
    """Make restarts until every budget is decided, at most `LAST_LOOK`; return a verdict for each.

    A budget that the first look decides keeps that verdict.

    Args:
        limits: the budgets.
        restart: makes the restart of that number.
        alpha: one-sided level of each pass claim, both looks together.
        fail_alpha: the same of each fail claim.
    """
    restarts = [restart(number) for number in range(FIRST_LOOK)]
    first = tuple(judge(limit, restarts, alpha, fail_alpha) for limit in limits)
    if all(verdict.outcome != "inconclusive" for verdict in first):
        return first
    restarts += [restart(number) for number in range(FIRST_LOOK, LAST_LOOK)]
    return tuple(
        judge(limit, restarts, alpha, fail_alpha) if verdict.outcome == "inconclusive" else verdict
        for limit, verdict in zip(limits, first, strict=True)
    )


def judge(limit: SpeedLimit, restarts: Sequence[Restart], alpha: float, fail_alpha: float) -> SpeedVerdict:
    """Judge a budget by `FIRST_LOOK` or `LAST_LOOK` restarts; levels are those of both looks together."""
    levels = [level_of_look(len(restarts), level) for level in (alpha, fail_alpha)]
    lower_alpha, upper_alpha = levels if limit.is_least else reversed(levels)
    values = [restart.value(limit) for restart in restarts]
    if limit.is_ratio:
        logs = [math.log(value) for value in values]
        estimate = math.exp(hodges_lehmann(logs))
        lower, upper = (_exp(bound) for bound in signed_rank_bounds(logs, lower_alpha, upper_alpha))
    else:
        estimate = statistics.median(values)
        lower, upper = median_bounds(values, lower_alpha, upper_alpha)
    outcome = _outcome(limit, lower, upper)
    return SpeedVerdict(
        metric=limit.metric,
        outcome=outcome,
        is_ratio=limit.is_ratio,
        limit=limit.value,
        reference=_median([restart.reference[limit.metric] for restart in restarts]) if limit.is_ratio else None,
        candidate=_median([restart.candidate[limit.metric] for restart in restarts]),
        estimate=estimate,
        lower=lower,
        upper=upper,
        alpha=alpha,
        restarts=len(restarts),
        by_restart=tuple(values),
        reason=_REASONS[outcome].format(len(restarts)),
    )


def level_of_look(restarts: int, alpha: float) -> float:
    """Return the part of a level that a look spends: a quarter at the first, the rest at the last.

    A first look that could not claim anything, whatever its restarts said, spends nothing: with n of them no claim is
    possible below a level of 2^-n.
    """
    first = alpha / 4 if alpha / 4 >= 2.0**-FIRST_LOOK else 0.0
    return first if restarts < LAST_LOOK else alpha - first


def _outcome(limit: SpeedLimit, lower: float, upper: float) -> Outcome:
    worst, best = (lower, upper) if limit.is_least else (upper, lower)
    if limit.allows(worst):
        return "pass"
    return "inconclusive" if limit.allows(best) else "fail"


def _median(by_restart: Sequence[Sequence[float]]) -> float:
    return statistics.median(statistics.median(values) for values in by_restart)


def _exp(value: float) -> float:
    """Return e to a bound that may be infinite."""
    return math.inf if value == math.inf else math.exp(value)
