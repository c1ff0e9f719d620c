"""What follows where a gate fails: rungs, the items that choose and those that judge, how often these are opened."""

from dataclasses import replace

import pytest
from made_up import Harm, Heal, Ladder, MadeUp, Prune

from optimizer.costs import recorded
from optimizer.exams import Exam, Exams
from optimizer.gate import NOISY
from optimizer.recipe import Skip
from passes.base import Model


def test_a_rung_that_passes_takes_the_place_of_one_that_does_not(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=20), Harm(percent=10), Harm(percent=0.2))
    assert (done.exit_code, done.noise) == (0, {})
    assert [(each.index, each.step.rung, each.step.gates[0].verdict.outcome) for each in done.rejected] == [
        (1, 0, "fail"),
        (1, 1, "fail"),
    ]
    assert done.steps[-1].rung == 2
    assert [step.name for step in done.steps] == ["source", "lower", "harm"]


def test_items_that_choose_and_items_that_judge_are_different_ones(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=20), Harm(percent=0.2))
    chose, judged = done.steps[-1].gates[0], done.certified[0]
    assert (chose.part, judged.part) == ("search", "certify")
    assert (chose.verdict.n_items, judged.verdict.n_items) == (150, 450)
    assert done.verdicts == done.certified


def test_without_a_choice_all_items_judge(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=0.2))
    (gate,) = done.steps[-1].gates
    assert (gate.part, gate.verdict.n_items, gate.verdict.alpha, done.certified) == ("", 600, 0.05, ())


def test_a_rung_whose_loss_seen_is_above_the_budget_gives_way_though_nothing_is_shown(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=4), Harm(percent=0))
    (rejected,) = done.rejected
    (gate,) = rejected.step.gates
    assert gate.verdict.outcome == "inconclusive"
    assert rejected.reason == "search accuracy: the loss seen is above the budget"
    assert done.exit_code == 0


def test_a_model_that_does_not_pass_certify_gives_way_and_the_next_is_judged_at_half_the_level(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=2.2), Harm(percent=0), Harm(percent=0.1), drop=0.025, items=1000)
    assert [each.reason for each in done.rejected] == ["a gate did not pass it"]
    assert [each.verdict.alpha for each in done.certified] == [0.0125]  # the second of three: a quarter
    assert done.exit_code == 0


def test_the_levels_of_all_openings_together_are_alpha() -> None:
    exam = Exam({}, 0.05, 0.05, "certify")
    for openings in range(2, 8):
        exams = Exams(exam, exam, openings)
        levels = [each.alpha for number in range(1, openings + 1) if (each := exams.certify(number))]
        assert sum(levels) == pytest.approx(0.05)


def test_when_nothing_is_left_the_last_word_decides_the_exit_code(ladder: Ladder) -> None:
    assert ladder.run(Harm(percent=20), Harm(percent=15)).exit_code == 1
    assert not (ladder.folder / "out").exists()
    assert ladder.run(Harm(percent=2.9), Harm(percent=2.8), drop=0.03).exit_code == 3


def test_too_few_items_are_not_split_and_each_model_is_judged_at_its_share_of_the_level(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=20), Harm(percent=0), items=150)
    (gate,) = done.steps[-1].gates
    assert (gate.part, gate.verdict.n_items, gate.verdict.alpha) == ("", 150, 0.025)
    assert (done.certified, done.exit_code) == ((), 0)


def test_skip_leaves_the_model_as_it_was(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=20), Skip())
    assert (done.exit_code, done.steps[-1].is_skipped, done.steps[-1].rung) == (0, True, 1)
    assert "harm" not in (ladder.folder / "out" / "optimize.lock").read_text()


def test_a_pass_that_refuses_gives_way(ladder: Ladder) -> None:
    done = ladder.run(Harm(refuses=True), Harm(percent=0))
    assert [each.reason for each in done.rejected] == ["harm: matched nothing"]
    assert done.exit_code == 0


def test_the_last_rung_that_refuses_stops_the_run_with_its_reason(ladder: Ladder) -> None:
    with pytest.raises(Exception, match="harm: matched nothing"):
        ladder.run(Harm(percent=20), Harm(refuses=True))


def test_a_gate_that_fails_later_gives_the_turn_to_an_earlier_ladder(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=0), Skip(), then=(Harm(percent=20),))
    assert [each.reason[:15] for each in done.rejected] == ["search accuracy"]
    assert done.exit_code == 1


