"""What a plan says before a run, and what becomes of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from made_up import Harm, Ladder, Lower

from optimizer.costs import Cost, Work, expected, host
from optimizer.errors import CannotRun
from optimizer.evaluate.items import Item
from optimizer.gate import Budget
from optimizer.plan_report import gate_text, plan_lines
from optimizer.power import forecast
from optimizer.recipe import Keep, Skip
from optimizer.spreads import SHIPPED, chain_of, form_of, natural_units, noted
from passes.base import Context, Estimate, Model, Pass, PassError
from passes.quantize_int8 import QuantizeInt8
from passes.quantize_rtn import QuantizeRtn

TWO_POINTS = Budget("accuracy", 0.02)


@dataclass(frozen=True, kw_only=True)
class Planned(Harm):
    """Harm that says what it will do; `wrong` is how many bytes it is mistaken by."""

    wrong: int = 0

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        size = sum((Path(__file__).parents[1] / "data/artifact-v1-classifier" / name).stat().st_size for name in FILES)
        return Estimate(1, size + self.grows + self.wrong, 100, 1 << 20, model)


FILES = ("model.onnx", "model.onnx.data")


@dataclass(frozen=True, kw_only=True)
class Picky(Lower):
    """Takes no architecture."""

    def admits(self, source: Model, ctx: Context) -> None:
        raise PassError("picky: takes no architecture")


def test_chain_is_planned_pass_by_pass_from_what_the_one_before_leaves(ladder: Ladder) -> None:
    plan = ladder.plan(Planned(grows=1000))
    assert [(step.place, step.name, step.matches) for step in plan.steps] == [
        (0, "source", None),
        (1, "lower", 3),
        (2, "planned", 1),
    ]
    source, lowered, last = plan.steps
    assert (source.bytes, source.parameters) == (800_072, 200_000)
    assert last.bytes == lowered.bytes + 1000
    assert plan.disk_bytes == lowered.bytes + 2 * last.bytes
    assert plan.seconds == pytest.approx(sum(step.pass_s + step.score_s for step in plan.steps))
    assert plan.peak_bytes == max(step.peak_bytes for step in plan.steps) > 0
    assert (plan.refused, plan.warnings, ladder.asked) == (None, (), [])


def test_plan_of_a_gate_is_the_forecast_of_its_items(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHIPPED, ("classifier", "accuracy", "float"), (0.01, 0.0))
    (gate,) = ladder.plan(Planned(), drop=0.02, items=300).gates
    told = forecast(TWO_POINTS, 300, 0.01)
    assert (gate.items, gate.floor, gate.power, gate.enough) == (300, told.floor, told.power, told.items)
    halves = [forecast(TWO_POINTS, 300, spread).items for spread in (0.005, 0.02)]
    assert [gate.enough_at_half, gate.enough_at_double] == halves
    assert "300 items at 1 % discordance pass with probability" in gate_text(gate)


def test_items_that_are_missing_cost_the_seconds_of_their_scoring(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHIPPED, ("classifier", "accuracy", "float"), (0.04, 0.0))
    plan = ladder.plan(Planned(), drop=0.02, items=300)
    (gate,) = plan.gates
    scored = sum(step.score_s for step in plan.steps)
    assert gate.more_s == pytest.approx(scored * (gate.enough - 300) / 300)


def test_gate_without_any_measurement_has_no_forecast_but_a_floor(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(SHIPPED, ("classifier", "accuracy", "float"))
    (gate,) = ladder.plan(Planned(), drop=0.02, items=300).gates
    assert (gate.power, gate.enough, gate.floor) == (None, None, 149)
    assert "of at least 149 that can pass; no forecast" in gate_text(gate)


def test_what_a_run_found_is_what_the_next_plan_expects(ladder: Ladder) -> None:
    done = ladder.run(Planned(percent=2), drop=0.2)
    verdict = done.steps[-1].gates[0].verdict
    (spread,) = {each.spread for each in noted(ladder.folder / "store") if each.evaluation == "accuracy/accuracy"} - {0}
    assert spread == verdict.spread > 0
    (gate,) = ladder.plan(Planned(percent=2), drop=0.1).gates
    assert "of this model with these passes" in gate.basis


def test_a_gate_that_cannot_pass_is_a_warning(ladder: Ladder) -> None:
    plan = ladder.plan(Planned(), drop=0.01, items=200)
    assert plan.warnings == ("gate.accuracy: 200 items cannot pass even if no answer changes; 299 could",)
    assert ladder.plan(Planned(), drop=0.01, items=299).warnings == ()


def test_with_a_ladder_the_items_that_judge_at_half_the_level_are_planned(ladder: Ladder) -> None:
    plan = ladder.plan(Planned(grows=5), Planned(grows=7), Skip(), Keep(worst=1, format="float"), items=600)
    (gate,) = plan.gates
    assert (gate.items, gate.alpha) == (450, 0.025)
    assert [(rung.place, rung.rung, rung.name) for rung in plan.rungs] == [
        (2, number, "planned") for number in (1, 2, 3)
    ]
    lines = list(plan_lines(plan))
    assert any(line.startswith("  otherwise 1: planned grows 7: 1 matches") for line in lines)
    assert "  otherwise 2: skip" in lines


def test_a_size_that_cannot_pass_is_a_warning(ladder: Ladder) -> None:
    (warning,) = ladder.plan(Planned(grows=2_000_000), max_ratio=1.0).warnings
    assert warning.startswith("gate.size: cannot pass, 2.")


def test_run_stops_before_any_work_at_what_the_plan_refuses(ladder: Ladder) -> None:
    with pytest.raises(CannotRun, match="picky: takes no architecture"):
        ladder.run(Planned(), then=(Picky(),))
    assert ladder.asked == []
    plan = ladder.plan(Harm(refuses=True), Skip())
    assert (plan.steps[2].refusal, plan.refused) == ("harm: matched nothing", None)  # a fallback takes its place
    assert ladder.plan(Harm(refuses=True, optional=True)).refused is None  # the run would skip it


def test_plan_and_outcome_stand_side_by_side(ladder: Ladder, capsys: pytest.CaptureFixture[str]) -> None:
    done = ladder.run(Planned(wrong=100), reporter="plain")
    last = done.steps[-1]
    assert last.planned is not None
    assert last.planned.bytes == last.bytes + 100
    assert "planned and made: " in capsys.readouterr().out
    evidence = ladder.folder / "out" / "evidence"
    assert json.loads((evidence / "plan.json").read_text())["steps"][-1]["bytes"] == last.planned.bytes
    assert "## Plan and outcome" in (evidence / "report.md").read_text()


def test_seconds_come_from_the_same_work_else_from_other_work_else_from_another_machine() -> None:
    work = Work("fuse_toy", bytes=1000, parameters=10**9, layers=10)
    shipped = expected(work, [], threads=2)
    assert shipped.basis == "shipped"
    assert expected(work, [], threads=1).seconds == 2 * shipped.seconds
    smaller = replace(work, bytes=100, parameters=10**8)
    costs = [Cost(each, seconds, 0, 2, host(), "2026-11-25") for each, seconds in ((work, 7.0), (smaller, 3.0))]
    assert (expected(work, costs, 2).seconds, expected(work, costs, 2).basis) == (pytest.approx(7), "measured")
    scaled = expected(replace(work, bytes=10**6, parameters=2 * 10**9), costs[:1], 2)
    assert scaled.basis == "scaled"
    assert 7 < scaled.seconds < 14
    other_kind = expected(replace(work, what="export_onnx"), costs[:1], 2)
    elsewhere = expected(replace(work, what="export_onnx"), [], 2).seconds
    assert other_kind.seconds == pytest.approx(elsewhere * 7 / shipped.seconds)


@pytest.mark.parametrize(
    ("passes", "form"),
    [
        ((), "float"),
        ((QuantizeRtn(format="int4", group_size=128), Lower()), "int4 g128"),
        ((QuantizeInt8(),), "int8 row"),
    ],
)
def test_form_of_a_chain_is_that_of_its_weights(passes: tuple[Pass, ...], form: str) -> None:
    assert form_of(passes) == form
    assert ("classifier", "accuracy", form) in SHIPPED or ("classifier", "accuracy", form.partition(" ")[0]) in SHIPPED


def test_passes_that_change_no_weight_do_not_change_what_is_expected() -> None:
    assert chain_of((QuantizeRtn(), Lower())) == chain_of((QuantizeRtn(),)) != chain_of((QuantizeRtn(format="int8"),))


def test_documents_of_different_lengths_count_as_fewer() -> None:
    items = [Item((0,) * length, group) for length, group in ((10, "a"), (10, "b"), (5, "c"), (5, "c"))]
    assert natural_units("perplexity", items, "decoder") == pytest.approx(3)
    items[0] = Item((0,) * 40, "a")
    assert natural_units("perplexity", items, "decoder") == pytest.approx(60**2 / (40**2 + 2 * 10**2))
    assert natural_units("flips", items, "decoder") == 60
    assert natural_units("accuracy", items, "classifier") == 4
