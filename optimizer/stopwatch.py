"""Measure the speed of a recipe's finished models, against the reference artifact where a budget asks for it.

The reference artifact is the source lowered by the recipe's own chain without the passes that change weights, so that a
ratio shows what those gain, not what a better graph does. It is made once and kept in the store.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.exams import share_of_level
from optimizer.maker import Maker
from optimizer.package import GRAPH
from optimizer.recipe import Recipe, changes_weights
from optimizer.report import Reporter
from optimizer.speed import SpeedVerdict, Timing
from optimizer.speed_restarts import Setup, Start, Worker, measure
from passes._kind import kind_of, vocabulary_size
from passes.base import Model, PassError


@dataclass
class Stopwatch:
    """Measures models of one recipe.

    Attributes:
        source_key: names all that decided the source.
        start: starts a process that answers.
        judged: how many models were measured so far.
    """

    recipe: Recipe
    told: Reporter
    maker: Maker
    source_key: str
    start: Start = Worker
    judged: int = 0

    def judge(self, model: Model) -> tuple[tuple[SpeedVerdict, ...], Timing | None]:
        """Return what the speed gates say of a finished model, and the conditions; nothing where there are none.

        Where fallbacks may offer several models, each is measured at a part of the level, as on the items that judge.

        Raises:
            PassError: the source cannot be lowered.
            CannotRun: a process that measures ended.
        """
        gate, config = self.recipe.gate, self.maker.source.config
        if not gate.speeds:
            return (), None
        self.judged += 1
        share = share_of_level(self.judged, self.recipe.rungs)
        graphs = {"candidate": model.folder / GRAPH}
        if any(limit.is_ratio for limit in gate.speeds):
            graphs["reference"] = self.reference().folder / GRAPH
        with self.told.progress("measuring speed") as progress:
            return measure(
                gate.speeds,
                graphs,
                Setup(kind_of(config), vocabulary_size(config), gate.workload, self.maker.threads),
                alpha=share * gate.alpha,
                fail_alpha=share * (gate.fail_alpha or gate.alpha / len(gate.speeds)),
                progress=progress,
                start=self.start,
            )

    def reference(self) -> Model:
        """Return the reference artifact's model; a fusion that refuses it is left out, and told."""
        model, key = self.maker.source, self.source_key
        for index, each in enumerate(self.recipe.passes):
            if not changes_weights(type(each)):
                try:
                    model, entry = self.maker.make(each, index, model, key, f"reference: {each.name()}")
                    key = entry.key
                except PassError as refusal:
                    if each.reads != each.writes:
                        raise
                    self.told.line(f"the reference artifact goes without {each.name()}: {refusal}")
        return model
