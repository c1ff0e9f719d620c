"""How much of what a gate judges a pass changes: measured by earlier runs on this machine, else by the project's own.

The store keeps `measured/spreads.jsonl`, a line for every gate that was asked. Nothing is judged by it: it says how
many items a gate will need, before there is an answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from optimizer import journal
from optimizer.evaluate.items import Item
from optimizer.evaluate.parts import count_units
from optimizer.exams import MEANS
from optimizer.fingerprint import fingerprint
from optimizer.gate import Budget
from optimizer.maker import options_of
from optimizer.recipe import changes_weights
from optimizer.record import Judged
from passes.base import Pass

NAME = "measured/spreads.jsonl"


@dataclass(frozen=True)
class Spread:
    """What a gate found.

    Attributes:
        source: names the untouched model.
        chain: names the passes that changed weights, and their options.
        evaluation: its name, and that of the score.
        metric: as in `gate.Scores`.
        spread: as in `gate.Verdict`.
        units: independent units the items were worth, as a share of what `natural_units` counts.
        items: that were asked.
        loss: that was seen.
        score: the source's own.
        day: when, YYYY-MM-DD.
    """

    source: str
    chain: str
    evaluation: str
    metric: str
    spread: float
    units: float
    items: int
    loss: float
    score: float
    day: str


@dataclass(frozen=True)
class Expected:
    """What to forecast with.

    Attributes:
        spread, units, loss, score: as in `Spread`.
        basis: where they come from, in words.
    """

    spread: float
    units: float
    loss: float
    score: float
    basis: str


_MODELS = {"classifier": "MiniLM on BANKING77", "embedder": "MiniLM", "decoder": "a Llama of 6 million parameters"}
_SCORE = 0.9
"""Of a source that was never scored: only a budget relative to its score asks for it."""
SHIPPED: Mapping[tuple[str, str, str], tuple[float, float]] = {
    ("classifier", "accuracy", "float"): (0, 0),
    ("classifier", "f1", "float"): (0, 0),
    ("classifier", "flips", "float"): (0, 0),
    ("classifier", "kl", "float"): (6.7e-13, 1.9e-13),
    ("classifier", "accuracy", "int8 row"): (0.0019, 0),
    ("classifier", "f1", "int8 row"): (0.0023, 0),
    ("classifier", "flips", "int8 row"): (0.0023, 0.0023),
    ("classifier", "kl", "int8 row"): (0.0016, 0.0004),
    ("classifier", "accuracy", "int8"): (0.00032, 0.00032),
    ("classifier", "f1", "int8"): (0.00065, 0.00032),
    ("classifier", "flips", "int8"): (0.00065, 0.00065),
    ("classifier", "kl", "int8"): (0.00023, 5.9e-05),
    ("classifier", "accuracy", "int4 g32"): (0.0084, 0.0026),
    ("classifier", "f1", "int4 g32"): (0.013, 0.0026),
    ("classifier", "flips", "int4 g32"): (0.013, 0.013),
    ("classifier", "kl", "int4 g32"): (0.017, 0.0048),
    ("classifier", "accuracy", "int4"): (0.01, 0.0032),
    ("classifier", "f1", "int4"): (0.015, 0.0032),
    ("classifier", "flips", "int4"): (0.015, 0.015),
    ("classifier", "kl", "int4"): (0.034, 0.0082),
    ("classifier", "accuracy", "int4 channel"): (0.01, 0.0026),
    ("classifier", "f1", "int4 channel"): (0.016, 0.0027),
    ("classifier", "flips", "int4 channel"): (0.016, 0.016),
    ("classifier", "kl", "int4 channel"): (0.042, 0.011),
    ("classifier", "accuracy", "int2"): (0.056, 0.029),
    ("classifier", "f1", "int2"): (0.069, 0.029),
    ("classifier", "flips", "int2"): (0.069, 0.069),
    ("classifier", "kl", "int2"): (0.3, 0.22),
    ("embedder", "spearman", "int8 row"): (0.0038, 0.0015),
    ("embedder", "spearman", "int8"): (0.00032, 0.0002),
    ("embedder", "spearman", "int4 g32"): (0.032, 0.013),
    ("embedder", "spearman", "int4"): (0.045, 0.019),
    ("embedder", "spearman", "int4 channel"): (0.065, 0.029),
    ("embedder", "spearman", "int2"): (0.36, 0.18),
    ("decoder", "perplexity", "float"): (9.3e-08, 2.7e-09),
    ("decoder", "flips", "float"): (0, 0),
    ("decoder", "kl", "float"): (2e-13, 1.6e-12),
    ("decoder", "perplexity", "int8 row"): (0.0019, 0.00073),
    ("decoder", "flips", "int8 row"): (0.013, 0.013),
    ("decoder", "kl", "int8 row"): (0.00012, 0.00056),
    ("decoder", "perplexity", "int8"): (0.00094, 0),
    ("decoder", "flips", "int8"): (0.006, 0.006),
    ("decoder", "kl", "int8"): (2.2e-05, 0.00011),
    ("decoder", "perplexity", "int4 g32"): (0.0081, 0.0066),
    ("decoder", "flips", "int4 g32"): (0.044, 0.044),
    ("decoder", "kl", "int4 g32"): (0.0014, 0.0063),
    ("decoder", "perplexity", "int4"): (0.0099, 0.0096),
    ("decoder", "flips", "int4"): (0.053, 0.053),
    ("decoder", "kl", "int4"): (0.0022, 0.0095),
    ("decoder", "perplexity", "int4 channel"): (0.011, 0.013),
    ("decoder", "flips", "int4 channel"): (0.06, 0.06),
    ("decoder", "kl", "int4 channel"): (0.0028, 0.012),
    ("decoder", "perplexity", "int2"): (0.053, 0.18),
    ("decoder", "flips", "int2"): (0.2, 0.2),
    ("decoder", "kl", "int2"): (0.024, 0.15),
}
"""(kind of model, metric, form) -> spread and loss, by benchmarks/spreads.py, 2026-11-25."""


def chain_of(passes: Iterable[Pass]) -> str:
    """Return what names the passes that change weights: those that lower and fuse change no answer."""
    return fingerprint([[each.name(), options_of(each)] for each in passes if changes_weights(type(each))])


def form_of(passes: Iterable[Pass]) -> str:
    """Return the format of the weights in a word or two: that of the last pass that has one."""
    found = "float"
    for each in passes:
        if each.name() == "quantize_int8":
            found = "int8 row"
        elif hasattr(each, "format"):
            group = getattr(each, "group_size", "")
            found = f"{each.format} {'g' * isinstance(group, int)}{group}".strip()
    return found


def natural_units(metric: str, items: Sequence[Item], kind: str) -> float:
    """Count what carries information, were all of it independent: items, a decoder's positions, or documents.

    Documents of different lengths count as fewer (Kish 1965, Survey Sampling): (sum L)^2 / sum L^2.
    """
    positions = [len(item.ids) - item.first if kind == "decoder" else 1 for item in items]
    if metric == "flips":
        return float(sum(positions))
    if metric not in MEANS:
        return float(count_units(items))
    lengths: dict[str, int] = {}
    for item, count in zip(items, positions, strict=True):
        lengths[item.group] = lengths.get(item.group, 0) + count
    return sum(lengths.values()) ** 2 / max(1, sum(length**2 for length in lengths.values()))


def note(root: Path, source: str, passes: Iterable[Pass], judged: Judged, items: Sequence[Item], kind: str) -> None:
    """Remember in the store at `root` what a gate found."""
    verdict = judged.verdict
    if not (isfinite(verdict.spread) and verdict.n_effective > 0):
        return
    found = Spread(
        source,
        chain_of(passes),
        f"{judged.evaluation}/{judged.judges}",
        verdict.metric,
        verdict.spread,
        verdict.n_effective / natural_units(verdict.metric, items, kind),
        len(items),
        verdict.difference,
        verdict.source,
        time.strftime("%Y-%m-%d"),
    )
    journal.append(root / NAME, asdict(found))


def noted(root: Path) -> list[Spread]:
    """Return what was found on this machine; of gates that asked the same, the last."""
    found: dict[tuple[Any, ...], Spread] = {}
    for record in journal.read(root / NAME):
        with suppress(TypeError):
            each = Spread(**record)
            found[each.source, each.chain, each.evaluation, each.items] = each
    return list(found.values())


def expected(
    known: Sequence[Spread], source: str, passes: Sequence[Pass], evaluation: str, budget: Budget, kind: str
) -> Expected | None:
    """Return what to forecast a gate with; None where nothing like it was ever measured.

    Args:
        known: what was found on this machine.
        source: names the untouched model.
        passes: the whole chain.
        evaluation: as in `Spread`.
        budget: of the gate.
        kind: of model.
    """
    chain = chain_of(passes)
    alike = [each for each in known if (each.chain, each.metric) == (chain, budget.metric)]
    own = [each for each in alike if (each.source, each.evaluation) == (source, evaluation)]
    for some, basis in ((own, "this model with these passes"), (alike, "other models with these passes")):
        if some:
            weight = sum(each.items for each in some)
            mean = {
                name: sum(getattr(each, name) * each.items for each in some) / weight
                for name in ("spread", "units", "loss", "score")
            }
            times = f"{len(some)} earlier gates" if len(some) > 1 else "an earlier gate"
            return Expected(**mean, basis=f"{times} of {basis}")
    form = form_of(passes)
    for name in (form, form.partition(" ")[0]):
        if (shipped := SHIPPED.get((kind, budget.metric, name))) is not None:
            spread, loss = shipped
            return Expected(spread, 1.0, loss, _SCORE, f"{name} in {_MODELS[kind]}")
    return None
