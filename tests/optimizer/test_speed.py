"""Speed budgets: how a recipe says them, and what a handful of restarts decides."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_recipes import CHOICES, RIGHT

from optimizer.errors import CannotRun, RecipeError
from optimizer.recipe import Recipe
from optimizer.recipe_reader import parse
from optimizer.speed import FIRST_LOOK, LAST_LOOK, Restart, SpeedLimit, SpeedVerdict, decide, judge, level_of_look
from optimizer.speed_restarts import require_measurable
from runtime.bench import Workload

DECODE = SpeedLimit("decode_tokens_per_s", 1.5, is_ratio=True)
TTFT = SpeedLimit("ttft_ms", 0.8, is_ratio=True)
LATENCY = SpeedLimit("latency_ms", 20.0, is_ratio=False)
BUDGET = "size: {max_ratio: 0.40}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def read(budgets: str, folder: Path, recipe: str = RIGHT) -> Recipe:
    return parse(recipe.replace(BUDGET, budgets), "recipe.yaml", (folder,), choices=CHOICES)


def mistakes(budgets: str, folder: Path, recipe: str = RIGHT) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(budgets, folder, recipe)
    return [str(mistake).removeprefix("recipe.yaml:") for mistake in caught.value.mistakes]


def test_recipe_says_ratios_and_absolute_budgets(folder: Path) -> None:
    gate = read("decode_tokens_per_s: {min_ratio: 1.5, min: 20}\n  latency_ms: {max: 20}", folder).gate
    assert gate.speeds == (DECODE, SpeedLimit("decode_tokens_per_s", 20, is_ratio=False), LATENCY)
    assert gate.workload == Workload(input_tokens=128, new_tokens=32, batch=8)


WRONG = {
    "neither": (
        "latency_ms: {}",
        "13:15: gate.latency_ms: got neither, expected max_ratio (against the reference artifact) or max",
    ),
    "wrong side": (
        "decode_tokens_per_s: {max_ratio: 1}",
        "13:25: gate.decode_tokens_per_s: unknown key 'max_ratio'; did you mean 'min_ratio'?",
    ),
    "out of range": ("ttft_ms: {max: 0}", "13:18: gate.ttft_ms.max: got 0, expected above 0"),
    "one token has no rate": (
        "workload: {new_tokens: 1}",
        "13:26: gate.workload.new_tokens: got 1, expected at least 2",
    ),
    "speed that no model has which the tasks score": (
        "texts_per_s: {min: 5}",
        "13:3: gate.texts_per_s: models that ppl, same can score have no such speed, expected one of "
        "prefill_tokens_per_s, decode_tokens_per_s, ttft_ms, latency_ms",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistake_is_told_with_its_place(case: str, folder: Path) -> None:
    budgets, expected = WRONG[case]
    assert mistakes(budgets, folder) == [expected]


def test_ratio_is_refused_where_the_chain_is_the_reference(folder: Path) -> None:
    recipe = RIGHT.replace("  - quantize_toy: {format: int4}\n", "")
    (mistake,) = mistakes("ttft_ms: {max_ratio: 1, max: 5}", folder, recipe)
    assert mistake.startswith("13:12: gate.ttft_ms: the reference artifact is exported and fused as this chain is")
    assert read("ttft_ms: {max: 5}", folder, recipe).gate.speeds == (SpeedLimit("ttft_ms", 5, is_ratio=False),)


def test_evaluation_may_not_be_named_as_a_speed(folder: Path) -> None:
    recipe = RIGHT.replace("same:", "latency_ms:")
    assert any("the name 'latency_ms' is a key of gate itself" in line for line in mistakes(BUDGET, folder, recipe))


@pytest.mark.parametrize(
    ("limit", "kind", "context", "message"),
    [
        (DECODE, "classifier", 512, "gate.decode_tokens_per_s: cannot be measured of a model of kind classifier, "),
        (LATENCY, "decoder", 159, "gate.workload: got input_tokens + new_tokens of 160, expected at most 159, "),
        (LATENCY, "embedder", 64, "gate.workload: got input_tokens of 128, expected at most 64, the model's context"),
    ],
)
def test_what_only_the_model_can_tell_is_refused(limit: SpeedLimit, kind: str, context: int, message: str) -> None:
    with pytest.raises(CannotRun) as caught:
        require_measurable([limit], Workload(), kind, context)
    assert str(caught.value).startswith(message)


def test_what_can_be_measured_is_not_refused() -> None:
    require_measurable([DECODE, LATENCY], Workload(), "decoder", 160)
    require_measurable([LATENCY], Workload(), "reranker", 128)


def restarts(metric: str, ratios: Sequence[float], reference: float = 100.0) -> list[Restart]:
    """Make restarts whose pairs all have one ratio, while the machine's own speed doubles from pair to pair."""
    speeds = [reference * 2.0**pair for pair in range(8)]
    return [Restart({metric: speeds}, {metric: [ratio * speed for speed in speeds]}) for ratio in ratios]


def made_of(all_restarts: Sequence[Restart]) -> tuple[Callable[[int], Restart], list[int]]:
    """Return a function that hands out restarts, and the list of the numbers it was asked for."""
    asked: list[int] = []

    def restart(number: int) -> Restart:
        asked.append(number)
        return all_restarts[number]

    return restart, asked


def verdict_on(limit: SpeedLimit, ratios: Sequence[float]) -> SpeedVerdict:
    return judge(limit, restarts(limit.metric, ratios), alpha=0.05, fail_alpha=0.05)


