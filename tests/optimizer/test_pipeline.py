"""The loop, with passes that do next to nothing: they copy a graph that is served already."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import save_file

from optimizer.costs import recorded
from optimizer.errors import CannotRun, ExitCode
from optimizer.examiner import scoring_code
from optimizer.pipeline import run
from optimizer.recipe import DataSource, Gate, Recipe, SizeBudget, Target
from optimizer.record import Run
from passes.base import ONNX, TORCH, Context, Model, Pass, PassError, PassResult, Stage
from runtime.artifact import verify

ARTIFACT = Path(__file__).parents[1] / "data" / "artifact-v1"
CALLS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Lower(Pass):
    """Take the graph of an artifact."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = ONNX

    def run(self, model: Model, ctx: Context) -> PassResult:
        CALLS.append("lower")
        return copied(ARTIFACT, model, ctx, {"nodes": 3})


@dataclass(frozen=True, kw_only=True)
class Polish(Pass):
    """Copy the graph; refuse or break a promise if asked."""

    reads: ClassVar[Stage] = ONNX
    writes: ClassVar[Stage] = ONNX
    strength: int = 1
    fault: str = field(default="")

    def requires(self, model: Model) -> None:
        if self.fault == "refuses":
            raise PassError("polish: matched 0 of 2 blocks")

    def run(self, model: Model, ctx: Context) -> PassResult:
        CALLS.append(f"polish {self.strength}")
        return copied(model.folder, model, ctx, {})

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        if self.fault == "breaks":
            raise PassError("polish: numbers moved by 1.0e-01 of their range")


def copied(folder: Path, model: Model, ctx: Context, changes: dict[str, int]) -> PassResult:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(folder / name, ctx.workdir / name)
    return PassResult(Model(ONNX, ctx.workdir, model.assets, model.config), changes)


def edit_config(**changes: object) -> Callable[[Path], object]:
    def edit(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@dataclass(frozen=True, kw_only=True)
class Calibrated(Lower):
    """Look at texts."""

    calibration: str = field(default="shown", metadata={"names": "data"})
    samples: int = 8
    context: int = 16

    def run(self, model: Model, ctx: Context) -> PassResult:
        CALLS.append(f"calibrated on {len(ctx.calibration[self.calibration])}")
        return copied(ARTIFACT, model, ctx, {"nodes": 3})


@dataclass
class Bench:
    """Runs recipes on one small source, with one store and one output."""

    folder: Path

    def run(
        self,
        *passes: Pass,
        max_ratio: float | None = None,
        data: Mapping[str, DataSource] | None = None,
        **options: Any,
    ) -> Run:
        size = None if max_ratio is None else SizeBudget(max_ratio=max_ratio)
        recipe = Recipe(
            name="r",  # type: ignore[arg-type]
            model="source",
            target=Target(threads=1),
            data=data or {},
            gate=Gate(size=size),
            passes=passes,
            model_folder=self.folder / "source",
            text="name: r\n",
        )
        CALLS.clear()
        return run(recipe, output=self.output, store=self.folder / "store", **options)

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def lock(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.output / "optimize.lock").read_text())
        return content


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        shutil.copyfile(ARTIFACT / name, source / name)
    edit_config(architectures=["LlamaForCausalLM"])(source)
    save_file({"w": np.ones(4, np.float32)}, source / "model.safetensors")
    return Bench(tmp_path)


def test_run_ends_with_an_artifact_that_verifies(bench: Bench) -> None:
    done = bench.run(Lower(), Polish())
    assert (done.exit_code, done.artifact, done.earlier) == (ExitCode.PASS, str(bench.output), None)
    assert verify(bench.output).digest == done.digest
    assert [step.name for step in done.steps] == ["source", "lower", "polish"]


def test_second_run_calls_no_pass(bench: Bench) -> None:
    first = bench.run(Lower(), Polish())
    second = bench.run(Lower(), Polish())
    assert CALLS == []
    assert [step.is_stored for step in second.steps] == [False, True, True]
    assert second.digest == first.digest
    assert second.steps[1].pass_s == first.steps[1].pass_s


def test_changed_option_runs_its_pass_and_those_after_it_again(bench: Bench) -> None:
    bench.run(Lower(), Polish(strength=1), Polish(strength=5))
    bench.run(Lower(), Polish(strength=2), Polish(strength=5))
    assert CALLS == ["polish 2", "polish 5"]


def test_changed_calibration_texts_run_their_pass_again_and_are_in_the_lock(bench: Bench) -> None:
    texts, locks = bench.folder / "texts.jsonl", []
    data = {"shown": DataSource(json=texts)}
    for content in ("one text\n", "one text\n", "two texts\nhere\n"):
        texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in content.splitlines()))
        bench.run(Calibrated(), data=data)
        locks.append(CALLS + bench.lock["calibration"])
    assert [lock[0] for lock in locks[::2]] == ["calibrated on 1", "calibrated on 2"]
    assert locks[1] == locks[0][1:]  # the same texts: not run again, and the same hash
    assert locks[2][1] != locks[0][1]
    assert locks[0][1].keys() == {"calibrated"}


