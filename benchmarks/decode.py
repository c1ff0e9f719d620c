"""Prefill and decode, ours and its peers side by side in one run: contexts, one sequence and several at once.

Every engine reads the same prompts and answers greedily, in a process and a Python environment of its own, taking turns
(`turns.py`). Weights are random: speed does not depend on them. Two tables for each shape: all heads in 8 bits, and the
smallest form of each.

    python benchmarks/decode.py --peers-python PEERS/bin/python --openvino-python OV/bin/python --work DIR

`benchmarks/README.md` says how to make the peers' environments. A peer that is missing is named, and left out.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from report import Spread, header, machine, table, write_json
from shapes import SHAPES, Shape
from turns import Cell, Load, Measured, measure, ratio
from variants import BEST, EQUAL, Setting, variants


def engine_table(results: Sequence[Measured]) -> str:
    """Return what each engine was given and how it was set."""
    columns = ["engine", "blocks", "head", "MB", "MB of a pass", "cache", "settings"]
    rows = [
        [
            one.variant.label,
            one.weights.body,
            one.weights.head,
            f"{one.weights.size_bytes / 1e6:.0f}",
            f"{one.weights.step_bytes / 1e6:.0f}",
            one.facts.cache,
            one.facts.settings,
        ]
        for one in results
    ]
    return table(columns, rows)


def speed_table(results: Sequence[Measured], cells: Sequence[Cell]) -> str:
    """Return the tokens per second of all sequences together: median (lowest to highest) of the rounds."""
    rows = [
        [one.variant.label, *(Spread.of(one.speeds[cell]).text(0) if cell in one.speeds else "" for cell in cells)]
        for one in results
    ]
    return table(["tokens/s", *map(str, cells)], rows)


def ratio_table(results: Sequence[Measured], cells: Sequence[Cell]) -> str:
    """Return ours to each peer, formed round by round; of a peer's settings, its best in each cell."""
    rows = [
        [f"{mine.variant.label} / {name}", *(_best_ratio(mine, peers, cell) for cell in cells)]
        for mine in results
        if mine.variant.is_ours
        for name, peers in _peers(results).items()
    ]
    return table(["ours / peer", *map(str, cells)], rows)


def _best_ratio(mine: Measured, peers: Sequence[Measured], cell: Cell) -> str:
    best = max(peers, key=lambda peer: Spread.of(peer.speeds.get(cell, [0.0])).median)
    spread = ratio(mine, best, cell)
    return spread.text(2) if spread else ""


def _peers(results: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Return the peers, those that differ in their settings alone together."""
    peers: dict[str, list[Measured]] = {}
    for one in results:
        if not one.variant.is_ours:
            peers.setdefault(one.variant.weights_label, []).append(one)
    return peers


def traffic_table(shape: Shape, results: Sequence[Measured], cells: Sequence[Cell]) -> str:
    """Return the megabytes that are read for one token: weights, shared by the sequences, and its own cache."""
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_width  # of a token in the cache

    def megabytes(one: Measured, cell: Cell) -> float:
        cache = cell.context * numbers * one.facts.cache_bits / 8
        return (one.weights.step_bytes / cell.sequences + cache) / 1e6

    rows = [[one.variant.label, *(f"{megabytes(one, cell):.0f}" for cell in cells)] for one in results]
    return table(["MB read per token", *map(str, cells)], rows)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shapes and models; reused")
    parser.add_argument("--peers-python", type=Path, help="interpreter with onnxruntime-genai and llama-cpp-python")
    parser.add_argument("--openvino-python", type=Path, help="interpreter with openvino and optimum-intel")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-135m", "qwen2.5-0.5b"])
    parser.add_argument("--only", nargs="+", default=[], help="engines whose label contains one of these words")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096], help="tokens of the prompts")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8], help="decoded at once")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="in a turn; half of it for several, and for long ones"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="the machine is: one thread, its processor's seconds")
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    return parser.parse_args()


def main() -> None:
    """Measure, print Markdown, write JSON."""
    options = parse_options()
    # Made absolute, never resolved: a virtual environment's interpreter is a link, and following it leaves it.
    pythons = [python and python.absolute() for python in (options.peers_python, options.openvino_python)]
    setting = Setting(options.work.absolute(), *pythons)
    load = Load(tuple(options.contexts), tuple(options.sequences), options.new_tokens, options.threads, options.rounds)
    if options.busy:
        load = replace(load, threads=1, clock="processor_s")
    wanted = [v for v in variants() if not options.only or any(word in v.label for word in options.only)]
    reading = [Cell(context) for context in load.contexts]
    decoding = [Cell(context, sequences) for sequences in load.sequences for context in load.contexts]
    tokens = ", ".join(f"{load.tokens(cell)} ({cell})" for cell in decoding)
    about = machine() | {
        "new tokens of each sequence in a turn": tokens,
        "threads": str(load.threads) + (", processor's seconds, not those of the clock" if options.busy else ""),
        "repetitions": f"{load.rounds} rounds, engines taking turns; median (lowest to highest)",
    }
    sections, document = [], []
    libraries: dict[str, str] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in options.shapes:
        results, missing = measure(name, setting, load, wanted)
        for one in results:
            libraries |= one.facts.versions
        sections += [f"### {name}\n", engine_table(results)]
        for title in (EQUAL, BEST):
            chosen = [one for one in results if title in one.variant.tables]
            cells = [*reading, *decoding] if any(cell in one.speeds for one in chosen for cell in reading) else decoding
            sections += [f"#### {name}, {title}\n", speed_table(chosen, cells), ratio_table(chosen, cells)]
        sections += [f"#### {name}, traffic\n", traffic_table(SHAPES[name], results, decoding)]
        sections += [f"Missing: {reason}\n" for reason in missing]
        document.append({"shape": name, "missing": missing, "engines": [_record(one) for one in results]})
    features = libraries.pop("llama.cpp built with", None)
    if features:
        about["llama.cpp built with"] = features
    print(header("Prefill and decode", about, libraries))
    print("\n".join(sections))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "load": asdict(load), "shapes": document})


def _record(one: Measured) -> dict[str, object]:
    weights = {key: value for key, value in asdict(one.weights).items() if key != "path"}
    speeds = {str(cell): values for cell, values in one.speeds.items()}
    return {"engine": one.variant.label, "weights": weights, "facts": asdict(one.facts), "tokens_per_s": speeds}


if __name__ == "__main__":
    main()
