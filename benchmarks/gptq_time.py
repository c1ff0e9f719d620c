"""Time and memory of GPTQ: ours, GPTQModel and llm-compressor on one shape and the same texts, by turns.

    python benchmarks/gptq_time.py --work DIR --peers PEERS

Each runs in a fresh process and the environment that `quantization_quality.py --install` made. What a block costs does
not depend on the values, nor on how many blocks there are: the shape has random weights, the texts are random ids, and
few blocks stand for all. Counted is what lies between a model's folder and its quantized weights.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from quantization_quality import CELLS, QUANTIZERS, Quantizer, run
from quantizers.protocol import Job
from report import Spread, header, machine, say, table, versions, write_json
from shapes import SHAPES

BENCHMARKS = Path(__file__).resolve().parent
ENGINES = ("ours", "GPTQModel", "llm-compressor")
MEASURED = {"seconds": 1.0, "processor_s": 1.0, "peak_bytes": 2.0**-20}


def prepare(options: argparse.Namespace) -> tuple[Path, Path]:
    """Write the shape and its texts; return both."""
    source, texts = options.work / f"{options.shape}-{options.layers}", options.work / "ids.json"
    if not (source / "config.json").exists():
        writer = [sys.executable, BENCHMARKS / "shapes.py", options.shape, source, "--layers", str(options.layers)]
        subprocess.run(writer, check=True, stdout=subprocess.DEVNULL)
    drawn = random.Random(0)
    texts.write_text(json.dumps([[drawn.randrange(1000, 30_000) for _ in range(512)] for _ in range(options.texts)]))
    return source, texts


def measured(quantizer: Quantizer, source: Path, texts: Path, options: argparse.Namespace) -> dict[str, float]:
    """Quantize once and return what it took."""
    cell, out = next(cell for cell in CELLS if cell.name == "int4 g128"), options.work / "out"
    job = Job(
        str(source),
        "decoder",
        str(texts),
        "gptq",
        cell.format,
        cell.group,
        cell.symmetric,
        0,
        options.threads,
        str(out),
    )
    shutil.rmtree(out, ignore_errors=True)
    why = run(quantizer, [job], options)
    facts = json.loads((out / "facts.json").read_text()) if not why else {"failed": why}
    if "failed" in facts:
        raise SystemExit(f"{quantizer.name}: {facts['failed']}")
    return {name: facts[name] * factor for name, factor in MEASURED.items()}


def rows(found: dict[str, list[dict[str, float]]]) -> Iterator[list[str]]:
    """Yield a row for each engine, and what it takes for each of ours."""
    own = Spread.of([each["seconds"] for each in found["ours"]]).median
    for name, turns in found.items():
        spreads = [Spread.of([turn[key] for turn in turns]) for key in MEASURED]
        yield [name, *(spread.text(0) for spread in spreads), f"{spreads[0].median / own:.2f}"]


def main() -> None:
    """Measure by turns, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the shape and results")
    parser.add_argument("--peers", type=Path, required=True, help="folder of the engines' environments")
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--texts", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    options.work, options.peers, options.again = options.work.absolute(), options.peers.absolute(), True
    options.llama_python = options.openvino_python = None
    options.work.mkdir(parents=True, exist_ok=True)
    source, texts = prepare(options)
    chosen = [each for each in QUANTIZERS if each.name in options.engines]
    found: dict[str, list[dict[str, float]]] = {each.name: [] for each in chosen}
    for turn in range(options.rounds):
        for place in range(len(chosen)):
            quantizer = chosen[(place + turn) % len(chosen)]
            say(f"round {turn + 1}: {quantizer.name}")
            found[quantizer.name].append(measured(quantizer, source, texts, options))
    about = machine() | {
        "shape": f"{options.shape}, {options.layers} blocks, int4 g128, {options.texts} texts of 512 tokens",
        "threads": str(options.threads),
        "repetitions": f"{options.rounds}, engines taking turns; median (lowest to highest)",
    }
    print(header("GPTQ: time and memory", about, versions(("torch", "transformers"))))
    print(table(["quantizer", "seconds", "processor s", "peak MiB", "time / ours"], rows(found)))
    if options.json:
        write_json(options.json, {"about": about, "turns": found})


if __name__ == "__main__":
    main()
