"""How `decode.py` talks with an engine's process: one JSON document per line, requests in, answers out.

    -> {"prompt": [1, 2, 3], "new_tokens": 64}
    <- {"prefill_s": 0.12, "decode_s": 0.61, "tokens": [5, 6, ...]}

The first line out describes the engine. Standard library only: this file runs in the peers' environments too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Answer:
    """One request answered greedily, end-of-sequence tokens ignored.

    Attributes:
        prefill_s: from the prompt to its first new token.
        decode_s: from the first new token to the last.
        tokens: all new tokens.
    """

    prefill_s: float
    decode_s: float
    tokens: list[int]


class Engine(Protocol):
    """What an engine's process offers."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that compute."""

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        """Continue the prompt by exactly `new_tokens` tokens."""


def serve(load: Callable[[Path, int, int], Engine]) -> None:
    """Answer requests until the input ends; `load` takes (model, threads, context in tokens)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True, help="0: what the engine takes by itself")
    parser.add_argument("--context", type=int, required=True)
    options = parser.parse_args()
    # Libraries print to standard output as they please: keep a copy for the answers and send the rest to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = load(options.model, options.threads, options.context)
    _send(answers.write, engine.versions())
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        _send(answers.write, asdict(engine.generate(request["prompt"], request["new_tokens"])))
        answers.flush()


def _send(write: Callable[[str], object], document: object) -> None:
    write(json.dumps(document) + "\n")
