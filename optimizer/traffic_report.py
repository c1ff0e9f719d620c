"""What a person sees of a load: a table, and a drawing of how its latencies are distributed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from optimizer.drawing import page
from runtime.traffic.bench import Bench
from runtime.traffic.measure import Load
from runtime.traffic.metrics import Cost, Quantiles

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 280, 160, 60, 50, 70  # of a panel of the drawing and around it, in pixels
_MARKS = (50, 90, 99)
_LINE = 14  # pixels of a line of text


def lines(done: Bench) -> Iterator[str]:
    """Yield what was measured, by what load, and every number with its unit."""
    summary = done.summary
    yield title(done)
    if not done.is_complete:
        yield "interrupted: these are the requests that had ended"
    yield f"{summary.requests} requests in {summary.duration_s:.2f} s, {_flaws(done)}"
    yield ""
    yield f"{'ms':<8}{''.join(f'{name:>10}' for name in ('p50', 'p90', 'p99', 'mean', 'max'))}"
    for name, found in latencies(done):
        values = (found.p50, found.p90, found.p99, found.mean, found.most)
        yield f"{name:<8}{''.join(f'{value:>10.{_decimals(value)}f}' for value in values)}"
    yield ""
    yield from _rates(done)


def svg(done: Bench) -> str:
    """Return a drawing: for each latency a panel with its quantiles, p50, p90 and p99 marked."""
    panels = [(name, values) for name, values in _values(done) if values]
    parts = [part for place, panel in enumerate(panels) for part in _panel(place, *panel)]
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    width = max(_LEFT + columns * (_WIDTH + _GAP), 7 * len(title(done)))
    return page(width, _TOP + rows * (_HEIGHT + _GAP), title(done), parts)


def title(done: Bench) -> str:
    """Say what was asked, and how."""
    settings = done.settings
    asked = f"{len(settings.prompts)} prompts of a file" if settings.prompts else f"{settings.input_tokens} tokens in"
    if done.is_generating:
        asked += f", {settings.output_tokens} out"
    return f"{done.target} ({done.kind}): {_described(settings.load)}; {asked}; seed {settings.seed}"


def latencies(done: Bench) -> Iterator[tuple[str, Quantiles]]:
    """Yield name and quantiles, in milliseconds; an encoder has one latency."""
    summary = done.summary
    named = (
        ("TTFT", summary.ttft_ms if done.is_generating else None),
        ("TPOT", summary.tpot_ms),
        ("ITL", summary.itl_ms),
        ("E2E" if done.is_generating else "latency", summary.e2e_ms),
    )
    yield from ((name, found) for name, found in named if found is not None)


def _described(load: Load) -> str:
    loop = f"{load.concurrency} clients" if load.concurrency else f"{load.rate:g} arrivals/s (Poisson)"
    return f"{loop}, {load.warm_up} to warm up"


def _flaws(done: Bench) -> str:
    summary = done.summary
    first = next((record.error for record in done.requests if record.error), None)
    parts = [f"{summary.errors} failed" + (f" (the first: {first})" if first else "")]
    if done.is_generating:
        parts.append(f"{summary.short} answers shorter than asked")
    if not done.is_counted:
        parts.append("tokens counted by pieces: the server sent no usage")
    return ", ".join(parts)


def _rates(done: Bench) -> Iterator[str]:
    summary, limits = done.summary, done.settings.limits
    if done.is_generating:
        yield f"output    {summary.output_tokens_per_s:.1f} tokens/s"
    if summary.total_tokens_per_s is not None:
        yield f"total     {summary.total_tokens_per_s:.1f} tokens/s, prompts included"
    unit = "requests" if done.is_generating else "texts   "
    yield f"{unit}  {summary.requests_per_s:.2f} /s"
    if limits and summary.goodput_per_s is not None:
        kept = ", ".join(f"{name} <= {value:g}" for name, value in limits.items())
        share = summary.goodput_per_s * summary.duration_s / summary.requests if summary.requests else 0.0
        yield f"goodput   {summary.goodput_per_s:.2f} /s ({100 * share:.1f} % of requests) within {kept}"
    busy = "unknown: the target does not tell" if summary.busy_s is None else f"{summary.busy_s:.2f} s"
    yield f"busy      {busy}"
    if summary.reserved is not None:
        yield f"cost      {_dollars(summary.reserved)}, by reserved time"
        yield f"          {_dollars(summary.busy) if summary.busy else 'unknown'}, by busy time"
    if summary.read_bytes_per_s is not None and done.memory_bytes_per_s:
        read, limit = summary.read_bytes_per_s / 1e9, done.memory_bytes_per_s / 1e9
        reached = f"{100 * read / limit:.0f} % of the {limit:.1f} that a plain read reaches"
        yield f"memory    {read:.1f} GB/s in decode steps, {reached}"


def _dollars(cost: Cost) -> str:
    parts = [
        f"${value:.4g} {kind}" for kind, value in (("input", cost.input), ("output", cost.output)) if value is not None
    ]
    return f"{', '.join(parts) or 'none'} per million tokens"


def _values(done: Bench) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each latency and its values in milliseconds, sorted."""
    spoken = [record for record in done.requests if record.arrivals_s and record.error is None]
    found = {
        "TTFT": [record.ttft_s for record in spoken],
        "TPOT": [record.tpot_s for record in spoken if record.tpot_s is not None],
        "ITL": [gap for record in spoken for gap in record.itl_s],
    }
    ends = [record.e2e_s for record in spoken]
    for name, _ in latencies(done):
        yield name, sorted(1e3 * value for value in found.get(name, ends))


def _panel(place: int, name: str, values: Sequence[float]) -> Iterator[str]:
    left = _LEFT + place % 2 * (_WIDTH + _GAP)
    top = _TOP + place // 2 * (_HEIGHT + _GAP)
    most = values[-1] or 1.0
    yield f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>'
    yield f'<text x="{left}" y="{top - 6}">{escape(f"{name}, ms, by percent of values (n = {len(values)})")}</text>'
    yield f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{most:.{_decimals(most)}f}</text>'
    yield f'<text x="{left - 6}" y="{top + _HEIGHT}" text-anchor="end">0</text>'
    points = (
        f"{left + _WIDTH * percent / 100:.1f},{top + _HEIGHT * (1 - _quantile(values, percent) / most):.1f}"
        for percent in range(101)
    )
    yield f'<polyline points="{" ".join(points)}" fill="none" stroke="#3b6ea5" stroke-width="2"/>'
    last = -math.inf
    for mark in reversed(_MARKS):
        x, value = left + _WIDTH * mark / 100, _quantile(values, mark)
        y = top + _HEIGHT * (1 - value / most)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#3b6ea5"/>'
        label = f"p{mark} {value:.{_decimals(value)}f}"
        last = _line_of_label(y, top, last)
        yield f'<text x="{x - 5:.1f}" y="{last:.1f}" text-anchor="end">{label}</text>'


def _line_of_label(y: float, top: float, last: float) -> float:
    """Return where the label of a point at y is written: above it, or below where the frame or the last label is."""
    above = y - 5
    return above if above >= max(top, last) + _LINE else max(y, last) + _LINE


def _quantile(values: Sequence[float], percent: float) -> float:
    """Return the value at so many percent of sorted ones, between two in proportion, as `numpy.percentile` does."""
    at = percent / 100 * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def _decimals(value: float) -> int:
    return 0 if value >= 1000 else 1 if value >= 10 else 2
