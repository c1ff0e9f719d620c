"""Single-stream prefill and decode, ours and its peers side by side in one run.

Every engine answers the same prompts greedily, in a process and a Python environment of its own. Engines take turns
within a round, in an order that rotates from round to round, so that a busy minute of the machine meets all alike; a
ratio is formed within a round before its median is taken. Weights are random: speed does not depend on them.

    python benchmarks/decode.py --peers-python PEERS/bin/python --work DIR

`benchmarks/README.md` says how to make the peers' environments. A peer that is missing is named, and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engines.protocol import Answer
from report import Spread, header, machine, say, table, write_json
from shapes import SHAPES, TOKENIZER_VOCABULARY, write_shape
from variants import BENCHMARKS, Missing, Setting, Variant, Weights, environment, variants

REST_S = 0.2  # lets spinning worker threads of the engine before go to sleep


@dataclass(frozen=True)
class Load:
    """What each request asks for."""

    prompt_tokens: int
    new_tokens: int
    threads: int
    rounds: int


class Process:
    """An engine's process with its model loaded."""

    def __init__(self, variant: Variant, python: Path, weights: Weights, load: Load, log: Path) -> None:
        self.variant, self.weights = variant, weights
        command = [str(python), "-m", f"engines.{variant.module}", str(weights.path)]
        threads = str(load.threads if variant.sets_threads else 0)
        command += ["--threads", threads, "--context", str(load.prompt_tokens + load.new_tokens + 8)]
        search = [BENCHMARKS, BENCHMARKS.parent] if variant.is_ours else [BENCHMARKS]
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                env={**environment(*search), "OMP_NUM_THREADS": str(load.threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.versions: dict[str, str] = self._receive()

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Answer one request; raise Missing when the process has died."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return Answer(**self._receive())

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = (self._log.read_text().strip() or "no message").splitlines()[-1]
            raise Missing(f"{self.variant.label}: its process ended: {last}")
        return json.loads(line)


@dataclass(frozen=True)
class Measured:
    """One variant's answers, one per round."""

    variant: Variant
    weights: Weights
    versions: dict[str, str]
    prefill: list[float]
    decode: list[float]


def measure(shape: str, setting: Setting, load: Load, wanted: Sequence[Variant]) -> tuple[list[Measured], list[str]]:
    """Measure one shape; return the results and what is missing."""
    source = setting.work / "shapes" / shape
    write_shape(SHAPES[shape], source)
    processes, missing = _start(wanted, setting, load, source)
    answers: dict[str, list[Answer]] = {process.variant.label: [] for process in processes}
    random = np.random.default_rng(0)
    for index in range(-1, load.rounds):  # round -1 warms up
        prompt = random.integers(1, TOKENIZER_VOCABULARY, load.prompt_tokens).tolist()
        first = index % max(len(processes), 1)
        for process in processes[first:] + processes[:first]:
            answer = process.generate(prompt, load.new_tokens)
            assert len(answer.tokens) == load.new_tokens, process.variant.label
            if index >= 0:
                answers[process.variant.label].append(answer)
            time.sleep(REST_S)
        say(f"{shape}: round {index + 1} of {load.rounds}, load {os.getloadavg()[0]:.1f}")
    results = []
    for process in processes:
        process.close()
        given = answers[process.variant.label]
        prefill = [load.prompt_tokens / answer.prefill_s for answer in given]
        decode = [(load.new_tokens - 1) / answer.decode_s for answer in given]
        results.append(Measured(process.variant, process.weights, process.versions, prefill, decode))
    return results, missing


def _start(wanted: Sequence[Variant], setting: Setting, load: Load, source: Path) -> tuple[list[Process], list[str]]:
    processes, missing = [], []
    logs = setting.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for variant in wanted:
        say(f"{source.name}: preparing {variant.label}")
        try:
            python = variant.interpreter(setting)
            weights = variant.build(setting, source)
            log = logs / f"{source.name}-{variant.label.replace(' ', '-').replace(',', '')}.log"
            processes.append(Process(variant, python, weights, load, log))
        except Missing as reason:
            missing.append(str(reason))
            say(f"missing: {reason}")
    return processes, missing


def speed_table(results: Sequence[Measured]) -> str:
    """Return the absolute numbers: median (lowest to highest) of the rounds."""
    columns = ["engine", "blocks", "head", "MB", "prefill tokens/s", "decode tokens/s"]
    rows = [
        [
            one.variant.label,
            one.weights.body,
            one.weights.head,
            f"{one.weights.size_bytes / 1e6:.0f}",
            Spread.of(one.prefill).text(0),
            Spread.of(one.decode).text(1),
        ]
        for one in results
    ]
    return table(columns, rows)


def ratios(results: Sequence[Measured]) -> list[tuple[str, str, Spread, Spread]]:
    """Return (ours, peer, prefill ratio, decode ratio) for every pair, formed round by round."""
    return [
        (
            mine.variant.label,
            peer.variant.label,
            Spread.of([a / b for a, b in zip(mine.prefill, peer.prefill, strict=True)]),
            Spread.of([a / b for a, b in zip(mine.decode, peer.decode, strict=True)]),
        )
        for mine in results
        if mine.variant.is_ours
        for peer in results
        if not peer.variant.is_ours
    ]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shapes and models; reused")
    parser.add_argument("--peers-python", type=Path, help="interpreter with onnxruntime-genai and llama-cpp-python")
    parser.add_argument("--openvino-python", type=Path, help="interpreter with openvino and optimum-intel")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-135m", "qwen2.5-0.5b"])
    parser.add_argument("--only", nargs="+", default=[], help="engines whose label contains one of these words")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    return parser.parse_args()


def main() -> None:
    """Measure, print Markdown, write JSON."""
    options = parse_options()
    # Made absolute, never resolved: a virtual environment's interpreter is a link, and following it leaves it.
    pythons = [python and python.absolute() for python in (options.peers_python, options.openvino_python)]
    setting = Setting(options.work.absolute(), *pythons)
    load = Load(options.prompt_tokens, options.new_tokens, options.threads, options.rounds)
    wanted = [v for v in variants() if not options.only or any(word in v.label for word in options.only)]
    about = machine() | {
        "load per request": f"prompt {load.prompt_tokens}, {load.new_tokens} new tokens, greedy, one sequence",
        "threads": str(load.threads),
        "repetitions": f"{load.rounds} rounds, engines taking turns; median (lowest to highest)",
    }
    sections, document = [], []
    libraries: dict[str, str] = {}
    for shape in options.shapes:
        results, missing = measure(shape, setting, load, wanted)
        for one in results:
            libraries |= one.versions
        sections += [f"### {shape}\n", speed_table(results)]
        pairs = [[a, b, prefill.text(2), decode.text(2)] for a, b, prefill, decode in ratios(results)]
        if pairs:
            sections.append(table(["ours", "peer", "prefill, ours / peer", "decode, ours / peer"], pairs))
        sections += [f"Missing: {reason}\n" for reason in missing]
        document.append({"shape": shape, "missing": missing, "engines": [_record(one) for one in results]})
    features = libraries.pop("llama.cpp built with", None)
    if features:
        about["llama.cpp built with"] = features
    print(header("Single-stream prefill and decode", about, libraries))
    print("\n".join(sections))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "load": asdict(load), "shapes": document})


def _record(one: Measured) -> dict[str, object]:
    weights = {"body": one.weights.body, "head": one.weights.head, "bytes": one.weights.size_bytes}
    speeds = {"prefill_tokens_per_s": one.prefill, "decode_tokens_per_s": one.decode}
    return {"engine": one.variant.label, "weights": weights, "versions": one.versions, **speeds}


if __name__ == "__main__":
    main()
