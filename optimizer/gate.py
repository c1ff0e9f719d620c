"""One question: is the candidate shown to be no worse than the budget allows?

Both models answered the same items. For a loss d (positive: the candidate is worse) and a budget m: **pass** when the
upper one-sided 1 - alpha bound of d is at most m, **fail** when its lower bound is above m, else **inconclusive**. The
two errors exclude each other, so neither claim takes level from the other (Berger 1982, Technometrics 24:295-300).
Nothing here reads a file or loads a model. `evidence.py` has what each metric shows, `statistics/` the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from .evidence import (
    FEW_CHANGES,
    FEW_GROUPS,
    NEAR_CHANCE,
    SKEWED,
    TRUNCATED,
    Evidence,
    Question,
    Warnings,
    compare,
    skip_words,
)
from .scores import AGAINST_SOURCE, ARRAYS, Scores, check, noise, not_finite
from .statistics.records import Score
from .statistics.sequential import INFLATION, Spending, looks

__all__ = [
    "FLAGS",
    "Budget",
    "Outcome",
    "Scores",
    "Spending",
    "Verdict",
    "judge",
    "looks",
    "noise",
    "require_judgeable",
]

Outcome: TypeAlias = Literal["pass", "fail", "inconclusive"]

ANOMALOUS = "anomalous"
NOT_A_NUMBER = "not a number"
NOISY = "noisy"
FLAGS = (ANOMALOUS, FEW_CHANGES, FEW_GROUPS, NEAR_CHANCE, NOISY, NOT_A_NUMBER, SKEWED, TRUNCATED)

_SHARES = ("accuracy", "f1", "spearman", "flips")
_ANOMALY_LEVEL = 0.001
_NOTHING = Evidence(math.nan, math.nan, math.nan, math.nan, items_needed=None)


@dataclass(frozen=True)
class Budget:
    """How much of one metric may be lost against the source.

    Attributes:
        metric: as in `Scores`.
        limit: perplexity: relative increase (0.01 is 1 %); accuracy, f1 and spearman: drop (0.01 is one point); flips:
            share of positions; kl: nats per token; nats_per_byte: nats. Above 0: no sample can show a loss of nothing.
        relative: accuracy, f1, spearman and nats_per_byte only: `limit` is a share of the source's own score.
        score: which of a task's scores it judges, where that has another name than its metric.
        compute: what scores answers and references, both label indices [n], where the metric is none of these; its
            limit is in its own unit, and the loss a drop or a rise, whichever is worse.
    """

    metric: str
    limit: float
    relative: bool = False
    score: str = ""
    compute: Score | None = None

    @property
    def judges(self) -> str:
        """Return the name of the score that is judged."""
        return self.score or self.metric

    def __post_init__(self) -> None:
        if self.metric not in ARRAYS and self.compute is None:
            raise ValueError(f"budget: unknown metric, got {self.metric!r}, expected one of {', '.join(ARRAYS)}")
        if self.metric in ARRAYS and self.compute is not None:
            raise ValueError(f"budget: {self.metric!r} is the name of a metric that is known; call yours differently")
        if not (self.limit > 0 and math.isfinite(self.limit)) or (self.metric in _SHARES and self.limit >= 1):
            expected = "above 0 and below 1" if self.metric in _SHARES else "above 0 and finite"
            raise ValueError(f"budget of {self.metric}: limit out of range, got {self.limit}, expected {expected}")
        if self.relative and self.metric in AGAINST_SOURCE:
            raise ValueError(f"budget of {self.metric}: cannot be relative, the source's own {self.metric} is 0")


@dataclass(frozen=True)
class Verdict:
    """The gate's answer, with all that a report needs.

    Attributes:
        metric: as in `Scores`.
        outcome: what is shown: "pass", "fail" or neither.
        source: the source's score.
        candidate: the candidate's score.
        difference: the loss, positive where the candidate is worse. perplexity: relative increase; accuracy, f1 and
            spearman: drop as a fraction, also when the budget was relative; flips: share of positions; kl: nats per
            token; nats_per_byte: nats; others: in their unit.
        lower: one-sided bound of the loss at the level of the fail claim.
        upper: one-sided bound of the loss at level `alpha`.
        limit: the budget in the same unit as the difference.
        alpha: level of the pass claim; of this look, where there are several.
        n_items: items compared.
        n_effective: independent units that carry as much information: items (accuracy), groups (f1, spearman),
            documents (perplexity, kl), positions (flips).
        reason: why, in a clause or two: what is missing, what to be wary of.
        items_needed: items of this kind that would decide with probability 0.8; None when decided.
        mcnemar_p: accuracy of ungrouped items: evidence of any difference at all; never used to decide.
        flags: warnings a program can read: `FLAGS`.
        spread: what `power.forecast` plans with; nan where too few answers changed for one.
        looked_at: items after which level was last spent: `n_items`, or the look before when this one was skipped
            because it could not decide.
        is_hopeless: the items still to come would hardly decide either.
    """

    metric: str
    outcome: Outcome
    source: float
    candidate: float
    difference: float
    lower: float
    upper: float
    limit: float
    alpha: float
    n_items: int
    n_effective: float
    reason: str
    items_needed: int | None
    mcnemar_p: float | None
    flags: tuple[str, ...]
    spread: float = math.nan
    looked_at: int = 0
    is_hopeless: bool = False


def require_judgeable(scores: Mapping[str, Scores], budget: Budget) -> None:
    """Raise ValueError `metric: ...` unless a task's scores hold the one a budget judges, of the kind it judges."""
    found = scores.get(budget.judges)
    if found is None:
        raise ValueError(f"metric: got {budget.judges!r}, expected one of {', '.join(scores)}")
    if found.metric != budget.metric:
        raise ValueError(
            f"metric: {budget.judges} is not right or wrong for each item, so no interval is known; leave it out of "
            "the gate, its score is reported"
        )