def test_value_of_a_restart_is_the_median_ratio_of_its_pairs() -> None:
    restart = Restart({"ttft_ms": [10, 20, 40, 80]}, {"ttft_ms": [5, 10, 20, 800]})
    assert restart.value(TTFT) == pytest.approx(0.5)
    assert restart.value(SpeedLimit("ttft_ms", 1, is_ratio=False)) == 15


@pytest.mark.parametrize(
    ("limit", "ratio", "outcome"),
    [
        (DECODE, 1.6, "pass"),
        (DECODE, 1.5, "inconclusive"),
        (DECODE, 1.4, "fail"),
        (TTFT, 0.7, "pass"),
        (TTFT, 0.8, "inconclusive"),
        (TTFT, 0.9, "fail"),
    ],
)
def test_rates_must_be_above_and_times_below(limit: SpeedLimit, ratio: float, outcome: str) -> None:
    verdict = verdict_on(limit, [ratio * factor for factor in (0.98, 0.985, 0.99, 0.995, 1.005, 1.01, 1.015, 1.02)])
    assert verdict.outcome == outcome
    assert verdict.estimate == pytest.approx(ratio, rel=1e-3)
    assert verdict.lower < ratio < verdict.upper


def test_absolute_budget_judges_the_candidate_alone() -> None:
    values = (19.0, 18, 17, 16, 15, 14, 13, 19.5)
    alone = [Restart({}, {"latency_ms": [value] * 8}) for value in values]
    verdict = judge(LATENCY, alone, alpha=0.05, fail_alpha=0.05)
    assert (verdict.outcome, verdict.reference, verdict.candidate, verdict.estimate) == ("pass", None, 16.5, 16.5)
    assert (verdict.lower, verdict.upper) == (13, 19.5)  # of 8 at level alpha / 4: the least and the largest
    slower = [*alone[:-1], Restart({}, {"latency_ms": [21.0] * 8})]
    assert judge(LATENCY, slower, alpha=0.05, fail_alpha=0.05).outcome == "inconclusive"


def test_verdict_holds_what_was_measured() -> None:
    verdict = verdict_on(DECODE, [1.6, 1.7, 1.8, 1.9, 1.6, 1.7, 1.8, 1.9])
    assert verdict.by_restart == pytest.approx((1.6, 1.7, 1.8, 1.9, 1.6, 1.7, 1.8, 1.9))
    assert verdict.reference == 100 * (2**3 + 2**4) / 2
    assert verdict.reason == "shown to be within the budget"


def test_decided_by_the_first_look_nothing_more_is_measured() -> None:
    restart, asked = made_of(restarts(DECODE.metric, [2.0] * LAST_LOOK))
    (verdict,) = decide([DECODE], restart, alpha=0.05, fail_alpha=0.05)
    assert (verdict.outcome, verdict.restarts) == ("pass", FIRST_LOOK)
    assert asked == list(range(FIRST_LOOK))


def test_undecided_budget_is_judged_again_and_a_decided_one_keeps_its_verdict() -> None:
    values = [1.4, 1.7, 1.45, 1.6, 1.65, 1.48, 1.55, 1.58] + [2.0] * 8
    restart, asked = made_of(restarts(DECODE.metric, values))
    slow = SpeedLimit(DECODE.metric, 1.0, is_ratio=True)
    verdict, decided = decide([DECODE, slow], restart, alpha=0.05, fail_alpha=0.05)
    assert asked == list(range(LAST_LOOK))
    assert (verdict.outcome, verdict.restarts) == ("pass", LAST_LOOK)
    assert (decided.outcome, decided.restarts) == ("pass", FIRST_LOOK)


def test_last_look_may_be_undecided_too() -> None:
    restart, _ = made_of(restarts(DECODE.metric, [1.4, 1.6] * 8))
    (verdict,) = decide([DECODE], restart, alpha=0.05, fail_alpha=0.05)
    assert (verdict.outcome, verdict.reason) == (
        "inconclusive",
        "not decided by 16 restarts; measure on a machine that does nothing else",
    )


def test_looks_spend_a_quarter_and_the_rest() -> None:
    assert (level_of_look(8, 0.05), level_of_look(16, 0.05)) == pytest.approx((0.0125, 0.0375))


def test_a_look_that_can_claim_nothing_spends_nothing() -> None:
    # 8 restarts can claim at 2^-8 = 0.0039 and above.
    assert (level_of_look(8, 0.015), level_of_look(16, 0.015)) == (0, 0.015)


@given(st.floats(1e-4, 0.4))
def test_both_looks_together_spend_the_level(alpha: float) -> None:
    assert level_of_look(FIRST_LOOK, alpha) + level_of_look(LAST_LOOK, alpha) == pytest.approx(alpha)


def test_pass_and_fail_claims_have_their_own_levels() -> None:
    ratios = [1.5 + 0.01 * index for index in range(8)]
    strict = judge(DECODE, restarts(DECODE.metric, ratios), alpha=0.05, fail_alpha=0.002)
    assert math.isinf(strict.upper) and strict.lower > 1.5
    time = judge(TTFT, restarts(TTFT.metric, ratios), alpha=0.05, fail_alpha=0.002)
    assert time.lower == 0 and math.isfinite(time.upper)


@given(st.lists(st.floats(0.5, 3.0), min_size=8, max_size=8))
def test_swapping_the_sides_of_a_pair_mirrors_the_verdict(ratios: list[float]) -> None:
    one = verdict_on(SpeedLimit("decode_tokens_per_s", 1.25, is_ratio=True), ratios)
    other = verdict_on(SpeedLimit("ttft_ms", 0.8, is_ratio=True), [1 / ratio for ratio in ratios])
    assert other.estimate == pytest.approx(1 / one.estimate)
    assert (other.lower, other.upper) == pytest.approx((1 / one.upper, 1 / one.lower))
