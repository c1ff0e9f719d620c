"""Engines in processes of their own that take turns.

Within a round every engine has one turn, in an order that rotates from round to round, so that a busy minute of the
machine meets all alike. A ratio is formed within a round before its median is taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from engines.protocol import Facts, Limits
from report import Spread, say
from shapes import SHAPES, TOKENIZER_VOCABULARY, write_shape
from variants import BENCHMARKS, Missing, Setting, Variant, Weights, environment

REST_S = 0.05  # lets spinning worker threads of the engine before go to sleep
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Load:
    """What is measured.

    Attributes:
        contexts: tokens of the prompts.
        sequences: how many are decoded at once.
        new_tokens: of each, in a turn.
        threads: of each engine.
        rounds: turns of each engine.
        clock: which seconds count, "wall_s" or "processor_s"; the latter, with one thread, on a machine that is busy.
    """

    contexts: tuple[int, ...]
    sequences: tuple[int, ...]
    new_tokens: int
    threads: int
    rounds: int
    clock: str = "wall_s"

    def tokens(self, cell: Cell) -> int:
        """Return the new tokens of each sequence in a turn: fewer where they take longer."""
        shorter = (cell.context > 512) + (cell.sequences > 1)
        return max(self.new_tokens >> shorter, 2)


@dataclass(frozen=True)
class Cell:
    """One number of an engine: tokens per second of reading a prompt, or of decoding so many sequences after it."""

    context: int
    sequences: int = 0  # none: reading

    def __str__(self) -> str:
        return f"B={self.sequences} at {self.context}" if self.sequences else f"prefill {self.context}"


@dataclass(frozen=True)
class Measured:
    """One variant's tokens per second, a number for each round."""

    variant: Variant
    weights: Weights
    facts: Facts
    speeds: dict[Cell, list[float]] = field(default_factory=dict)


class Process:
    """An engine's process with its model loaded."""

    def __init__(self, variant: Variant, python: Path, weights: Weights, limits: Limits, log: Path, clock: str) -> None:
        self._clock = clock
        search = [BENCHMARKS, BENCHMARKS.parent] if variant.is_ours else [BENCHMARKS]
        self._label, self._log = variant.label, log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(python), "-m", f"engines.{variant.module}", str(weights.path), *limits.arguments()],
                env={**environment(*search), "OMP_NUM_THREADS": str(limits.threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.measured = Measured(variant, weights, Facts(**self._receive()))

    def call(self, name: str, *arguments: object) -> tuple[float, Any]:
        """Have the engine do something; return its seconds and result; raise Missing when the process has died."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._receive()
        return answer[self._clock], answer["result"]

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
            raise Missing(f"{self._label}: its process ended: {last}")
        return json.loads(line)


def measure(shape: str, setting: Setting, load: Load, wanted: Sequence[Variant]) -> tuple[list[Measured], list[str]]:
    """Measure one shape; return the results and what is missing. Ctrl-C ends it with the cells that are complete."""
    source = setting.work / "shapes" / shape
    write_shape(SHAPES[shape], source)
    processes, missing = _start(wanted, setting, load, source)
    try:
        for context in load.contexts:
            prompts = np.random.default_rng(context).integers(1, TOKENIZER_VOCABULARY, (load.rounds + 1, context))
            _measure_reading(processes, Cell(context), prompts.tolist())
            for sequences in load.sequences:
                _measure_decoding(processes, Cell(context, sequences), load)
    except KeyboardInterrupt:
        missing.append("what comes after the last column: it was interrupted")
    for process in processes:
        process.close()
    return [process.measured for process in processes], missing


def _measure_reading(processes: Sequence[Process], cell: Cell, prompts: Sequence[list[int]]) -> None:
    """Read a prompt in each round, and one before to warm up; the last one stays in the cache.

    Of engines that differ in their heads alone, which see one position of a prompt, one is timed.
    """
    timed: dict[tuple[object, ...], Process] = {}
    for process in processes:
        one = process.measured
        timed.setdefault((one.variant.module, one.variant.settings, one.weights.body), process)
        process.call("read", prompts[0])
    speeds: dict[Process, list[float]] = {process: [] for process in timed.values()}
    for index, turns in _rounds(list(speeds), len(prompts) - 1, cell):
        for process in turns:
            seconds, _ = process.call("read", prompts[index + 1])
            speeds[process].append(cell.context / seconds)
            time.sleep(REST_S)
    _keep(speeds, cell)


def _measure_decoding(processes: Sequence[Process], cell: Cell, load: Load) -> None:
    speeds: dict[Process, list[float]] = {p: [] for p in processes if _decode(p, cell, WARM_UP_TOKENS) is not None}
    for _, turns in _rounds(list(speeds), load.rounds, cell):
        for process in turns:
            speed = _decode(process, cell, load.tokens(cell))
            assert speed is not None
            speeds[process].append(speed)
            time.sleep(REST_S)
    _keep(speeds, cell)


def _decode(process: Process, cell: Cell, tokens: int) -> float | None:
    """Return tokens per second; None where the engine cannot hold so many sequences."""
    _, is_held = process.call("hold", cell.sequences)
    if not is_held:
        return None
    seconds, answers = process.call("decode", tokens)
    assert [len(row) for row in answers] == [tokens] * cell.sequences, process.measured.variant.label
    return cell.sequences * tokens / seconds


def _keep(speeds: dict[Process, list[float]], cell: Cell) -> None:
    for process, values in speeds.items():
        process.measured.speeds[cell] = values


def _rounds(processes: Sequence[Process], rounds: int, cell: Cell) -> Iterator[tuple[int, list[Process]]]:
    """Yield the number of each round and the order of its turns."""
    for index in range(rounds):
        first = index % max(len(processes), 1)
        yield index, [*processes[first:], *processes[:first]]
        say(f"{cell}: round {index + 1} of {rounds}, load {os.getloadavg()[0]:.1f}")


def _start(wanted: Sequence[Variant], setting: Setting, load: Load, source: Path) -> tuple[list[Process], list[str]]:
    processes, missing = [], []
    logs = setting.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    context = max(load.contexts) + (load.rounds + 1) * load.new_tokens
    for variant in wanted:
        say(f"{source.name}: preparing {variant.label}")
        try:
            python = variant.interpreter(setting)
            weights = variant.build(setting, source)
            limits = Limits(load.threads, context, max(load.sequences), variant.settings)
            log = logs / f"{source.name}-{variant.label.replace(' ', '-').replace(',', '')}.log"
            processes.append(Process(variant, python, weights, limits, log, load.clock))
        except Missing as reason:
            missing.append(str(reason))
            say(f"missing: {reason}")
    return processes, missing


def ratio(mine: Measured, peer: Measured, cell: Cell) -> Spread | None:
    """Return the spread of the rounds' ratios; None where either was not measured."""
    if cell not in mine.speeds or cell not in peer.speeds:
        return None
    return Spread.of([a / b for a, b in zip(mine.speeds[cell], peer.speeds[cell], strict=True)])