def judge(
    source: Scores,
    candidate: Scores,
    budget: Budget,
    *,
    alpha: float = 0.05,
    fail_alpha: float | None = None,
    chance: float | None = None,
    spending: Spending | None = None,
    self_noise: float = 0.0,
) -> Verdict:
    """Decide whether `candidate` is shown to stay within `budget` of `source`.

    Args:
        source: scores of the untouched model.
        candidate: scores of the changed model on the same items.
        budget: the loss allowed.
        alpha: one-sided level of the pass claim, below 0.5.
        fail_alpha: one-sided level of the fail claim; `alpha` when None.
        chance: accuracy only: share of the most frequent label. A source hardly above it is flagged.
        spending: where the items are the first of more to come: what this look may spend of both levels. A look that
            could not decide is skipped: it spends nothing, and is inconclusive whatever its interval.
        self_noise: `noise` of the source: share of the items that it scores differently when asked again. Flagged; in
            the interval anyway, for it is part of what differs.

    Raises:
        ValueError: the scores are not of the same items, or not of the budget's metric.
    """
    check(source, candidate, budget.metric)
    limit = budget.limit * (source.point if budget.relative and budget.metric != "perplexity" else 1.0)
    levels = alpha, alpha if fail_alpha is None else fail_alpha
    if not all(0 < level < 0.5 for level in levels):
        raise ValueError(f"gate: level out of range, got {levels}, expected above 0 and below 0.5")
    look = spending or Spending(len(source.groups))
    pass_level, fail_level = (look.level(level, len(source.groups)) for level in levels)
    question = Question(source, candidate, limit, pass_level, fail_level, chance, levels, budget.compute, self_noise)
    broken = not_finite("source", source) or not_finite("candidate", candidate)
    if broken:
        return _verdict(question, _NOTHING, "fail", broken, ((NOT_A_NUMBER, ""),))
    if limit <= 0:
        reason = f"the source's own {source.metric} is {source.point:g}: a share of it allows nothing"
        return _skipped(_verdict(question, _NOTHING, "inconclusive", reason, ()), look)
    return _look(question, look)


