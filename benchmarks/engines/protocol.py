"""How a benchmark talks with an engine's process: one JSON document per line, calls in, answers out.

    -> {"call": "read", "arguments": [[1, 2, 3]]}   <- {"wall_s": 0.12, "processor_s": 0.24, "result": null}
    -> {"call": "hold", "arguments": [8]}           <- ...
    -> {"call": "decode", "arguments": [32]}        <- {"wall_s": 0.61, ..., "result": [[5, 6, ...], ...]}

The first line out describes the engine. The seconds are those of the call itself, by the clock and of the processors of
all threads, taken in the engine's process. Standard library only: this file runs in the peers' environments too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself.

    Attributes:
        versions: of the libraries that compute.
        cache: type of the numbers in its cache of keys and values.
        cache_bits: of one of them, scales included.
        settings: what was chosen for it beside the number of threads.
    """

    versions: dict[str, str]
    cache: str
    cache_bits: float
    settings: str


class Engine(Protocol):
    """What an engine's process offers. It answers greedily and ignores end-of-sequence tokens."""

    def facts(self) -> Facts:
        """Describe the engine."""

    def read(self, prompt: list[int]) -> None:
        """Forget everything, read a prompt and choose its first new token."""

    def hold(self, sequences: int) -> bool:
        """Hold the prompt that was read in so many sequences, each in memory of its own, and nothing after it.

        An engine that cannot go back keeps what was added. False where it would take too long.
        """

    def decode(self, tokens: int) -> list[list[int]]:
        """Continue all sequences by so many tokens; return them, a row each."""


@dataclass(frozen=True)
class Limits:
    """How an engine is loaded.

    Attributes:
        threads: 0 for what the engine takes by itself.
        context: most tokens of a sequence.
        sequences: most of them at once.
        settings: words of the engine's own.
    """

    threads: int
    context: int
    sequences: int
    settings: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return the words that `serve` reads them from."""
        return [str(self.threads), str(self.context), str(self.sequences), *self.settings]


def serve(load: Callable[[Path, Limits], Engine]) -> None:
    """Answer calls until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for limit in ("threads", "context", "sequences"):
        parser.add_argument(limit, type=int)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    # Libraries print to standard output as they please: keep a copy for the answers and send the rest to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    limits = Limits(options.threads, options.context, options.sequences, tuple(options.settings))
    engine = load(options.model, limits)
    _send(answers.write, asdict(engine.facts()))
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        call = getattr(engine, request["call"])
        wall, processor = time.perf_counter(), time.process_time()
        result: Any = call(*request["arguments"])
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        _send(answers.write, {"wall_s": wall, "processor_s": processor, "result": result})
        answers.flush()


def _send(write: Callable[[str], object], document: object) -> None:
    write(json.dumps(document) + "\n")
