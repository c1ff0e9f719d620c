"""What two scores of the same items show: the loss, its bounds, what to be wary of. One function per metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .scores import Scores
from .statistics import clusters, macro_f1, paired, rate, ratio, records, spearman
from .statistics.clusters import Array
from .statistics.records import Score

Warnings: TypeAlias = tuple[tuple[str, str], ...]  # (flag for programs, words for people)

FEW_CHANGES = "few changes"
FEW_GROUPS = "few groups"
NEAR_CHANCE = "near chance"
SKEWED = "skewed"
TRUNCATED = "truncated"

_ADVISED_GROUPS = 100
_SKEWED_GROUPS = 200
_BCA_ITEMS = 500
_BCA_CLASS_ITEMS = 5
_BCA_CHANGES = 20
_MEANS = ("perplexity", "nats_per_byte", "flips", "kl")
_LEAST_LEVEL = 0.005
_POWER = 0.8
_LARGEST_LOG = 700.0  # exp of it is still a finite float


@dataclass(frozen=True)
class Question:
    """Two scores of the same items, the loss allowed in the metric's unit, and the levels of both claims.

    `alpha` and `fail_alpha` are the levels of this look, `over_all` those of all looks together.
    """

    source: Scores
    candidate: Scores
    limit: float
    alpha: float
    fail_alpha: float
    chance: float | None = None
    over_all: tuple[float, float] | None = None
    compute: Score | None = None
    self_noise: float = 0.0

    @property
    def levels(self) -> tuple[float, float]:
        """Return the levels of pass and fail over all looks; of this one where it is the only one."""
        return self.over_all or (self.alpha, self.fail_alpha)

    @property
    def planned(self) -> float:
        """Return the level of the pass claim for which the items needed are counted."""
        return self.levels[0]

    @property
    def n(self) -> int:
        """Return the number of items."""
        return len(self.source.groups)

    @property
    def is_grouped(self) -> bool:
        """Tell whether items share a group."""
        return len(set(self.source.groups)) < self.n

    def by_group(self, values: NDArray[Any]) -> Array:
        """Sum per-item values within groups."""
        return clusters.sum_by_group(np.asarray(values, np.float64), self.source.groups)

    def pair(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return one array of the source and the same of the candidate."""
        return np.asarray(self.source.values[name]), np.asarray(self.candidate.values[name])


@dataclass(frozen=True)
class Evidence:
    """What the items show, in the unit of the budget; a `refusal` says why no verdict may rest on it.

    `spread` is what `power.forecast` needs to know to plan with.
    """

    difference: float
    lower: float
    upper: float
    n_effective: float
    items_needed: int | None
    refusal: str = ""
    warnings: Warnings = ()
    undecided: str = ""
    mcnemar_p: float | None = None
    spread: float = math.nan


def skip_words(question: Question, most: int) -> str:
    """Return why a look at some of `most` items cannot carry a verdict, whatever they show; empty when it can.

    Only right and wrong answers are judged exactly at any level. Simulated false pass of means at a level of 0.0025,
    skewness 2, 100 documents: 1.9 times that level.
    """
    if question.source.metric == "accuracy" or (question.source.metric == "flips" and not _is_clustered(question)):
        return ""
    if question.n < most / 2 or question.alpha < _LEAST_LEVEL:
        return f"only exact tests look so early: half of the items and a level of {_LEAST_LEVEL} needed"
    if question.source.metric not in _MEANS and question.n < _BCA_ITEMS:
        return f"{question.n} items; {_BCA_ITEMS} needed"
    return ""


def compare(question: Question) -> Evidence:
    """Bound the loss that the items show."""
    return _COMPARE.get(question.source.metric, _compare_records)(question)