def test_a_model_that_is_too_large_gives_way_before_any_item_is_opened(ladder: Ladder) -> None:
    done = ladder.run(Harm(grows=4_000_000), Harm(percent=0), max_ratio=1.0)
    assert [each.reason for each in done.rejected] == ["the model is too large"]
    assert (done.exit_code, done.openings[0].count) == (0, 1)


def test_what_a_later_pass_recovers_is_only_reported(ladder: Ladder) -> None:
    done = ladder.run(Prune(percent=20), then=(Heal(percent=0),))
    assert done.steps[2].is_reported
    assert done.steps[2].gates[0].verdict.outcome == "fail"
    assert done.exit_code == 0
    assert ladder.run(Prune(percent=20), then=(Harm(percent=0),)).exit_code == 1


def test_on_fail_is_the_recipes_to_say(ladder: Ladder) -> None:
    assert ladder.run(Harm(percent=20), then=(Harm(percent=0),), on_fail="report").exit_code == 0
    assert ladder.run(Prune(percent=20), then=(Heal(percent=0),), on_fail="stop").exit_code == 1


def test_openings_are_counted_over_runs_and_a_second_run_is_none(ladder: Ladder) -> None:
    assert [ladder.run(Harm(percent=percent)).openings[0].count for percent in (0, 0, 0.1, 0.2)] == [1, 1, 2, 3]
    other_items = ladder.run(Harm(percent=0), items=500)
    assert (other_items.openings[0].count, other_items.openings[0].alpha) == (1, 0.05)
    opening = ladder.run(Harm(percent=0.2)).openings[0]
    assert (opening.count, opening.alpha) == (3, pytest.approx(0.15))


def test_a_source_that_is_not_like_itself_is_told(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    def moody(model: Model, kind: str, threads: int, alone: bool = False) -> MadeUp:
        scorer = MadeUp(model, ladder.asked)
        scorer.percent += 50 * alone
        return scorer

    monkeypatch.setattr("optimizer.examiner.scorer_of", moody)
    done = ladder.run(Harm(percent=0))
    assert 0.3 < done.noise["accuracy/accuracy"] < 0.7
    assert NOISY in done.steps[-1].gates[0].verdict.flags
    assert "the source itself scores" in done.steps[-1].gates[0].verdict.reason


def test_a_gate_asks_for_no_more_items_than_it_needs(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=0), items=4000, most=3200, drop=0.01)
    verdict = done.steps[-1].gates[0].verdict
    assert (verdict.outcome, verdict.n_items, verdict.looked_at) == ("pass", 800, 800)
    asked = [count for count in ladder.asked if count == 400]
    assert asked == [400] * 6  # the source and both models, an eighth and then another
    assert ladder.run(Harm(percent=30), items=4000, most=3200, drop=0.01).steps[-1].gates[0].verdict.n_items == 800


def test_scores_of_portions_are_those_of_the_whole(ladder: Ladder) -> None:
    in_portions = ladder.run(Harm(percent=1), items=800, most=800, drop=0.01)
    at_once = ladder.run(Harm(percent=1), items=800, drop=0.01)
    verdict = in_portions.steps[-1].gates[0].verdict
    if verdict.n_items == 800:
        assert verdict.candidate == at_once.steps[-1].gates[0].verdict.candidate
    assert in_portions.steps[-1].scores["accuracy/accuracy"] == verdict.candidate


def test_seconds_of_a_models_scoring_are_its_own(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=0))
    costs = [cost for cost in recorded(ladder.folder / "store", threads=1) if cost.work.what.startswith("scoring")]
    assert [step.score_s for step in done.steps] == [cost.seconds for cost in costs]
    assert [step.score_peak_bytes for step in done.steps] == [cost.peak_bytes for cost in costs]


def test_keep_makes_an_artifact_of_the_last_rung(ladder: Ladder) -> None:
    done = ladder.run(Harm(percent=20), Harm(percent=15), keep=True)
    assert (done.exit_code, done.steps[-1].rung, done.artifact) == (1, 1, str(ladder.folder / "out"))


def test_a_ladder_that_was_climbed_is_climbed_again_to_the_same_artifact(ladder: Ladder) -> None:
    first = ladder.run(Harm(percent=20), Harm(percent=0.2))
    asked = list(ladder.asked)
    second = ladder.run(Harm(percent=20), Harm(percent=0.2))
    assert (asked != [], ladder.asked) == (True, [])
    assert (first.digest, replace(first, seconds=0).certified) == (second.digest, second.certified)
