"""What values reach a layer, and which range of them its integers should cover.

Values are counted in bins whose width is a power of two, so that counts do not depend on the order in which texts
come, and nothing but the counts is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from passes._walk import walk_over
from passes.base import PassError

if TYPE_CHECKING:
    from passes._skeleton import Skeleton

ENOUGH_TEXTS = 32
"""Calibration texts below which a result says how few they were."""
BINS = 1 << 14
LEVELS = 255
"""Steps between the least and the greatest uint8."""
PERCENTILE = 99.99
"""Share of the values that `percentile` covers, in percent."""
_ENTROPY_BINS, _ENTROPY_LEVELS = 2048, 128  # as in TensorRT, which the method comes from
_POINTS = (np.arange(4) + 0.5) / 4  # of a bin, at which `mse` looks at the error
_SHARES = np.linspace(0.01, 1, 100)  # of the whole range, that `mse` tries

Calibrator = Literal["minmax", "entropy", "percentile", "mse"]


class Range(NamedTuple):
    """The values that integers cover."""

    low: float
    high: float

    def affine(self) -> tuple[float, int]:
        """Return scale and zero point of uint8 over this range and zero, which stays exact."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = (high - low) / LEVELS
        if not np.float32(scale) > 0:
            return 1.0, 0  # nothing but zero was seen
        return scale, round(-low / scale)


class Histogram:
    """Counts of values in BINS bins over [-limit, limit), the limit a power of two that grows as it must.

    Attributes:
        low, high: least and greatest value.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 2.0**-64
        self.low, self.high = math.inf, -math.inf

    def add(self, values: torch.Tensor) -> None:
        """Count values of any shape.

        Raises:
            ValueError: one is NaN or infinite.
        """
        low, high = (float(end) for end in values.aminmax())
        peak = max(-low, high)
        if not math.isfinite(peak):
            raise ValueError("a value is NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        while peak > self.limit:
            self._widen()
        places = (values.flatten() * (BINS / 2 / self.limit)).floor_().to(torch.int64) + BINS // 2
        self.counts += torch.bincount(places.clamp_(max=BINS - 1), minlength=BINS).numpy()

    def edges(self) -> NDArray[np.float64]:
        """Return the BINS + 1 bounds of the bins."""
        return np.linspace(-self.limit, self.limit, BINS + 1)

    def _widen(self) -> None:
        """Double the limit: two bins become one."""
        pairs = self.counts.reshape(-1, 2).sum(1)
        self.counts = np.pad(pairs, BINS // 4)
        self.limit *= 2


def observe(skeleton: Skeleton, layers: Sequence[str], sequences: Sequence[Sequence[int]]) -> dict[str, Histogram]:
    """Run the model over sequences of token ids; return layer name -> histogram of that layer's input.

    Raises:
        PassError: a value is not finite, or no value reached a layer.
    """
    seen = {name: Histogram() for name in layers}

    def count(name: str, x: torch.Tensor) -> None:
        try:
            seen[name].add(x)
        except ValueError as error:
            raise PassError(f"{name}: {error} in its input; this model cannot be calibrated") from None

    watch(skeleton, layers, sequences, count)
    for name, histogram in seen.items():
        if not histogram.counts.any():
            raise PassError(f"{name}: no value reached it while the model ran over the calibration texts; exclude it")
    return seen


def few_texts_note(texts: Sequence[Sequence[int]]) -> str:
    """Say that ranges were found on few texts; "" if there were ENOUGH_TEXTS."""
    if len(texts) >= ENOUGH_TEXTS:
        return ""
    counted = f"{len(texts)} calibration text{'' if len(texts) == 1 else 's'}"
    return f"ranges found on {counted}, and on so few they are narrow: give {ENOUGH_TEXTS} or more"


def watch(
    skeleton: Skeleton,
    layers: Sequence[str],
    sequences: Sequence[Sequence[int]],
    see: Callable[[str, torch.Tensor], None],
) -> None:
    """Run the model over sequences of token ids, and call `see(layer name, input)` whenever a layer is run.

    An expert that no token of a batch is sent to may be run on none: that is not shown.
    """

    def enter(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0]) if inputs[0].numel() else None

    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(skeleton.module.get_submodule(name).register_forward_pre_hook(enter(name)))
        walk_over(skeleton, sequences)


def minmax(seen: Histogram) -> Range:
    """Return the whole range."""
    return Range(seen.low, seen.high)


def percentile(seen: Histogram) -> Range:
    """Return the range that PERCENTILE of the values lie in, half of the rest on either side."""
    tail = (1 - PERCENTILE / 100) / 2
    below = np.concatenate([[0.0], np.cumsum(seen.counts) / seen.counts.sum()])
    edges = seen.edges()
    low, high = edges[np.searchsorted(below, tail, "right") - 1], edges[np.searchsorted(below, 1 - tail)]
    return Range(max(float(low), seen.low), min(float(high), seen.high))


def mse(seen: Histogram) -> Range:
    """Return the range of least squared error, rounding and clipping (Choukroun et al. 2019, arXiv:1902.06822).

    First the upper end is moved, then the lower one.
    """
    best = Range(min(seen.low, 0.0), max(seen.high, 0.0))
    for end in ("high", "low"):
        tried = [best._replace(**{end: float(getattr(best, end) * share)}) for share in _SHARES[::-1]]
        best = min(tried, key=lambda covered: squared_error(seen, covered))
    return best


def squared_error(seen: Histogram, covered: Range) -> float:
    """Return the mean squared error of uint8 over a range, the values of a bin spread evenly over it."""
    scale, zero = covered.affine()
    used = np.flatnonzero(seen.counts)
    points = (used[:, None] + _POINTS - BINS // 2) * (2 * seen.limit / BINS)
    error = (np.clip(np.round(points / scale) + zero, 0, LEVELS) - zero) * scale - points
    return float(((error**2).mean(1) * seen.counts[used]).sum() / seen.counts.sum())


def entropy(seen: Histogram) -> Range:
    """Return the range that loses least information (Migacz, GTC 2017, S7310), as onnxruntime finds it."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector("entropy", False, _ENTROPY_BINS, _ENTROPY_LEVELS, PERCENTILE, "same")
    step = BINS // _ENTROPY_BINS
    counts, edges = seen.counts.reshape(-1, step).sum(1), seen.edges()[::step]
    ends = (np.float64(seen.low), np.float64(seen.high))
    low, high = collector.get_entropy_threshold((counts, edges, *ends), _ENTROPY_LEVELS)[:2]
    return Range(float(low), float(high))


CALIBRATORS: Mapping[Calibrator, Callable[[Histogram], Range]] = {
    "minmax": minmax,
    "entropy": entropy,
    "percentile": percentile,
    "mse": mse,
}
