"""What follows where a gate fails: rungs, the items that choose and those that judge, how often these are opened.

The classifier is real as far as files go; its answers are made up: right but for a share of the texts that the last
pass names, so that every loss is known.
"""

import csv
import json
import shutil
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import save_file

from optimizer.costs import recorded
from optimizer.evaluate.classification import Classification, ClassificationBudget
from optimizer.evaluate.items import Item, TopUp
from optimizer.exams import Exam, Exams
from optimizer.gate import NOISY
from optimizer.pipeline import run
from optimizer.quantities import Drop
from optimizer.recipe import DataSource, Fallback, Gate, Recipe, Rung, SizeBudget, Skip, Target
from optimizer.record import Run
from passes.base import ONNX, TORCH, Context, Model, Pass, PassError, PassResult, Stage

ARTIFACT = Path(__file__).parents[1] / "data" / "artifact-v1-classifier"
LABELS = ("weather", "music", "travel")


@dataclass(frozen=True, kw_only=True)
class Lower(Pass):
    """Take the graph of an artifact."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = ONNX

    def run(self, model: Model, ctx: Context) -> PassResult:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(ARTIFACT / name, ctx.workdir / name)
        return PassResult(Model(ONNX, ctx.workdir, model.assets, model.config), {"nodes": 3})


@dataclass(frozen=True, kw_only=True)
class Harm(Pass):
    """Make a share of the answers wrong; `only` harms texts whose hash is in that half alone."""

    reads: ClassVar[Stage] = ONNX
    writes: ClassVar[Stage] = ONNX
    percent: float = 0.0
    grows: int = 0
    refuses: bool = False
    recoverable: bool = field(default=False)

    def requires(self, model: Model) -> None:
        if self.refuses:
            raise PassError("harm: matched nothing")

    def run(self, model: Model, ctx: Context) -> PassResult:
        shutil.copytree(model.folder, ctx.workdir, dirs_exist_ok=True)
        (ctx.workdir / "harm.json").write_text(json.dumps(self.percent))
        with (ctx.workdir / "model.onnx.data").open("ab") as file:
            file.write(bytes(self.grows))
        return PassResult(Model(ONNX, ctx.workdir, model.assets, model.config), {"harmed": int(self.percent)})


@dataclass(frozen=True, kw_only=True)
class Prune(Harm):
    """Harm that a later pass heals."""

    loses: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Heal(Harm):
    """Win back what was lost."""

    recovers: ClassVar[bool] = True


class MadeUp:
    """Right on all texts but a share of them, chosen by a hash."""

    kind = "classifier"

    def __init__(self, model: Model, asked: list[int]) -> None:
        harm = model.folder / "harm.json"
        self.percent, self.asked = json.loads(harm.read_text()) if harm.exists() else 0.0, asked

    def classify(self, items: list[Item]) -> Any:
        self.asked.append(len(items))
        logits = np.zeros((len(items), 3), np.float32)
        for row, item in zip(logits, items, strict=True):
            place = int.from_bytes(sha256(str(item.ids).encode()).digest()[:4], "big") / 2**32
            row[(item.label + (place < self.percent / 100)) % 3] = 9.0
        return logits


@dataclass
class Ladder:
    """Runs recipes on one source with made-up answers; `asked` counts the items of each question to a model."""

    folder: Path
    asked: list[int]

    def run(
        self,
        first: Pass,
        *otherwise: Rung,
        items: int = 600,
        most: int | None = None,
        drop: float = 0.03,
        then: tuple[Pass, ...] = (),
        max_ratio: float | None = None,
        on_fail: Any = None,
        **options: Any,
    ) -> Run:
        passes = (Lower(), first, *then)
        size = None if max_ratio is None else SizeBudget(max_ratio=max_ratio)
        fallbacks = (Fallback(), Fallback(otherwise, on_fail), *(Fallback() for _ in then))
        recipe = Recipe(
            name="r",  # type: ignore[arg-type]
            model="source",
            target=Target(threads=1),
            data={"test": DataSource(csv=self.texts(items), label="label")},
            evaluate={"accuracy": Classification(data="test", items=TopUp(most=most) if most else None)},
            gate=Gate(budgets={"accuracy": ClassificationBudget(max_drop=Drop(drop, False))}, size=size),
            passes=passes,
            fallbacks=fallbacks,
            model_folder=self.folder / "source",
            text="name: r\n",
        )
        self.asked.clear()
        return run(recipe, output=self.folder / "out", store=self.folder / "store", **options)

    def texts(self, count: int) -> Path:
        path = self.folder / f"{count}.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows((f"text {number}", LABELS[number % 3]) for number in range(count))
        return path


@pytest.fixture
def ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ladder:
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((ARTIFACT / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(config))
    shutil.copyfile(ARTIFACT / "tokenizer.json", source / "tokenizer.json")
    save_file({"w": np.ones(200_000, np.float32)}, source / "model.safetensors")
    asked: list[int] = []
    monkeypatch.setattr("optimizer.package._prove", lambda folder, kind: None)  # a second for each artifact
    monkeypatch.setattr("optimizer.examiner.scorer_of", lambda model, kind, threads, alone=False: MadeUp(model, asked))
    return Ladder(tmp_path, asked)


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
    costs = [cost for cost in recorded(ladder.folder / "store", threads=1) if cost.what.startswith("scoring")]
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
