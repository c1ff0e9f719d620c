# ruff: noqa: F401, F811 (a fixture is imported, then taken as an argument)
"""The reference artifact, and what speed gates do to a chain; the processes that answer are made up."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from test_pipeline import CALLS, Bench, Lower, Polish, bench
from test_speed_restarts import Machine

from optimizer.errors import ExitCode
from optimizer.pipeline import _begin
from optimizer.recipe import Fallback, Gate, Recipe, Target
from optimizer.record import Run
from optimizer.report import Reporter
from optimizer.speed import LatencyBudget, RateBudget
from optimizer.store import Store
from passes.base import ONNX, TORCH, Context, Model, Pass, PassError, PassResult, Stage
from runtime.bench import Workload


@dataclass(frozen=True, kw_only=True)
class Shrink(Pass):
    """Copy the weights, and leave a trace in the configuration."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = TORCH

    def run(self, model: Model, ctx: Context) -> PassResult:
        CALLS.append("shrink")
        shutil.copyfile(model.folder / "model.safetensors", ctx.workdir / "model.safetensors")
        return PassResult(Model(TORCH, ctx.workdir, model.assets, {**model.config, "shrunk": True}), {})


@dataclass(frozen=True, kw_only=True)
class PolishShrunk(Polish):
    """Takes only what was shrunk."""

    reads: ClassVar[Stage] = ONNX
    writes: ClassVar[Stage] = ONNX

    def requires(self, model: Model) -> None:
        if "shrunk" not in model.config:
            raise PassError("polish_shrunk: matched 0 of 2 blocks")


def recipe_of(bench: Bench, *passes: Pass, **more: Any) -> Recipe:
    return Recipe(
        name="r",  # type: ignore[arg-type]
        model="source",
        target=Target(threads=1),
        passes=passes,
        model_folder=bench.folder / "source",
        **more,
    )


def reference_of(bench: Bench, *passes: Pass) -> Model:
    CALLS.clear()
    with Store(bench.folder / "store") as store:
        _, chain = _begin(recipe_of(bench, *passes), store, Reporter("plain"))
        found = chain.stopwatch.reference()
        assert len(chain.path) == 1
    return found


def climbed(bench: Bench, recipe: Recipe, machine: Machine) -> Run:
    CALLS.clear()
    with Store(bench.folder / "store") as store:
        _, chain = _begin(recipe, store, Reporter("quiet"))
        chain.stopwatch.start = machine.start
        return chain.climb(None, must_end=False)


def machine_with(*seconds: float) -> Machine:
    """Return a machine that takes so long for the first graph it is given, for the second, ..."""
    seen: list[Path] = []

    def answer_s(graph: Path) -> float:
        if graph not in seen:
            seen.append(graph)
        return seconds[seen.index(graph)]

    return Machine(answer_s)


def gate_of(**budgets: Any) -> Gate:
    return Gate(**budgets, workload=Workload(input_tokens=8, new_tokens=2))


def test_reference_is_the_chain_without_what_changes_the_weights_and_is_made_once(bench: Bench) -> None:
    found = reference_of(bench, Shrink(), Lower(), Polish())
    assert CALLS == ["lower", "polish 1"]
    assert (found.stage, "shrunk" in found.config) == (ONNX, False)
    assert reference_of(bench, Shrink(), Lower(), Polish()) == found
    assert CALLS == []


def test_pass_that_refuses_the_reference_is_left_out_and_told(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference_of(bench, Shrink(), Lower(), PolishShrunk(), Polish(strength=2))
    assert CALLS == ["lower", "polish 2"]
    assert capsys.readouterr().out == (
        "the reference artifact goes without polish_shrunk: polish_shrunk: matched 0 of 2 blocks\n"
    )


def test_reference_that_cannot_be_lowered_is_refused(bench: Bench) -> None:
    @dataclass(frozen=True, kw_only=True)
    class LowerShrunk(Lower):
        def run(self, model: Model, ctx: Context) -> PassResult:
            raise PassError("lower_shrunk: no")

    with pytest.raises(PassError, match="lower_shrunk: no"):
        reference_of(bench, Shrink(), LowerShrunk())


def test_candidate_is_measured_against_the_reference(bench: Bench) -> None:
    gate = gate_of(decode_tokens_per_s=RateBudget(min_ratio=1.5))
    machine = machine_with(0.1, 0.1)
    machine.seconds = lambda graph: 0.1 if "shrunk" in (graph.parents[0] / "entry.json").read_text() else 0.2
    run = climbed(bench, recipe_of(bench, Shrink(), Lower(), gate=gate), machine)
    (speed,) = run.speeds
    assert (speed.outcome, speed.estimate) == ("pass", pytest.approx(2))
    assert (run.exit_code, run.timing is not None) == (ExitCode.PASS, True)
    assert CALLS == ["shrink", "lower", "lower"]


def test_absolute_budget_makes_no_reference(bench: Bench) -> None:
    gate = gate_of(latency_ms=LatencyBudget(max=100))
    run = climbed(bench, recipe_of(bench, Shrink(), Lower(), gate=gate), machine_with(0.1))
    assert (run.exit_code, run.speeds[0].reference) == (ExitCode.FAIL, None)
    assert CALLS == ["shrink", "lower"]


def test_without_a_budget_nothing_is_measured(bench: Bench) -> None:
    machine = machine_with()
    run = climbed(bench, recipe_of(bench, Lower()), machine)
    assert (run.speeds, run.timing, machine.started) == ((), None, [])


def test_rung_that_is_too_slow_gives_way_and_each_is_measured_at_a_part_of_the_level(bench: Bench) -> None:
    rungs = (Fallback(), Fallback(otherwise=(Polish(strength=2), Polish(strength=3))))
    gate = gate_of(latency_ms=LatencyBudget(max=100))
    machine = machine_with(0.2, 0.2, 0.01)
    run = climbed(bench, recipe_of(bench, Lower(), Polish(), gate=gate, fallbacks=rungs), machine)
    assert [rejected.reason for rejected in run.rejected] == ["not shown to be fast enough"] * 2
    assert (run.exit_code, run.steps[-1].rung) == (ExitCode.PASS, 2)
    assert run.speeds[0].alpha == pytest.approx(0.05 / 4)  # a half, a quarter, and the quarter that is left


def test_fail_claims_of_several_speeds_share_their_level(bench: Bench) -> None:
    # The highest of 8 restarts bounds a median at 2^-8; at a quarter of 5 % / 4 no bound is possible yet.
    budgets = {
        "prefill_tokens_per_s": RateBudget(min=1, min_ratio=0.1),
        "decode_tokens_per_s": RateBudget(min=1, min_ratio=0.1),
    }
    machine = machine_with(0.1, 0.1)
    run = climbed(bench, recipe_of(bench, Shrink(), Lower(), gate=gate_of(**budgets)), machine)
    assert {speed.outcome for speed in run.speeds} == {"pass"}
    assert all(math.isinf(speed.upper) for speed in run.speeds)
    alone = climbed(bench, recipe_of(bench, Lower(), gate=gate_of(latency_ms=LatencyBudget(max=1e6))), machine)
    assert math.isfinite(alone.speeds[0].lower)
