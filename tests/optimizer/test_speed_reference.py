# ruff: noqa: F401, F811 (a fixture is imported, then taken as an argument)
"""The reference artifact: the chain without what changes the weights."""

import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
from test_pipeline import CALLS, Bench, Lower, Polish, bench

from optimizer.pipeline import _begin
from optimizer.recipe import Recipe, Target
from optimizer.report import Reporter
from optimizer.store import Store
from passes.base import ONNX, TORCH, Context, Model, Pass, PassError, PassResult, Stage


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


def reference_of(bench: Bench, *passes: Pass) -> Model:
    recipe = Recipe(
        name="r",  # type: ignore[arg-type]
        model="source",
        target=Target(threads=1),
        passes=passes,
        model_folder=bench.folder / "source",
    )
    CALLS.clear()
    with Store(bench.folder / "store") as store:
        _, chain = _begin(recipe, store, Reporter("plain"))
        found = chain._reference()
        assert len(chain.path) == 1
    return found


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
        def requires(self, model: Model) -> None:
            raise PassError("lower_shrunk: no")

    with pytest.raises(PassError, match="lower_shrunk: no"):
        reference_of(bench, Shrink(), LowerShrunk())
