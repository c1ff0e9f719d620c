"""Do damages of single layers add up, and what does keeping the worst win back, beside keeping any others?

python benchmarks/sensitivity.py --work DIR --ranking TEXTS.jsonl

Additivity: on the texts that are scored, the sum of the damages of single layers beside the damage of all at once.
Recovery: layers are ranked on TEXTS.jsonl and scored on other texts, so that none is chosen by what judges it. Kept are
the N worst, the N worst by damage for each byte that the layer saves, or N drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import Spread, header, machine, say, table, versions, write_json

import optimizer
from optimizer.pipeline import damages
from optimizer.recipe_reader import load
from optimizer.record import Step
from optimizer.sensitivity import LayerDamage

ROOT = Path(__file__).parents[1]
PASS = "quantize_rtn"
FORMS: Mapping[str, Mapping[str, Any]] = {
    "int8 g32": {"format": "int8", "group_size": 32},
    "int4 g32": {"format": "int4", "group_size": 32},
    "int4 channel": {"format": "int4", "group_size": "channel"},
    "int2 g32": {"format": "int2", "group_size": 32},
}
WAYS = ("worst", "by byte", "random")


@dataclass(frozen=True)
class Kept:
    """The model with some layers kept.

    Attributes:
        count: how many.
        way: how they were chosen.
        bytes: size after the pass.
        loss: relative increase of perplexity.
        kl: from the source, in nats per token.
    """

    count: int
    way: str
    bytes: int
    loss: float
    kl: float


class Bench:
    """One model, the texts it is scored on and those that layers are ranked on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.store = options, options.work / "store"

    def scored(self, form: str, kept: Sequence[LayerDamage] = ()) -> tuple[Step, Step]:
        """Return the source and the model with some layers kept, on the texts that are scored."""
        layers = [name for layer in kept for name in layer.layers]
        overrides = [{"layers": layers, "format": self.options.keep}] if layers else []
        run = optimizer.run(self._recipe(form, self.options.texts, overrides), store=self.store, stop_after=PASS)
        return run.steps[0], run.steps[-1]

    def damaged(self, form: str, texts: Path, most: int) -> tuple[LayerDamage, ...]:
        """Return the damage of each layer alone on so many texts at most, the worst first."""
        return damages(load(self._recipe(form, texts)), items=most, store=self.store).layers

    def _recipe(self, form: str, texts: Path, overrides: Sequence[Mapping[str, Any]] = ()) -> Path:
        options = self.options
        task = {"data": "texts", "context": options.context}
        step = {**FORMS[form], "embedding": "int8", "lm_head": "int8", "overrides": overrides}
        content = {
            "name": "sensitivity",
            "model": str(options.model.absolute()),
            "target": {"device": "cpu", "threads": options.threads},
            "data": {"texts": {"json": str(texts.absolute())}},
            "evaluate": {"perplexity": {"task": "perplexity", **task}, "agreement": {"task": "agreement", **task}},
            "passes": [{PASS: step}, "export_onnx"],
        }
        path: Path = options.work / "recipe.yaml"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path


def additivity(bench: Bench, form: str) -> tuple[tuple[LayerDamage, ...], Kept]:
    """Return the damage of each layer alone and what all at once do, on the same texts."""
    say(f"additivity: {form}")
    return bench.damaged(form, bench.options.texts, 1_000_000), kept(bench, form, "worst", ())


def recovery(bench: Bench, form: str) -> Iterator[Kept]:
    """Yield the model with none, N and all layers kept, N chosen in each way."""
    options = bench.options
    layers = [layer for layer in bench.damaged(form, options.ranking, options.items) if layer.format != options.keep]
    by_byte = sorted(layers, key=lambda layer: -layer.damage / max(layer.saved_bytes, 1))
    draws = [random.Random(seed).sample(layers, len(layers)) for seed in range(options.draws)]
    ways = [("worst", layers), ("by byte", by_byte), *(("random", order) for order in draws)]
    yield kept(bench, form, "worst", ())
    for count in options.counts:
        for way, order in ways:
            yield kept(bench, form, way, order[:count])
    yield kept(bench, form, "worst", layers)


