"""Looking several times: how much of the level each look may spend, and when looking on is hopeless.

The levels of all looks add up to at most alpha, so by the union bound the error of all of them together is at most
alpha whatever their dependence, groups, dropped items or estimated variances. The exact levels of a multivariate normal
would gain 1.5 points of power and would have to be believed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INFLATION = 1.09
"""How many times the items of a single look a run with several looks may take for the same power."""

_LEAST_CHANCE = 0.05


def looks(most: int) -> tuple[int, ...]:
    """Return after how many items to look: an eighth, a quarter, a half and all of `most`, each once."""
    return tuple(sorted({most // parts for parts in (8, 4, 2, 1)} - {0}))


@dataclass(frozen=True)
class Spending:
    """A look at some of `most` items; what the looks up to `previous` items have spent is gone.

    Raises:
        ValueError: `previous` is not from 0 to below `most`.
    """

    most: int
    previous: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.previous < self.most:
            raise ValueError(f"gate: got a look after {self.previous} of {self.most} items, expected 0 to below all")

    def level(self, alpha: float, n: int) -> float:
        """Return the level of a look at `n` items: alpha ((n / most)^2 - (previous / most)^2).

        Source: Kim & DeMets 1987, Biometrika 74:149-154. We differ: a look's level is what it adds.

        Raises:
            ValueError: `n` is not above `previous` and at most `most`.
        """
        if not self.previous < n <= self.most:
            raise ValueError(
                f"gate: got a look at {n} items, expected more than {self.previous} and at most {self.most}"
            )
        return alpha * ((n**2 - self.previous**2) / self.most**2)

    def is_hopeless(self, loss: float, error: float, margin: float, n: int, levels: tuple[float, float]) -> bool:
        """Tell that looking on is not worth the items: it can only end a run undecided, never decide anything.

        True where the rest would not show a loss within `margin` even if it lost nothing at all, and would show one
        beyond it with a chance below 5 % if it went on like `loss`. Normal approximation; where it errs, items are
        wasted or saved, and no claim is made.

        Args:
            loss: seen in `n` items.
            error: its standard error.
            margin: the loss allowed.
            n: items looked at.
            levels: of the pass and the fail claim over all looks.

        Source: Lan, Simon & Halperin 1982, Communications in Statistics C 1:207-219 (stochastic curtailment).
        """
        from scipy.special import ndtr, ndtri

        seen = n / self.most
        if seen == 1:
            return False
        pass_width, fail_width = (-float(ndtri(level * (1 - seen**2))) for level in levels)
        can_pass = loss * seen + pass_width * error * seen <= margin
        final = error * math.sqrt(seen)
        distance = loss - margin - fail_width * final
        spread = final * math.sqrt(1 - seen)
        can_fail = distance > 0 if spread == 0 else float(ndtr(distance / spread)) >= _LEAST_CHANCE
        return not (can_pass or can_fail)