def test_changed_source_runs_everything_again(bench: Bench) -> None:
    bench.run(Lower())
    save_file({"w": np.full(4, 2, np.float32)}, bench.folder / "source" / "model.safetensors")
    bench.run(Lower())
    assert CALLS == ["lower"]


def test_pass_that_comes_twice_keeps_its_own_options_in_lock_and_card(bench: Bench) -> None:
    bench.run(Lower(), Polish(strength=1), Polish(strength=2))
    assert [step["polish"]["strength"] for step in bench.lock["passes"][1:]] == [1, 2]
    card = (bench.output / "README.md").read_text()
    assert "strength 1" in card and "strength 2" in card


def test_optional_pass_that_refuses_is_skipped_and_left_out_of_the_lock(bench: Bench) -> None:
    done = bench.run(Lower(), Polish(fault="refuses", optional=True))
    assert done.exit_code == ExitCode.PASS
    assert (done.steps[-1].is_skipped, done.steps[-1].note) == (True, "polish: matched 0 of 2 blocks")
    assert [list(step) for step in bench.lock["passes"]] == [["lower"]]


@pytest.mark.parametrize(("fault", "words"), [("refuses", "matched 0 of 2 blocks"), ("breaks", "numbers moved by")])
def test_pass_that_refuses_or_breaks_its_promise_ends_the_run(bench: Bench, fault: str, words: str) -> None:
    with pytest.raises(CannotRun, match=words) as raised:
        bench.run(Lower(), Polish(fault=fault))
    assert raised.value.exit_code == ExitCode.CANNOT_RUN
    assert not bench.output.exists()
    assert not list((bench.folder / "store" / "partial").iterdir())


def test_result_that_broke_its_promise_is_not_stored(bench: Bench) -> None:
    for _ in range(2):
        with pytest.raises(CannotRun, match="numbers moved"):
            bench.run(Lower(), Polish(fault="breaks"))
        assert CALLS[-1] == "polish 1"


def test_stop_after_a_pass_makes_no_artifact(bench: Bench) -> None:
    done = bench.run(Lower(), Polish(), stop_after="lower")
    assert [step.name for step in done.steps] == ["source", "lower"]
    assert (done.artifact, done.stopped_after) == (None, "lower")
    assert not bench.output.exists()


def test_size_over_its_budget_is_red_and_leaves_the_older_artifact_named(bench: Bench) -> None:
    older = bench.run(Lower())
    done = bench.run(Lower(), max_ratio=0.01)
    assert (done.exit_code, done.artifact, done.earlier) == (ExitCode.FAIL, None, str(bench.output))
    assert verify(bench.output).digest == older.digest


def test_keep_makes_the_artifact_of_a_red_run(bench: Bench) -> None:
    done = bench.run(Lower(), max_ratio=0.01, keep=True)
    assert done.exit_code == ExitCode.FAIL
    assert verify(bench.output).digest == done.digest


def test_lock_names_versions_source_and_no_folder(bench: Bench) -> None:
    bench.run(Lower())
    assert {"python", "numpy", "torch", "onnxruntime"} <= set(bench.lock["versions"])
    assert len(bench.lock["source"]) == 64
    assert str(bench.folder) not in (bench.output / "optimize.lock").read_text()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edit_config(architectures=[]), "no `architectures`; expected one class name"),
        (edit_config(vocab_size=None), "vocab_size: got None, expected a whole number"),
        (edit_config(max_position_embeddings=0), "max_position_embeddings: got 0, expected"),
    ],
)
def test_configuration_that_leaves_sizes_open_is_refused_before_any_pass(
    bench: Bench, edit: Callable[[Path], object], words: str
) -> None:
    edit(bench.folder / "source")
    with pytest.raises(CannotRun, match=words):
        bench.run(Lower())
    assert CALLS == []


def test_scores_are_kept_under_the_code_that_made_them() -> None:
    assert scoring_code() == scoring_code()
    assert len(scoring_code()) == 64


def test_costs_of_work_that_was_done_are_remembered_once(bench: Bench) -> None:
    done = bench.run(Lower(), Polish())
    bench.run(Lower(), Polish())
    costs = recorded(bench.folder / "store", threads=1)
    assert [cost.work.what for cost in costs] == ["lower", "polish"]
    assert [cost.seconds for cost in costs] == [step.pass_s for step in done.steps[1:]]
    assert [cost.work.bytes for cost in costs] == [step.bytes for step in done.steps[:-1]]
    assert [cost.peak_bytes for cost in costs] == [step.pass_peak_bytes for step in done.steps[1:]]