def _look(question: Question, look: Spending) -> Verdict:
    """Decide by what the items show; a look before the last is skipped when they cannot decide whatever they show."""
    is_last = question.n == look.most
    skipped = "" if is_last else skip_words(question, look.most)
    if skipped:  # the interval of a single look: that of this one would take minutes of resampling
        question = replace(question, alpha=question.levels[0], fail_alpha=question.levels[1])
    evidence = compare(question)
    skipped = skipped or ("" if is_last else evidence.refusal or evidence.undecided)
    if skipped:
        evidence = replace(evidence, refusal=f"look skipped: {skipped}")
    outcome, words = _decide(question, evidence)
    is_hopeless = outcome == "inconclusive" and not skipped and _is_hopeless(question, evidence, look)
    if outcome == "inconclusive" and not (skipped or is_last):
        words = f"not decided by {question.n:,} of {look.most:,} items" + (", nor likely by all" if is_hopeless else "")
    if evidence.items_needed and look != Spending(question.n):
        evidence = replace(evidence, items_needed=math.ceil(INFLATION * evidence.items_needed))
    verdict = _verdict(question, evidence, outcome, words, _warnings(question, evidence))
    return _skipped(verdict, look) if skipped else replace(verdict, is_hopeless=is_hopeless)


def _skipped(verdict: Verdict, look: Spending) -> Verdict:
    """Return a verdict whose look spends nothing, as long as another one follows."""
    return verdict if verdict.n_items == look.most else replace(verdict, looked_at=look.previous)


def _is_hopeless(question: Question, evidence: Evidence, look: Spending) -> bool:
    from scipy.special import ndtri

    width = evidence.upper - evidence.lower
    if not math.isfinite(width):
        return False
    error = width / -float(ndtri(question.alpha) + ndtri(question.fail_alpha))
    return look.is_hopeless(evidence.difference, error, question.limit, question.n, question.levels)


def _verdict(question: Question, evidence: Evidence, outcome: Outcome, words: str, warnings: Warnings) -> Verdict:
    return Verdict(
        metric=question.source.metric,
        outcome=outcome,
        source=question.source.point,
        candidate=question.candidate.point,
        difference=evidence.difference,
        lower=evidence.lower,
        upper=evidence.upper,
        limit=question.limit,
        alpha=question.alpha,
        n_items=question.n,
        n_effective=evidence.n_effective,
        reason="; ".join([words, *(text for _, text in warnings if text)]),
        items_needed=evidence.items_needed if outcome == "inconclusive" else None,
        mcnemar_p=evidence.mcnemar_p,
        flags=tuple(flag for flag, _ in warnings),
        spread=evidence.spread,
        looked_at=question.n,
    )


def _decide(question: Question, evidence: Evidence) -> tuple[Outcome, str]:
    """Compare the bounds with the limit; written so that a nan can never pass."""
    lower, upper, limit = evidence.lower, evidence.upper, question.limit
    if math.isnan(lower) or math.isnan(upper):
        return "fail", "the bounds of the loss are not numbers"
    if evidence.refusal:
        return "inconclusive", evidence.refusal
    if upper <= limit:
        return "pass", "shown to be within the budget"
    if lower > limit:
        return "fail", "shown to be worse than the budget allows"
    return "inconclusive", evidence.undecided or f"not decided by {question.n} items"


def _warnings(question: Question, evidence: Evidence) -> Warnings:
    warnings = evidence.warnings
    if math.isnan(evidence.lower + evidence.upper):
        warnings += ((NOT_A_NUMBER, ""),)
    if question.self_noise > 0:
        words = f"the source itself scores {100 * question.self_noise:.2g} % of the items differently when asked again"
        warnings += ((NOISY, words),)
    if _is_anomalous(question, evidence):
        warnings += ((ANOMALOUS, "the gain is larger than the budget: check that both models answered the same task"),)
    return warnings


def _is_anomalous(question: Question, evidence: Evidence) -> bool:
    """Tell whether the candidate is better than the source by more than the budget, beyond doubt."""
    if not -evidence.difference > question.limit:
        return False
    strict = replace(question, alpha=_ANOMALY_LEVEL, fail_alpha=_ANOMALY_LEVEL)
    return compare(strict).upper < 0