def _compare_accuracy(question: Question) -> Evidence:
    """Compare right and wrong answers by the exact unconditional test.

    Grouped items count for less: the test of each claim gets the counts over the design effect, rounded against it.
    """
    before, after = (values.astype(bool) for values in question.pair("correct"))
    losses = before.astype(np.float64) - after
    lost, gained, n = int(np.sum(losses > 0)), int(np.sum(losses < 0)), question.n
    effect = paired.grouped_design_effect(losses, question.source.groups) if question.is_grouped else 1.0
    against_pass = paired.shrunk(lost, gained, n, effect)
    more_gained, fewer_lost, effective = paired.shrunk(gained, lost, n, effect)
    limit = question.limit
    floor = rate.zero_change_floor(limit, question.alpha)
    needed = paired.items_needed(limit, (lost + gained) / n, question.planned)
    spread = math.sqrt((lost + gained) / n - ((lost - gained) / n) ** 2)
    if needed <= effective:
        needed = _units_needed(spread, limit, (lost - gained) / n, question.planned)
    unit = "effective items" if effect > 1 else "items"
    too_few = f"{effective} {unit} cannot pass: {floor} needed even with none lost"
    return Evidence(
        difference=(lost - gained) / n,
        lower=paired.lower_bound_at(limit, fewer_lost, more_gained, effective, question.fail_alpha),
        upper=paired.upper_bound_at(limit, *against_pass, question.alpha),
        n_effective=effective,
        items_needed=math.ceil(max(needed, effective + 1) * effect),
        refusal=_too_few_groups(question),
        warnings=_few_groups(question) + _near_chance(question, before) + _cut_short(question),
        undecided=too_few if effective < floor else "",
        mcnemar_p=None if question.is_grouped else paired.mcnemar_p(lost, gained),
        spread=(lost + gained) / n,
    )


def _compare_perplexity(question: Question) -> Evidence:
    before, after = question.pair("nll")
    sums, sizes = _documents(question, after.astype(np.float64) - before)
    margin = math.log1p(question.limit)
    evidence = _compare_ratio(question, sums, sizes, margin, assumed_loss=0.0)
    return replace(
        evidence,
        difference=_relative(evidence.difference),
        lower=_relative(evidence.lower),
        upper=_relative(evidence.upper),
    )


def _compare_nats_per_byte(question: Question) -> Evidence:
    """Compare the loss on the same texts by their bytes, whatever the tokens: two vocabularies are as good as one."""
    before, after = question.pair("nll")
    sums = question.by_group(after.astype(np.float64) - before)
    sizes = question.by_group(question.candidate.values["bytes"])
    return _compare_ratio(question, sums[sizes > 0], sizes[sizes > 0], question.limit, assumed_loss=0.0)


def _relative(log_ratio: float) -> float:
    return math.expm1(log_ratio) if log_ratio < _LARGEST_LOG else math.inf


def _compare_kl(question: Question) -> Evidence:
    sums, sizes = _documents(question, np.asarray(question.candidate.values["kl"], np.float64))
    return _compare_ratio(question, sums, sizes, question.limit, assumed_loss=None)


def _documents(question: Question, losses: Array) -> tuple[Array, Array]:
    """Sum losses and tokens within documents that have tokens: two arrays [G]."""
    sums, sizes = question.by_group(losses), question.by_group(question.candidate.values["tokens"])
    return sums[sizes > 0], sizes[sizes > 0]


def _compare_ratio(
    question: Question, sums: Array, sizes: Array, margin: float, assumed_loss: float | None
) -> Evidence:
    """Compare a token-weighted mean with `margin`; documents are the units.

    `assumed_loss` is the true loss for which items needed are forecast; None: the loss seen.
    """
    loss = float(sums.sum() / sizes.sum())
    lower, upper = ratio.ratio_interval(sums, sizes, question.alpha, question.fail_alpha)
    documents, effective = len(sums), clusters.effective_groups(sizes)
    deviation = ratio.document_deviation(sums, sizes) if documents > 1 else 0.0
    needed = _units_needed(deviation, margin, loss if assumed_loss is None else assumed_loss, question.planned)
    if needed <= documents:
        needed = _units_needed(deviation, margin, loss, question.planned)
    needed = max(needed, documents + 1, math.ceil(clusters.FEWEST_GROUPS * documents / effective))
    return Evidence(
        difference=loss,
        lower=lower,
        upper=upper,
        n_effective=effective,
        items_needed=math.ceil(needed * question.n / documents),
        refusal=_floor_words(effective, "documents"),
        warnings=_advice(effective, "documents") + _skewed(sums - loss * sizes, effective),
        spread=deviation,
    )


