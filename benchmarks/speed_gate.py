"""How often the speed gate is wrong: on simulated machines, and on this one with a model against itself.

    python benchmarks/speed_gate.py --work DIR --decoder recipes/models/stdlib-llama --encoder FOLDER

All decisions are those of `optimizer.speed.decide`, the second look included. What is finished is kept in DIR, so a run
that was stopped goes on. `--part simulation` needs no quiet machine, `--part real` does.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from report import header, machine, say, table, versions, write_json
from speed_simulation import cells, rows, simulate

import optimizer
from optimizer.speed import Restart, SpeedLimit, decide
from optimizer.speed_restarts import PAIRS, Setup, Worker, take_turns
from runtime.artifact import verify
from runtime.bench import Workload
from runtime.threads import default_threads

ALPHA = 0.05
FASTER = 1.2
"""What a quantized form is asked to be, times the reference."""
DECODER_CHAIN = ("export_onnx", "fuse_gqa", "fuse_norm")
ENCODER_CHAIN = ("export_onnx", "fuse_attention", "fuse_embeddings", "fuse_norm")
INT4 = {"quantize_rtn": {"format": "int4", "group_size": 32}}
DECODER_FORMS: Mapping[str, Mapping[str, Any]] = {
    "int4": INT4,
    "int8": {"quantize_rtn": {"format": "int8", "group_size": 32}},
}
ENCODER_FORMS: Mapping[str, Mapping[str, Any]] = {"int4": INT4, "int8": {"quantize_int8": {}}}


@dataclass(frozen=True)
class Case:
    """Two artifacts and what is asked of the second.

    Attributes:
        limits: the thresholds.
        repeats: how many gates are run, each by itself.
    """

    name: str
    reference: Path
    candidate: Path
    limits: tuple[SpeedLimit, ...]
    repeats: int = 1


def built(source: Path, chain: Sequence[str], form: str, first: Sequence[Any], options: argparse.Namespace) -> Path:
    """Return the artifact of a model: `first`, then the chain."""
    name = f"{source.name}-{form}"
    recipe = {
        "name": name,
        "model": str(source.absolute()),
        "target": {"device": "cpu", "threads": options.threads},
        "passes": [*first, *chain],
    }
    path, folder = options.work / f"{name}.yaml", options.work / name
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    say(f"building {name}")
    optimizer.run(path, output=folder, store=options.work / "store")
    return folder


def comparisons(options: argparse.Namespace) -> Iterator[Case]:
    """Yield each model against itself, then its quantized forms against it."""
    models = (
        (options.decoder, DECODER_CHAIN, DECODER_FORMS, "decode_tokens_per_s"),
        (options.encoder, ENCODER_CHAIN, ENCODER_FORMS, "latency_ms"),
    )
    for source, chain, forms, metric in models:
        reference = built(source, chain, "float32", [], options)
        itself = (faster(metric, 1.05), faster(metric, 1.0))
        yield Case(f"{source.name} against itself", reference, reference, itself, options.gates)
        for form, quantization in forms.items():
            candidate = built(source, chain, form, [quantization], options)
            yield Case(f"{source.name} {form}", reference, candidate, (faster(metric, FASTER),))


def faster(metric: str, share: float) -> SpeedLimit:
    """Return the demand to be so many times as fast."""
    return SpeedLimit(metric, share if metric.endswith("_per_s") else 1 / share, is_ratio=True)


def gate(case: Case, number: int, workload: Workload, threads: int) -> dict[str, Any]:
    """Run one gate; return its verdicts, and all that was measured."""
    say(f"{case.name}: gate {number + 1} of {case.repeats}")
    manifest = verify(case.candidate)
    setup = Setup(manifest.kind, manifest.vocabulary, workload, threads)
    graphs = {"reference": case.reference / "model.onnx", "candidate": case.candidate / "model.onnx"}
    wanted, chance = tuple(dict.fromkeys(limit.metric for limit in case.limits)), random.Random(number)
    restarts: list[Restart] = []
    begin, load = time.perf_counter(), machine()["load"]

    def restart(_: int) -> Restart:
        restarts.append(take_turns(graphs, setup, wanted, chance, Worker))
        return restarts[-1]

    verdicts = decide(case.limits, restart, alpha=ALPHA, fail_alpha=ALPHA)
    return {
        "case": case.name,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "restarts": [asdict(one) for one in restarts],
        "load": load,
        "seconds": time.perf_counter() - begin,
    }


def simulations(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each gate said of each simulated machine."""
    found = []
    for seed, cell in enumerate(cells()):
        say(f"simulating {cell.machine}: {cell.gate}")
        place = options.work / "simulated" / f"{options.runs}-{seed}.json"
        found.append(kept(place, partial(simulate, cell, options.runs, seed)))
    return found


