"""Recipes whose passes and answers are made up, on a classifier that is real as far as files go.

Its answers are right but for a share of the texts that the last pass names, so that every loss is known.
"""

import csv
import json
import shutil
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from optimizer.evaluate.classification import Classification, ClassificationBudget
from optimizer.evaluate.items import Item, TopUp
from optimizer.pipeline import planned, run
from optimizer.planned import Plan
from optimizer.quantities import Drop
from optimizer.recipe import DataSource, Fallback, Gate, Recipe, Rung, SizeBudget, Target
from optimizer.record import Run
from optimizer.report import Style
from passes.base import ONNX, TORCH, Context, Estimate, Model, Pass, PassError, PassResult, Stage

ARTIFACT = Path(__file__).parents[1] / "data" / "artifact-v1-classifier"
LABELS = ("weather", "music", "travel")


@dataclass(frozen=True, kw_only=True)
class Lower(Pass):
    """Take the graph of an artifact."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = ONNX

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        size = sum((ARTIFACT / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        return Estimate(3, size, 100, 1 << 20, replace(model, stage=ONNX))

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

    def run(self, first: Pass, *otherwise: Rung, keep: bool = False, reporter: Style = "quiet", **options: Any) -> Run:
        self.asked.clear()
        recipe = self.recipe(first, *otherwise, **options)
        return run(recipe, output=self.folder / "out", store=self.folder / "store", keep=keep, reporter=reporter)

    def plan(self, first: Pass, *otherwise: Rung, **options: Any) -> Plan:
        return planned(self.recipe(first, *otherwise, **options), store=self.folder / "store")

    def recipe(
        self,
        first: Pass,
        *otherwise: Rung,
        items: int = 600,
        most: int | None = None,
        drop: float = 0.03,
        then: tuple[Pass, ...] = (),
        max_ratio: float | None = None,
        on_fail: Any = None,
    ) -> Recipe:
        passes = (Lower(), first, *then)
        size = None if max_ratio is None else SizeBudget(max_ratio=max_ratio)
        fallbacks = (Fallback(), Fallback(otherwise, on_fail), *(Fallback() for _ in then))
        return Recipe(
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

    def texts(self, count: int) -> Path:
        path = self.folder / f"{count}.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows((f"text {number}", LABELS[number % 3]) for number in range(count))
        return path
