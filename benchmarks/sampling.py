"""Milliseconds of choosing the tokens of a batch, beside what most programs do, and beside the step that gives logits.

Logits are made up, for those of random weights are flat: -a ln(rank) + noise over ids in a random order, a = 2.5 as of
a model that is sure of its next word, a = 1.5 as of one that is not. All sides choose from the same logits, each in
every round, at another position every time. `sort` is the usual way in numpy: softmax, sort, cumulative sum, one
uniform number per row. With an artifact, a decode of as many rows is timed in every round as well, and what is chosen
from is as wide as its vocabulary.

    python benchmarks/sampling.py [ARTIFACT]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import Spread, header, machine, say, table, versions, write_json

from runtime.artifact import verify
from runtime.generation import open_decoder
from runtime.logprobs import token_logprobs
from runtime.sampler import Draw, SamplingParams, TokenCounts, choose
from runtime.threads import default_threads

STEP = "a decode step"
REST_S = 0.2  # lets spinning worker threads of the step go to sleep
Logits = NDArray[np.float32]
Times = dict[str, list[float]]
SEEN = 1000
OURS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8},
    "+ top_k 50": {"temperature": 0.8, "top_k": 50},
    "+ top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "+ min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "+ all three": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    f"+ penalties of {SEEN} ids": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5},
}


def made_up(rows: int, vocabulary: int, slope: float) -> Logits:
    """Return logits `[rows, vocabulary]` as the module says."""
    chance = np.random.default_rng(0)
    ranks = np.stack([chance.permutation(vocabulary) + 1 for _ in range(rows)])
    return (-slope * np.log(ranks) + 0.5 * chance.standard_normal(ranks.shape)).astype(np.float32)


def ours(logits: Logits, options: dict[str, Any], likeliest: int | None = None) -> Callable[[int], object]:
    """Return what chooses all rows at a position, and their logprobs where `likeliest` is given."""
    counts = TokenCounts(np.arange(SEEN))
    params = [SamplingParams(seed=seed, **options) for seed in range(len(logits))]

    def run(position: int) -> object:
        tokens = choose(logits, [Draw(each, position, counts) for each in params])
        if likeliest is None:
            return tokens
        return [token_logprobs(row[None], [int(token)], likeliest) for row, token in zip(logits, tokens, strict=True)]

    return run


def sort(logits: Logits, temperature: float, top_p: float) -> Callable[[int], object]:
    """Return the usual way: the whole vocabulary is sorted."""

    def run(position: int) -> object:
        order = np.argsort(-logits, axis=1)
        weights = np.exp((np.take_along_axis(logits, order, 1) - logits.max(axis=1, keepdims=True)) / temperature)
        masses = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
        kept = np.minimum(masses, top_p)
        at = (kept < np.random.default_rng(position).random((len(logits), 1)) * top_p).sum(axis=1)
        return order[np.arange(len(logits)), at]

    return run


def decode(artifact: Path, rows: int, past: int, threads: int) -> Callable[[int], object]:
    """Return what runs one token in each of so many rows after `past` others."""
    session = open_decoder(artifact, verify(artifact), threads, past + 1, rows)
    for slot in range(rows):
        session.run(np.arange(past) + 100, slot=slot, rows=[past - 1])
    return lambda position: session.decode([position % 1000] * rows, [past] * rows)


def all_sides(logits: Logits) -> Iterator[tuple[str, Callable[[int], object]]]:
    """Yield what is measured on these logits, by name."""
    for name, options in OURS.items():
        yield name, ours(logits, options)
    for likeliest in (0, 5, 20):
        yield f"temperature 0.8, logprobs {likeliest}", ours(logits, OURS["temperature 0.8"], likeliest)
    yield "sort, temperature 0.8, top_p 0.95", sort(logits, 0.8, 0.95)


def measure(sides: dict[str, Callable[[int], object]], rounds: int) -> tuple[Times, Times]:
    """Return the milliseconds of each side, one per round: by the clock on the wall, and of the processor."""
    wall: Times = {name: [] for name in sides}
    processor: Times = {name: [] for name in sides}
    for index in range(-2, rounds):  # two rounds warm up
        for name, run in sides.items():
            begin = time.perf_counter(), time.process_time()
            run(index + 2)
            end = time.perf_counter(), time.process_time()
            if index >= 0:
                wall[name].append(1e3 * (end[0] - begin[0]))
                processor[name].append(1e3 * (end[1] - begin[1]))
            if name == STEP:
                time.sleep(REST_S)
        say(f"round {index + 1} of {rounds}")
    return wall, processor


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?", help="a decoder whose step is timed beside")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=151936, help="without an artifact")
    parser.add_argument("--past", type=int, default=128, help="tokens before each row of the step")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of the step; choosing takes one")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    vocabulary, sides = options.vocabulary, {}
    about = machine()
    if options.artifact:
        vocabulary = verify(options.artifact).vocabulary
        sides[STEP] = decode(options.artifact, options.rows, options.past, options.threads)
        rows = f"{options.rows} rows after {options.past} tokens"
        about |= {"step": f"{options.artifact.name}, {rows}, {options.threads} threads"}
    for label, slope in (("sure", 2.5), ("unsure", 1.5)):
        sides |= {f"{label}: {name}": run for name, run in all_sides(made_up(options.rows, vocabulary, slope))}
    wall, processor = measure(sides, options.rounds)
    about |= {
        "logits": f"{options.rows} x {vocabulary}; sure: a = 2.5, unsure: a = 1.5",
        "repetitions": f"{options.rounds} rounds, sides taking turns; median (lowest to highest)",
        "of the step": "processor time, of which the step spends some on each of its threads at once",
    }
    libraries = versions(("onnxruntime", "numpy"))
    print(header("Sampling", about, libraries))
    rows = []
    for name in sides:
        took, share = Spread.of(processor[name]), ""
        if STEP in sides and name != STEP:
            share = f"{100 * took.median / (Spread.of(processor[STEP]).median / options.threads):.1f} %"
        rows.append([name, Spread.of(wall[name]).text(2), took.text(2), share])
    print(table(["", "ms", "processor ms", "of the step"], rows))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "ms": wall, "processor_ms": processor})


if __name__ == "__main__":
    main()
