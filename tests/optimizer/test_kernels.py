"""What a plan says of layers that this processor multiplies slowly."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
from made_up import Harm, Ladder, Lower

from optimizer.kernels import ROUNDS, by_turns, is_slower, spec_text, trimmed, warning
from optimizer.pipeline import planned
from optimizer.plan_report import plan_lines
from optimizer.recipe import Fallback
from passes._formats import ChannelFormat, IntegerFormat
from passes._layers import Linear
from passes._quantized import LayerSpec, write_specs
from passes.base import TORCH, Context, Estimate, Model, Pass, Stage

SLOW = LayerSpec(IntegerFormat(2, 32), "float")
"""Unpacked number by number: measured at 10 times float32 and more, and it should not be 1.1 times on any processor."""


@dataclass(frozen=True, kw_only=True)
class Rounded(Pass):
    """Says that it quantizes the first layer's wide product and the embedding."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = TORCH
    activations: Literal["float", "int8"] = "float"

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        layers = ("bert.encoder.layer.0.intermediate.dense", "bert.embeddings.word_embeddings")
        write_specs(ctx.workdir, dict.fromkeys(layers, SLOW))
        config = {**model.config, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
        return Estimate(1, 10**6, 10**6, 1, replace(model, folder=ctx.workdir, config=config))


class Clock:
    """Stands still but for the calls that take its seconds."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.calls += name

        return call

    def __call__(self) -> float:
        return self.now


def test_a_plan_warns_of_layers_that_are_slow_here_and_measures_them_once(ladder: Ladder) -> None:
    def plan(*passes: Pass) -> Any:
        recipe = replace(ladder.recipe(Harm()), passes=passes, fallbacks=(Fallback(),) * len(passes))
        return planned(recipe, store=ladder.folder / "store")

    made = plan(Rounded(), Lower())
    (told,) = made.warnings
    assert told.startswith("passes.0.rounded: int2 groups of 32, activations float: slower than float32 on this proc")
    assert f"warning: {told}" in list(plan_lines(made))
    assert plan(Rounded(), Lower(), Harm()).warnings == (told,)
    entries = (json.loads(path.read_text())["meta"] for path in (ladder.folder / "store").glob("entries/*/entry.json"))
    assert len([meta for meta in entries if "ratios" in meta]) == 1


def test_calls_take_turns_and_what_lies_between_is_not_timed() -> None:
    clock = Clock()
    ratios = by_turns(clock.call("c", 3.0), clock.call("r", 2.0), clock.call(".", 50.0), clock)
    assert ratios == [1.5] * ROUNDS
    assert clock.calls.startswith("cr" + ".r.c.c.r" * 2)


def test_short_calls_get_more_rounds() -> None:
    clock = Clock()
    assert len(by_turns(clock.call("c", 0.005), clock.call("r", 0.005), clock.call(".", 0), clock)) == 30


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([1.2] * 15, True),
        ([1.2] * 12 + [0.3] * 3, True),
        ([9.0] * 11 + [1.0] * 4, False),  # others were busy in most rounds
        ([1.09] * 15, False),
        ([0.5] * 14 + [90.0], False),
    ],
)
def test_a_layer_is_slower_only_where_almost_every_round_says_so(ratios: list[float], slower: bool) -> None:
    assert is_slower(ratios) is slower


def test_a_warning_says_how_many_times_and_at_which_sizes() -> None:
    times = {1: [210.4] * 15, 128: [1.32] * 15}
    words = "int2 groups of 32, activations float: slower than float32 on this processor, "
    assert warning(SLOW, times) == words + "210 times at 1 row and 1.3 times at 128 rows"
    assert warning(SLOW, times | {1: [1.0] * 15}) == words + "1.3 times at 128 rows"
    assert warning(SLOW, {1: [0.5] * 15}) == ""


def test_specs_are_told_in_words() -> None:
    assert spec_text(LayerSpec(ChannelFormat(), "row")) == "int8 per channel, activations row"
    zeros = LayerSpec(IntegerFormat(4, "channel", symmetric=False), "int8")
    assert spec_text(zeros) == "int4 per channel with zero points, activations int8"


def test_a_large_layer_is_measured_with_fewer_outputs() -> None:
    assert trimmed(Linear(32_000, 4096, SLOW)) == Linear(512, 4096, SLOW)
    assert trimmed(Linear(10**6, 10**6, SLOW)).outputs == 64
    assert trimmed(Linear(32, 64, SLOW)) == Linear(32, 64, SLOW)
