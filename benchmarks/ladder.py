"""A ladder on a real model: a first rung that is over budget, layers kept in another format, certify's last word.

python benchmarks/ladder.py --work DIR --documents HELDOUT.jsonl

`optimizer.run` climbs the recipe that is printed. Whether it matters *which* layers are kept is looked at afterwards,
on the documents that judged: as many other layers, drawn at random. Nothing is chosen by that.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from report import header, machine, say, table, versions, write_json

import optimizer
from optimizer.evaluate.items import Item
from optimizer.evaluate.parts import halves
from optimizer.pipeline import damages
from optimizer.recipe import Keep, rung_text
from optimizer.recipe_reader import load
from optimizer.record import Run, Step
from optimizer.report import loss_texts, openings_text, score_text, size_text
from optimizer.sensitivity import LayerDamage

ROOT = Path(__file__).parents[1]
PASS = "quantize_rtn"
LOSS = "loss [one-sided 95 % bounds]"
RECIPE = """\
name: ladder
model: {model}
target: {{device: cpu, threads: {threads}}}
data:
  held_out: {{json: {documents}, text: text}}
evaluate:
  perplexity: {{task: perplexity, data: held_out, context: 512}}
gate:
  alpha: 0.05
  perplexity: {{max_increase: {budget}}}
  size: {{max_ratio: 0.40}}
passes:
  - quantize_rtn: {{format: int4, group_size: channel, embedding: int8, lm_head: int8}}
{otherwise}  - export_onnx
  - fuse_gqa
  - fuse_norm
"""


class Bench:
    """The ladder's recipe, and its first pass with any layers kept on the documents that judge."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.store = options, options.work / "store"
        rungs = "".join(f"      - keep: {{worst: {count}, format: int8}}\n" for count in options.worst)
        self.otherwise = f"    otherwise:\n{rungs}"
        self.path = self._write("ladder.yaml", options.documents.absolute(), self.otherwise)
        self.recipe = load(self.path)

    def told(self) -> str:
        """Return the recipe with paths cut to names."""
        options = self.options
        return self._text(options.model.name, options.documents.name, self.otherwise)

    def climb(self) -> Run:
        """Run the recipe, as `optimize ladder.yaml` does."""
        return optimizer.run(self.path, output=self.options.work / "artifact", store=self.store)

    def ranked(self) -> tuple[LayerDamage, ...]:
        """Return the layers that a rung may keep, in its order."""
        return tuple(layer for layer in damages(self.recipe, store=self.store).layers if layer.format != "int8")

    def certified(self, kept: Sequence[LayerDamage]) -> Step:
        """Score the pass with some layers kept on the documents that judge; of the ladder's own openings it is none."""
        path = self._write("certify.yaml", self._judging(), "")
        layers = [name for layer in kept for name in layer.layers]
        overrides = json.dumps([{"layers": layers, "format": "int8"}] if layers else [])
        run = optimizer.run(path, [f"passes.0.overrides={overrides}"], store=self.store, stop_after=PASS)
        return run.steps[-1]

    def _judging(self) -> Path:
        """Write the documents that certify has to a file of their own."""
        lines = self.options.documents.read_text(encoding="utf-8").splitlines(keepends=True)
        _, judging = halves([Item((), str(number)) for number in range(len(lines))])
        path: Path = self.options.work / "certify.jsonl"
        path.write_text("".join(lines[int(item.group)] for item in judging), encoding="utf-8")
        return path.absolute()

    def _write(self, name: str, documents: Path, otherwise: str) -> Path:
        path: Path = self.options.work / name
        path.write_text(self._text(self.options.model.absolute(), documents, otherwise), encoding="utf-8")
        return path

    def _text(self, model: Path | str, documents: Path | str, otherwise: str) -> str:
        chosen = {"threads": self.options.threads, "budget": self.options.budget, "otherwise": otherwise}
        return RECIPE.format(model=model, documents=documents, **chosen)


def found(step: Step) -> str:
    """Return what the gate says of a step's perplexity: loss, bounds, verdict."""
    verdict = step.gates[0].verdict
    loss, bounds, _ = loss_texts(verdict)
    return f"{loss} {bounds}: {verdict.outcome}"


def rung_rows(bench: Bench, run: Run) -> Iterator[list[str]]:
    """Yield each rung that was tried: what the documents that choose say, what became of it, its size."""
    rungs = bench.recipe.fallback(0).otherwise
    names = [f"{PASS} alone", *map(rung_text, rungs)]
    for rejected in run.rejected:
        yield [names[rejected.step.rung], found(rejected.step), rejected.reason, f"{rejected.step.bytes / 1e6:.2f}"]
    step = run.steps[1]
    yield [names[step.rung], found(step), "went on", f"{step.bytes / 1e6:.2f}"]


