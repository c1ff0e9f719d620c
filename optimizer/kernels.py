"""Find out whether a pass makes layers that this processor multiplies slower than float32 ones.

Of each way in which a pass quantizes linear layers, one layer runs alone, by turns with its float32 form, at two
numbers of rows: as many as a decoder has in a step and in a prompt, or an encoder in a text and in a batch. Tables
that are looked up are left out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.costs import host
from optimizer.fingerprint import fingerprint, source_fingerprint
from optimizer.lock import versions
from optimizer.maker import Maker
from passes._kind import kind_of
from passes.base import TORCH, Estimate, Model
from runtime.session import open_graph

if TYPE_CHECKING:
    from passes._layers import Linear
    from passes._quantized import LayerSpec

LIMIT = 1.1
"""Times the seconds of float32 from which on a layer is told."""
AGREEING = 0.8
"""Share of the rounds that must be over the limit: what else the machine does is no reason to warn."""
ROUNDS = 15
"""At least."""
MOST_ROUNDS = 100
SECONDS = 0.3
"""That rounds go on for, at each number of rows."""
CACHE_BYTES = 64 << 20
"""More than a processor keeps of what a model has read since a layer ran last."""
DECODER_ROWS, ENCODER_ROWS = (1, 128), (16, 512)
_WEIGHTS = 1 << 21
"""Of a layer; a larger one loses output features, so that no round is long. What a call costs besides weighs more then:
ratios come nearer to 1, none changes sides."""
_FEWEST_OUTPUTS = 64

Ratios = list[float]
"""Seconds of a quantized layer over those of its float32 form, round by round."""


def slow_layers(before: Model, told: Estimate, maker: Maker) -> tuple[str, ...]:
    """Return a warning for each kind of layer that a pass would make slower; the store remembers what was measured."""
    if told.model.stage != TORCH:
        return ()
    from passes import _layers

    linears = [trimmed(each) for each in _layers.quantized_linears(before, told.model)]
    if not linears:
        return ()
    rows = DECODER_ROWS if kind_of(before.config) == "decoder" else ENCODER_ROWS
    others = min(4 * told.parameters, CACHE_BYTES)
    code = source_fingerprint(Path(_layers.__file__))
    found = maker.store.get_or_build(
        fingerprint(["kernels", linears, rows, others, maker.threads, host(), versions(), code]),
        lambda _: {"ratios": measured(linears, rows, others, maker.threads)},
    ).meta["ratios"]
    warnings = (
        warning(each.spec, dict(zip(rows, ratios, strict=True)))
        for each, ratios in zip(linears, found, strict=True)
        if each.spec is not None
    )
    return tuple(filter(None, warnings))


def trimmed(linear: Linear) -> Linear:
    """Return a layer with no more output features than measuring it takes."""
    most = max(_FEWEST_OUTPUTS, _WEIGHTS // linear.inputs)
    return replace(linear, outputs=min(linear.outputs, most))


# ---- measuring


def measured(linears: Sequence[Linear], rows: Sequence[int], other_bytes: int, threads: int) -> list[list[Ratios]]:
    """Return, for each layer and each number of rows, how it compares with its float32 form.

    Args:
        linears: quantized layers.
        rows: of the inputs.
        other_bytes: what is read between two runs, as a model reads its other layers.
        threads: threads of a layer.
    """
    from passes._layers import write_linears

    plain = [replace(linear, spec=None) for linear in linears]
    others = np.ones(other_bytes // 4, np.float32)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="optimize-kernels-") as folder:
        graphs = write_linears([*linears, *plain], Path(folder))
        sessions = [open_graph(graph / "model.onnx", threads) for graph in graphs]
        pairs = zip(linears, sessions[: len(linears)], sessions[len(linears) :], strict=True)
        return [
            [
                by_turns(_call(candidate, x), _call(reference, x), others.sum)
                for x in (rng.standard_normal((1, count, linear.inputs), np.float32) for count in rows)
            ]
            for linear, candidate, reference in pairs
        ]


def by_turns(
    candidate: Callable[[], Any],
    reference: Callable[[], Any],
    between: Callable[[], Any],
    clock: Callable[[], float] = time.perf_counter,
) -> Ratios:
    """Return the seconds of one call over those of another, in rounds of one each, the first of a round taking turns.

    Args:
        candidate: what is divided.
        reference: by what.
        between: called before each of them, untimed.
        clock: returns seconds.
    """

    def seconds(call: Callable[[], Any]) -> float:
        between()
        start = clock()
        call()
        return clock() - start

    candidate()
    reference()  # a first call prepares what later ones use
    ratios: Ratios = []
    end = clock() + SECONDS
    while len(ratios) < ROUNDS or (clock() < end and len(ratios) < MOST_ROUNDS):
        order = (candidate, reference) if len(ratios) % 2 else (reference, candidate)
        took = {call: seconds(call) for call in order}
        ratios.append(took[candidate] / took[reference])
    return ratios


def _call(session: Any, x: Any) -> Callable[[], Any]:
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)


# ---- what it means


def is_slower(ratios: Sequence[float]) -> bool:
    """Say whether a layer takes longer than the limit in almost every round."""
    return sum(ratio > LIMIT for ratio in ratios) >= AGREEING * len(ratios)


def warning(spec: LayerSpec, ratios: Mapping[int, Sequence[float]]) -> str:
    """Return what a user should know of a kind of layer, from number of rows -> ratios; empty where it is no slower."""
    slow = [
        f"{_times(median(each))} at {rows:,} {'row' if rows == 1 else 'rows'}"
        for rows, each in ratios.items()
        if is_slower(each)
    ]
    return f"{spec_text(spec)}: slower than float32 on this processor, {' and '.join(slow)}" if slow else ""


def spec_text(spec: LayerSpec) -> str:
    """Return a spec in words: `int4 groups of 32, activations int8`."""
    group = getattr(spec.format, "group_size", "channel")
    shared = "per channel" if group == "channel" else f"groups of {group}"
    zeros = "" if getattr(spec.format, "symmetric", True) else " with zero points"
    return f"{spec.format.name} {shared}{zeros}, activations {spec.activations}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"