def _compare_flips(question: Question) -> Evidence:
    """Compare the share of positions whose answer changed; positions of one document hang together."""
    changed, sizes = _documents(question, np.asarray(question.candidate.values["flips"], np.float64))
    share = float(changed.sum() / sizes.sum())
    effective = rate.effective_positions(changed, sizes)
    lower, upper = rate.clustered_rate(changed, sizes, question.alpha, question.fail_alpha)
    floor = rate.zero_change_floor(question.limit, question.alpha)
    needed = max(
        rate.positions_needed(share, question.limit, question.planned) * question.n / effective, question.n + 1
    )
    is_clustered = _is_clustered(question)
    documents = clusters.effective_groups(sizes)
    skew = _skewed(changed - share * sizes, documents)
    too_few = f"{math.floor(effective)} effective positions cannot pass: {floor} needed even with none changed"
    return Evidence(
        difference=share,
        lower=lower,
        upper=upper,
        n_effective=effective,
        items_needed=math.ceil(max(needed, clusters.FEWEST_GROUPS * question.n / documents if is_clustered else 0)),
        refusal=_floor_words(documents, "documents") if is_clustered else "",
        warnings=_advice(documents, "documents") + skew if is_clustered else (),
        undecided=too_few if effective < floor else "",
        spread=share,
    )


def _is_clustered(question: Question) -> bool:
    """Tell whether some document has several positions."""
    return bool(np.any(question.by_group(question.candidate.values["tokens"]) > 1))


def _compare_f1(question: Question) -> Evidence:
    """Compare macro-F1 by BCa, or by the worst that the changed answers could cost when few changed."""
    reference = question.pair("reference")[0].astype(np.int64)
    before, after = (values.astype(np.int64) for values in question.pair("answer"))
    answers = macro_f1.Answers(reference, before, after, question.source.groups)
    changed = int(np.sum(before != after))
    has_few_changes = changed < _BCA_CHANGES
    interval = macro_f1.few_changes_interval if has_few_changes else macro_f1.macro_f1_interval
    lower, upper = interval(answers, question.alpha, question.fail_alpha)
    rarest = int(np.unique(reference, return_counts=True)[1].min())
    needed = max(
        paired.items_needed(question.limit, changed / question.n, question.planned), _BCA_ITEMS, question.n + 1
    )
    words = f"only {changed} answers changed, {_BCA_CHANGES} needed for BCa: bounded as if each did its worst"
    return Evidence(
        difference=macro_f1.macro_f1(reference, before) - macro_f1.macro_f1(reference, after),
        lower=lower,
        upper=upper,
        n_effective=_effective_groups(question),
        items_needed=max(needed, math.ceil(question.n * _BCA_CLASS_ITEMS / rarest)),
        refusal=_f1_refusal(question, rarest, has_few_changes),
        warnings=(((FEW_CHANGES, words),) if has_few_changes else ()) + _few_groups(question),
        spread=changed / question.n,
    )


def _f1_refusal(question: Question, rarest: int, has_few_changes: bool) -> str:
    if rarest < _BCA_CLASS_ITEMS:
        return f"a class has {rarest} reference items; {_BCA_CLASS_ITEMS} needed for macro-F1: gate accuracy instead"
    if question.n < _BCA_ITEMS and not has_few_changes:
        return f"{question.n} items; {_BCA_ITEMS} needed for macro-F1: gate accuracy instead"
    return _too_few_groups(question)