def layer_rows(kept: Sequence[LayerDamage], layers: Sequence[LayerDamage]) -> Iterator[list[str]]:
    """Yield each layer that is kept, its damage alone with bounds, and its share of all damages."""
    total = sum(layer.damage for layer in layers)
    for layer in kept:
        bounds = f"{1e3 * layer.damage:.3f} [{1e3 * layer.low:.3f}, {1e3 * layer.high:.3f}]"
        yield [f"`{' + '.join(layer.layers)}`", bounds, f"{layer.damage / total:.1%}", f"{layer.saved_bytes / 1e6:.2f}"]


def climbed(bench: Bench, run: Run, layers: Sequence[LayerDamage], kept: Sequence[LayerDamage]) -> Iterator[str]:
    """Yield what became of the recipe, in Markdown."""
    yield f"```yaml\n{bench.told()}```\n"
    chose = run.steps[1].gates[0].verdict.n_items
    yield f"The rungs, on the {chose} documents that choose; budget {bench.options.budget}.\n"
    yield table(["rung", LOSS, "what became of it", "MB"], rung_rows(bench, run))
    yield (
        f"Kept in int8: {len(kept)} of the {len(layers)} layers that are not int8 already. Damage: KL from the source "
        "in 1/1000 nats per token, one-sided 95 % bounds.\n"
    )
    yield table(["layer", "damage alone", "share of all", "MB saved by int4"], layer_rows(kept, layers))
    for gate in run.certified:
        yield f"- {score_text(gate)}; {gate.verdict.n_items} documents, level {100 * gate.verdict.alpha:g} %"
    if run.size:
        yield f"- {size_text(run.size)}"
    yield from (f"- {openings_text(opening)}" for opening in run.openings)
    yield f"- exit code {int(run.exit_code)}, artifact {'made' if run.artifact else 'not made'}\n"


def compared(scored: Sequence[tuple[str, Step]]) -> Iterator[str]:
    """Yield what the documents that judge say of each choice of layers: none, the worst, random ones."""
    yield "The pass with other layers kept, before export, on the documents that judge; level 5 %.\n"
    yield table(["kept", LOSS, "MB"], ([name, found(step), f"{step.bytes / 1e6:.2f}"] for name, step in scored))
    worst, *draws = (step.gates[0].verdict for _, step in scored[1:])
    better = sum(draw.difference < worst.difference for draw in draws)
    passed = sum(draw.outcome == "pass" for draw in draws)
    yield f"Of {len(draws)} draws {better} lose less than the worst layers do, {passed} pass."


def main() -> None:
    """Climb, compare, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for recipes, the artifact and the store")
    parser.add_argument("--model", type=Path, default=ROOT / "recipes/models/stdlib-llama", help="folder of a decoder")
    parser.add_argument("--documents", type=Path, required=True, help="JSON lines that choose and judge")
    parser.add_argument("--budget", default="1%", help="increase of perplexity that is allowed")
    parser.add_argument("--worst", type=int, nargs="+", default=[4, 8, 16], help="layers that the rungs keep")
    parser.add_argument("--draws", type=int, default=10, help="random choices of as many layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every number")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "model": options.model.name, "threads": str(options.threads)}
    bench = Bench(options)
    say("climbing")
    run, layers = bench.climb(), bench.ranked()
    chosen = bench.recipe.fallback(0).otherwise[run.steps[1].rung - 1] if run.steps[1].rung else None
    kept = layers[: chosen.worst] if isinstance(chosen, Keep) else ()
    choices = [("none", ()), (f"the {len(kept)} worst", kept)]
    choices += [
        (f"random, draw {seed}", random.Random(seed).sample(layers, len(kept))) for seed in range(options.draws)
    ]
    scored = []
    for name, some in choices:
        say(name)
        scored.append((name, bench.certified(some)))
    libraries = versions(["torch", "onnxruntime"])
    print(header("A ladder: a rung over budget, the worst layers kept, certify", about, libraries))
    print("\n".join([*climbed(bench, run, layers, kept), *compared(scored)]))
    if options.json:
        ranked, steps = [asdict(layer) for layer in layers], {name: asdict(step) for name, step in scored}
        write_json(options.json, {"run": json.loads(run.to_json()), "layers": ranked, "scored": steps})


if __name__ == "__main__":
    main()
