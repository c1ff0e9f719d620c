"""What speed gates say of simulated machines, at a true ratio equal to their threshold and a little above it.

The simulated machine has two modes of speed that it stays in for a while (one is 25 % slower), drifts by 6 % over a
run, has 1 % of white noise and 3 % of outliers, and every process keeps a luck of its own from its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.speed import LAST_LOOK, Restart, SpeedLimit, decide
from optimizer.speed_restarts import PAIRS
from optimizer.statistics.signed_rank import largest_rank, signed_rank_tail, walsh_averages

METRIC = "decode_tokens_per_s"
POOLED_PAIRS = 64
ALPHA = 0.05
RATIOS = (1.0, 1.03, 1.05)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """What a machine does to the logarithm of a time.

    Attributes:
        start: standard deviation of what a process keeps from its start.
        mode: how much slower the slow mode is.
        stay: chance that the mode is the same at the next turn.
        drift: over a whole run.
        white: standard deviation of every turn's own.
        outliers: share of turns that take 20 to 100 % longer.
    """

    start: float
    mode: float = 0.25
    stay: float = 0.95
    drift: float = 0.06
    white: float = 0.01
    outliers: float = 0.03

    def turns(self, count: int, chance: np.random.Generator) -> Values:
        """Return the log times [count] of turns in a row, of a process without luck and a model that takes 1."""
        switches = chance.random(count) > self.stay
        slow = (np.cumsum(switches) + chance.integers(2)) % 2
        drift = self.drift * np.sin(2 * np.pi * (np.arange(count) / count + chance.random()))
        late = np.where(chance.random(count) < self.outliers, np.log1p(chance.uniform(0.2, 1.0, count)), 0.0)
        noise: Values = slow * math.log1p(self.mode) + drift + late + chance.normal(0, self.white, count)
        return noise


MACHINES: Mapping[str, Noise] = {
    "still: white noise only": Noise(0.0, mode=0.0, drift=0.0, outliers=0.0),
    "modes, drift, outliers": Noise(0.0),
    "the same, starts differ by 1.5 %": Noise(0.015),
    "the same, starts differ by 3 %": Noise(0.03),
}


def simulated_restarts(noise: Noise, ratio: float, chance: np.random.Generator) -> list[Restart]:
    """Return all restarts that a gate may ask for; the candidate's rate is `ratio` times the reference's."""
    times = noise.turns(LAST_LOOK * PAIRS * 2, chance).reshape(LAST_LOOK, PAIRS, 2)
    swapped = chance.random((LAST_LOOK, PAIRS)) < 0.5
    times[swapped] = times[swapped][:, ::-1]
    rates = np.exp(-(times + chance.normal(0, noise.start, (LAST_LOOK, 1, 2))))
    return [Restart({METRIC: pairs[:, 0].tolist()}, {METRIC: (ratio * pairs[:, 1]).tolist()}) for pairs in rates]


def of_restarts(noise: Noise, ratio: float, alpha: float, chance: np.random.Generator) -> tuple[str, int]:
    """Return what the gate says where at least the reference's rate is asked for, and after how many restarts."""
    restarts = simulated_restarts(noise, ratio, chance)
    limit = SpeedLimit(METRIC, 1.0, is_ratio=True)
    (verdict,) = decide([limit], restarts.__getitem__, alpha=alpha, fail_alpha=alpha)
    return verdict.outcome, verdict.restarts


def of_pooled_pairs(noise: Noise, ratio: float, alpha: float, chance: np.random.Generator) -> tuple[str, int]:
    """Return what 64 pairs of one pair of processes say, all taken as independent."""
    times = noise.turns(2 * POOLED_PAIRS, chance).reshape(POOLED_PAIRS, 2)
    swapped = chance.random(POOLED_PAIRS) < 0.5
    times[swapped] = times[swapped][:, ::-1]
    first, second = chance.normal(0, noise.start, 2)
    logs = times[:, 0] + first - times[:, 1] - second + math.log(ratio)
    averages, rank = np.sort(walsh_averages(logs)), pooled_rank(alpha)
    return _claim(float(averages[rank - 1]), float(averages[-rank])), 1