def measure(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Return the gates of each case."""
    workload = Workload(options.input_tokens, options.new_tokens)
    found = []
    for case in comparisons(options):
        slug = "".join(letter if letter.isalnum() else "-" for letter in case.name)
        asked = f"{options.threads}-{workload.input_tokens}-{workload.new_tokens}"
        found.append(
            [
                kept(
                    options.work / "gates" / f"{slug}-{asked}-{number}.json",
                    partial(gate, case, number, workload, options.threads),
                )
                for number in range(case.repeats)
            ]
        )
    return found


def real_rows(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return one line per case and threshold."""
    return [_row(gates, place) for gates in found for place in range(len(gates[0]["verdicts"]))]


def _row(gates: Sequence[Mapping[str, Any]], place: int) -> list[str]:
    """Return how often each outcome came, and the ratio: of several gates lowest to highest, of one its bounds."""
    verdicts = [one["verdicts"][place] for one in gates]
    said = [verdict["outcome"] for verdict in verdicts]
    first, ratios = verdicts[0], [verdict["estimate"] for verdict in verdicts]
    side = "at least" if first["metric"].endswith("_per_s") else "at most"
    low, high = (min(ratios), max(ratios)) if len(gates) > 1 else (first["lower"], first["upper"])
    return [
        f"{gates[0]['case']}: {first['metric']} {side} x{first['limit']:.3f}",
        " / ".join(str(said.count(outcome)) for outcome in ("pass", "inconclusive", "fail")),
        f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]",
        f"{np.mean([verdict['restarts'] for verdict in verdicts]):.1f}",
        f"{np.mean([one['seconds'] for one in gates]):.0f}",
    ]


def luck_of_starts(gates: Sequence[Mapping[str, Any]]) -> str:
    """Say how far starts differ: one-way analysis of variance of log ratios, restarts against pairs inside them."""
    metric = gates[0]["verdicts"][0]["metric"]
    between, within = [], []
    for one in gates:
        sides = [np.array([each[side][metric] for each in one["restarts"]]) for side in ("candidate", "reference")]
        logs = np.log(sides[0] / sides[1])  # [restarts, pairs]
        between.append(PAIRS * logs.mean(axis=1).var(ddof=1))
        within.append(logs.var(axis=1, ddof=1).mean())
    excess = (np.mean(between) - np.mean(within)) / PAIRS
    start = math.sqrt(max(0.0, excess) / 2)  # two processes differ
    return (
        f"{gates[0]['case']}, standard deviations: {100 * math.sqrt(np.mean(within)):.1f} % of the ratio of a pair, "
        f"{100 * start:.2f} % of what a process keeps from its start.\n"
    )


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is kept in a file, made and kept if it is not there."""
    if not path.is_file():
        found = make()
        write_json(path.with_suffix(".part"), found)
        path.with_suffix(".part").rename(path)
    kept_before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept_before


def main() -> None:
    """Simulate, measure, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts and results; reused")
    parser.add_argument("--part", choices=("simulation", "real", "both"), default="both")
    parser.add_argument("--runs", type=int, default=4000, help="simulated gates per cell")
    parser.add_argument("--decoder", type=Path, help="folder of a decoder")
    parser.add_argument("--encoder", type=Path, help="folder of an encoder")
    parser.add_argument("--gates", type=int, default=10, help="gates of a model against itself")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    if options.part != "simulation" and not (options.decoder and options.encoder):
        parser.error("--decoder and --encoder are needed, or --part simulation")
    options.work.mkdir(parents=True, exist_ok=True)
    about = machine() | {"threads": str(options.threads)}
    sections = []
    if options.part != "real":
        columns = ["simulated machine: gate", "faster, %", "slower, %", "found at +3 %", "at +5 %", "restarts"]
        sections += [f"### Simulated, {options.runs:,} gates per cell\n", table(columns, rows(simulations(options)))]
    if options.part != "simulation":
        found = measure(options)
        columns = ["measured", "pass / inconclusive / fail", "ratio", "restarts", "seconds"]
        lucks = [luck_of_starts(gates) for gates in found if len(gates) > 1]
        sections += ["### This machine\n", table(columns, real_rows(found)), *lucks]
    print(header("The speed gate", about, versions(("numpy", "onnxruntime"))))
    print("\n".join(sections))


if __name__ == "__main__":
    main()