def _compare_spearman(question: Question) -> Evidence:
    """Compare rank correlations by BCa, or by the worst that items could do when few changed places."""
    reference = question.pair("reference")[0].astype(np.float64)
    before, after = (values.astype(np.float64) for values in question.pair("answer"))
    orders = spearman.Orders(reference, before, after, question.source.groups)
    changed = int(np.sum(spearman.changed_places(before, after)))
    has_few_changes = changed < _BCA_CHANGES
    interval = spearman.few_changes_interval if has_few_changes else spearman.spearman_interval
    lower, upper = interval(orders, question.alpha, question.fail_alpha)
    loss = spearman.spearman(reference, before) - spearman.spearman(reference, after)
    words = f"only {changed} items changed places, {_BCA_CHANGES} needed for BCa: bounded as if each did its worst"
    return Evidence(
        difference=loss,
        lower=lower,
        upper=upper,
        n_effective=_effective_groups(question),
        items_needed=_correlated_items_needed(question, loss, upper, reference, before, has_few_changes),
        refusal=_spearman_refusal(question, has_few_changes),
        warnings=(((FEW_CHANGES, words),) if has_few_changes else ()) + _few_groups(question) + _no_order(question),
        spread=math.nan if has_few_changes else _deviation(question, lower, upper),
    )


def _correlated_items_needed(
    question: Question, loss: float, upper: float, reference: Array, before: Array, has_few_changes: bool
) -> int | None:
    """Count the items that would decide: by the width of the interval seen, or by the floor of unchanged ones."""
    from scipy.special import ndtri

    if not math.isfinite(upper):
        return None
    least = max(_BCA_ITEMS, question.n + 1)
    if has_few_changes:  # -log(alpha) items may have changed, and each costs at most (9 - 12 / n) / n: more with ties
        most = spearman.worst_loss_per_move(reference, before) * question.n + 12 / question.n
        return max(least, math.ceil(-math.log(question.planned) * most / question.limit))
    deviation = (upper - loss) / float(ndtri(1 - question.alpha)) * math.sqrt(question.n)
    return max(least, _units_needed(deviation, question.limit, loss, question.planned))


def _compare_records(question: Question) -> Evidence:
    """Compare a score of the user's by BCa, or by the worst that the changed answers tried could cost when few did."""
    if question.compute is None:
        raise ValueError(f"gate: nothing scores {question.source.metric!r}, expected a budget with `compute`")
    reference = question.pair("reference")[0].astype(np.int64)
    before, after = (values.astype(np.int64) for values in question.pair("answer"))
    answered = records.Records(reference, before, after, question.source.groups, question.compute)
    changed, direction = int(np.sum(before != after)), answered.direction()
    has_few_changes = changed < _BCA_CHANGES
    interval = records.few_changes_interval if has_few_changes else records.interval
    lower, upper = interval(answered, question.alpha, question.fail_alpha) if direction else (-math.inf, math.inf)
    loss = direction * (question.compute(before, reference) - question.compute(after, reference))
    words = f"only {changed} answers changed, {_BCA_CHANGES} needed for BCa: bounded by the worst of some changes"
    return Evidence(
        difference=loss,
        lower=lower,
        upper=upper,
        n_effective=_effective_groups(question),
        items_needed=_records_needed(question, loss, lower, upper, has_few_changes),
        refusal=_records_refusal(question, direction, has_few_changes),
        warnings=(((FEW_CHANGES, words),) if has_few_changes else ()) + _few_groups(question),
        spread=math.nan if has_few_changes else _deviation(question, lower, upper),
    )


def _records_needed(question: Question, loss: float, lower: float, upper: float, has_few_changes: bool) -> int | None:
    """Count the items that would decide, by the width of the interval seen."""
    if not math.isfinite(lower + upper):
        return None
    least = max(_BCA_ITEMS, question.n + 1)
    if has_few_changes:
        return max(least, math.ceil(question.n * upper / question.limit))
    return max(least, _units_needed(_deviation(question, lower, upper), question.limit, loss, question.planned))


def _records_refusal(question: Question, direction: int, has_few_changes: bool) -> str:
    if not direction:
        return "right answers score neither more nor less than these of both models: nothing says which is better"
    if question.n < _BCA_ITEMS and not has_few_changes:
        return f"{question.n} items; {_BCA_ITEMS} needed for {question.source.metric}: gate accuracy instead"
    return _too_few_groups(question)