def kept(bench: Bench, form: str, way: str, layers: Sequence[LayerDamage]) -> Kept:
    """Score the model with these layers kept."""
    say(f"{form}: {len(layers)} kept, {way}")
    source, step = bench.scored(form, layers)
    before, after = (each.scores["perplexity/perplexity"] for each in (source, step))
    return Kept(len(layers), way, step.bytes, after / before - 1, step.scores["agreement/kl"])


def additivity_row(form: str, alone: Sequence[LayerDamage], whole: Kept) -> list[str]:
    """Return the row of one form."""
    total, worst = sum(layer.damage for layer in alone), alone[0]
    sums = [f"{total:.5f}", f"{whole.kl:.5f}", f"{total / whole.kl:.2f}"]
    share = f"`{' + '.join(worst.layers).removeprefix('model.layers.')}`, {worst.damage / total:.0%}"
    return [form, *sums, f"{100 * whole.loss:+.2f} %", f"{whole.bytes / 1e6:.2f}", share]


def recovery_rows(found: Sequence[Kept]) -> Iterator[list[str]]:
    """Yield one row for each number of layers kept: of random draws the median and the range."""
    for count in sorted({each.count for each in found}):
        cells = []
        for way in WAYS:
            some = [each for each in found if (each.count, each.way) == (count, way)]
            cells += cells_of(some, found[0].kl) if some else ["", "", ""]
        yield [str(count), *cells]


def cells_of(some: Sequence[Kept], whole: float) -> list[str]:
    """Return the share of the damage that is won back, the increase of perplexity and the size."""
    shares = Spread.of([100 * (1 - each.kl / whole) for each in some])
    spread = f" ({round(shares.low)} to {round(shares.high)})" if len(some) > 1 else ""
    loss, size = (Spread.of(values).median for values in ([each.loss for each in some], [each.bytes for each in some]))
    return [f"{round(shares.median)} %{spread}", f"{100 * loss:+.2f} %", f"{size / 1e6:.2f}"]


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for recipes and the store")
    parser.add_argument("--model", type=Path, default=ROOT / "recipes/models/stdlib-llama", help="folder of a decoder")
    parser.add_argument("--texts", type=Path, default=ROOT / "recipes/data/stdlib-heldout.jsonl", help="scored on")
    parser.add_argument("--ranking", type=Path, required=True, help="other texts, that layers are ranked on")
    parser.add_argument("--items", type=int, default=16, help="ranking texts, cut at --context tokens like the others")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--recover", nargs="*", default=["int4 channel", "int2 g32"], choices=list(FORMS))
    parser.add_argument("--keep", default="int8", choices=["int8", "int4", "float"])
    parser.add_argument("--counts", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--draws", type=int, default=5, help="random choices of each number of layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every number")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    about, bench = {**machine(), "model": options.model.name, "threads": str(options.threads)}, Bench(options)
    added = {form: additivity(bench, form) for form in FORMS}
    recovered = {form: list(recovery(bench, form)) for form in options.recover}
    libraries = versions(["torch", "transformers"])
    print(header("Damage of single layers: does it add up, and what does keeping the worst win back", about, libraries))
    print("Damage: KL from the source in nats per token, on the texts that are scored; loss: increase of perplexity.\n")
    columns = [
        "form",
        "sum of single layers",
        "all at once",
        "sum / all",
        "loss",
        "MB",
        "worst layer, share of the sum",
    ]
    print(table(columns, (additivity_row(form, *each) for form, each in added.items())))
    for form, found in recovered.items():
        print(
            f"{form}, layers kept in {options.keep}, chosen on {options.items} other texts: share of the damage that "
            "is won back, increase of perplexity, MB after the pass; of random draws the median.\n"
        )
        columns = ["kept", "worst", "loss", "MB", "worst by byte", "loss", "MB", f"random, {options.draws} draws"]
        print(table([*columns, "loss", "MB"], recovery_rows(found)))
    if options.json:
        alone = {
            form: {"alone": [asdict(layer) for layer in layers], "whole": asdict(whole)}
            for form, (layers, whole) in added.items()
        }
        recoveries = {form: [asdict(each) for each in found] for form, found in recovered.items()}
        write_json(options.json, {"additivity": alone, "recovery": recoveries})


if __name__ == "__main__":
    main()