@cache
def pooled_rank(alpha: float) -> int:
    """Return which Walsh average of the pooled pairs is the bound."""
    return largest_rank(signed_rank_tail(POOLED_PAIRS), alpha)


def of_blocks(noise: Noise, ratio: float, alpha: float, chance: np.random.Generator) -> tuple[str, int]:
    """Return what the ratio of two medians says: 64 runs of one model, then 64 of the other, bootstrapped."""
    times = noise.turns(2 * POOLED_PAIRS, chance).reshape(2, POOLED_PAIRS)
    times += chance.normal(0, noise.start, (2, 1))
    drawn = np.take_along_axis(times[:, None], chance.integers(0, POOLED_PAIRS, (2, 400, POOLED_PAIRS)), axis=2)
    before, after = np.median(drawn, axis=2)
    lower, upper = np.quantile(before - after + math.log(ratio), [alpha, 1 - alpha])
    return _claim(float(lower), float(upper)), 1


def _claim(lower: float, upper: float) -> str:
    return "pass" if lower >= 0 else "fail" if upper < 0 else "inconclusive"


def of_one_side(noise: Noise, ratio: float, alpha: float, chance: np.random.Generator) -> tuple[str, int]:
    """Return what an absolute budget says at the true median of restarts that are late by an exponential time."""
    late = chance.exponential(5 * noise.white, LAST_LOOK) - 5 * noise.white * math.log(2)
    restarts = [Restart({}, {METRIC: [ratio * rate] * PAIRS}) for rate in np.exp(-late).tolist()]
    limit = SpeedLimit(METRIC, 1.0, is_ratio=False)
    (verdict,) = decide([limit], restarts.__getitem__, alpha=alpha, fail_alpha=alpha)
    return verdict.outcome, verdict.restarts


Gate = Callable[[Noise, float, float, np.random.Generator], tuple[str, int]]


@dataclass(frozen=True)
class Cell:
    """A gate on a machine."""

    machine: str
    gate: str
    decides: Gate
    alpha: float = ALPHA


def cells() -> Iterator[Cell]:
    """Yield what is simulated."""
    for machine in MACHINES:
        yield Cell(machine, "this gate", of_restarts)
        yield Cell(machine, "this gate at 1 %", of_restarts, 0.01)
        yield Cell(machine, "64 pairs of one start, pooled", of_pooled_pairs)
        yield Cell(machine, "medians of two blocks of 64", of_blocks)
    yield Cell(next(iter(MACHINES)), "this gate, absolute budget, restarts late by 5 %, skewed", of_one_side)


def simulate(cell: Cell, runs: int, seed: int) -> dict[str, Any]:
    """Return the share of each claim, and the mean number of restarts, at every true ratio."""
    found: dict[str, Any] = {"machine": cell.machine, "gate": cell.gate, "runs": runs}
    for ratio in RATIOS:
        chance = np.random.default_rng([seed, round(100 * ratio)])
        said = [cell.decides(MACHINES[cell.machine], ratio, cell.alpha, chance) for _ in range(runs)]
        shares = {claim: float(np.mean([outcome == claim for outcome, _ in said])) for claim in ("pass", "fail")}
        found[f"{ratio:.2f}"] = {**shares, "restarts": float(np.mean([restarts for _, restarts in said]))}
    return found


def rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return claims in per cent, with the standard error of the first."""
    lines = []
    for cell in found:
        at, three, five = (cell[f"{ratio:.2f}"] for ratio in RATIOS)
        error = math.sqrt(at["pass"] * (1 - at["pass"]) / cell["runs"])
        claims = [f"{100 * at['pass']:.1f} ± {100 * error:.1f}", f"{100 * at['fail']:.1f}"]
        powers = [f"{100 * three['pass']:.0f}", f"{100 * five['pass']:.0f}"]
        lines.append([f"{cell['machine']}: {cell['gate']}", *claims, *powers, f"{at['restarts']:.1f}"])
    return lines