def _deviation(question: Question, lower: float, upper: float) -> float:
    """Return the standard error that an interval has, times the root of the number of items."""
    from scipy.special import ndtri

    return (upper - lower) / -float(ndtri(question.alpha) + ndtri(question.fail_alpha)) * math.sqrt(question.n)


def _spearman_refusal(question: Question, has_few_changes: bool) -> str:
    if question.n < _BCA_ITEMS and not has_few_changes:
        return f"{question.n} items; {_BCA_ITEMS} needed for a rank correlation"
    return _too_few_groups(question)


def _no_order(question: Question) -> Warnings:
    """Warn when the source hardly orders the items: its correlation may be no more than twice the budget.

    Source: Fisher's z with the variance of Bonett & Wright 2000, Psychometrika 65:23-28.
    """
    rho = min(max(question.source.point, 1e-12 - 1), 1 - 1e-12)
    error = math.sqrt((1 + rho**2 / 2) / max(1, question.n - 3))
    if math.tanh(math.atanh(rho) - 1.645 * error) > 2 * question.limit:
        return ()
    return ((NEAR_CHANCE, f"the source hardly orders the items ({rho:.3f}): this gate protects nothing"),)


def _units_needed(deviation: float, margin: float, loss: float, alpha: float) -> int:
    """Count the units that tell a loss from the margin: ((z_alpha + z_beta) s / distance)^2.

    A loss at the margin itself would need infinitely many; the distance is taken as at least a twentieth of the margin.
    """
    from scipy.special import ndtri

    distance = max(abs(margin - loss), margin / 20)
    return math.ceil((float(ndtri(1 - alpha) + ndtri(_POWER)) * deviation / distance) ** 2)


def _effective_groups(question: Question) -> float:
    return clusters.effective_groups(question.by_group(np.ones(question.n)))


def _too_few_groups(question: Question) -> str:
    return _floor_words(_effective_groups(question), "groups") if question.is_grouped else ""


def _few_groups(question: Question) -> Warnings:
    return _advice(_effective_groups(question), "groups") if question.is_grouped else ()


def _floor_words(effective: float, unit: str) -> str:
    """Return why so few effective groups carry no verdict, or nothing."""
    if effective >= clusters.FEWEST_GROUPS:
        return ""
    return f"{math.floor(effective)} effective {unit}; {clusters.FEWEST_GROUPS} needed"


def _advice(effective: float, unit: str) -> Warnings:
    if not clusters.FEWEST_GROUPS <= effective < _ADVISED_GROUPS:
        return ()
    return ((FEW_GROUPS, f"{math.floor(effective)} effective {unit} ({_ADVISED_GROUPS} advised)"),)


def _skewed(residuals: Array, effective: float) -> Warnings:
    if abs(ratio.skewness(residuals)) <= 2 or effective >= _SKEWED_GROUPS:
        return ()
    return ((SKEWED, "a few documents carry the change: a nominal 5 % may be 7 to 12 %"),)


def _near_chance(question: Question, correct: NDArray[np.bool_]) -> Warnings:
    """Warn when the source is hardly better than always giving the most frequent label."""
    if question.chance is None:
        return ()
    lower, _ = rate.clopper_pearson(float(correct.sum()), question.n, 0.05, 0.05)
    if lower > question.chance + 2 * question.limit:
        return ()
    return ((NEAR_CHANCE, f"the source is hardly above chance ({question.chance:.3f}): this gate protects nothing"),)


def _cut_short(question: Question) -> Warnings:
    """Warn when more of the candidate's answers than of the source's were still going on at `max_tokens`."""
    before, after = (int(np.sum(side.values.get("truncated", 0))) for side in (question.source, question.candidate))
    if after <= before:
        return ()
    words = f"{after} answers were cut at max_tokens, {before} of the source's: cut ones count as wrong"
    return ((TRUNCATED, words),)


_COMPARE: Mapping[str, Callable[[Question], Evidence]] = {
    "perplexity": _compare_perplexity,
    "nats_per_byte": _compare_nats_per_byte,
    "accuracy": _compare_accuracy,
    "f1": _compare_f1,
    "spearman": _compare_spearman,
    "flips": _compare_flips,
    "kl": _compare_kl,
}
