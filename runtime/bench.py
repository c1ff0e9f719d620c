"""How fast a graph answers, measured in a process of its own.

    python -m runtime.bench DIR                       an artifact's speed, for people
    python -m runtime.bench GRAPH --serve KIND ...    answers requests on standard input, for programs

A program sends one JSON object per line and gets one back, so that two processes can take turns on one machine:

    -> {"ids": [[1, 2, 3]], "new_tokens": 32, "at_least_s": 0.05}
    <- {"first_s": [0.012], "rest_s": [0.31]}

The first line out says that the graph is loaded. Token ids come from outside, and end-of-sequence tokens are ignored:
the work is the same whatever the model answers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final, TextIO

from runtime.artifact import verify
from runtime.errors import PromptError, ServingError
from runtime.pace import prefill_chunks
from runtime.sampler import GREEDY, sample
from runtime.session import DecoderSession, EncoderSession, pad_id

DECODER_METRICS: Final = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "latency_ms")
ENCODER_METRICS: Final = ("texts_per_s", "latency_ms")
METRICS: Final = tuple(dict.fromkeys((*DECODER_METRICS, *ENCODER_METRICS)))
TURN_S: Final = 0.05
"""A request is repeated for so long: a few milliseconds alone say more about a cold cache than about a model."""


@dataclass(frozen=True)
class Workload:
    """What is asked of a model.

    Attributes:
        input_tokens: of a prompt, or of each text.
        new_tokens: that a decoder generates.
        batch: texts that an encoder reads at once, for `texts_per_s`; `latency_ms` is always that of one.
    """

    input_tokens: int = field(default=128, metadata={"help": "tokens of a prompt, or of each text", "ge": 1})
    new_tokens: int = field(default=32, metadata={"help": "tokens that a decoder generates", "ge": 2})
    batch: int = field(default=8, metadata={"help": "texts an encoder reads at once, for texts_per_s", "ge": 1})

    def generated(self, kind: str) -> int:
        """Return the tokens that a model of this kind generates: none if it is no decoder."""
        return self.new_tokens if kind == "decoder" else 0

    def tokens(self, kind: str) -> int:
        """Return the most tokens of one sequence."""
        return self.input_tokens + self.generated(kind)

    def texts_at_once(self, kind: str) -> int:
        """Return the texts of one request: one if the model is a decoder."""
        return 1 if kind == "decoder" else self.batch

    def texts(self, kind: str, vocabulary: int, chance: random.Random) -> list[list[int]]:
        """Draw the token ids of a request; speed does not depend on which they are."""
        return [chance.choices(range(vocabulary), k=self.input_tokens) for _ in range(self.texts_at_once(kind))]


@dataclass(frozen=True)
class Request:
    """What is asked once, or again and again until `at_least_s` seconds have passed.

    Attributes:
        ids: token ids [B][T]; a decoder takes one sequence.
        new_tokens: tokens to generate, at least 2; 0 for an encoder.
    """

    ids: Sequence[Sequence[int]]
    new_tokens: int = 0
    at_least_s: float = 0.0


@dataclass(frozen=True)
class Answer:
    """Seconds of each repetition.

    Attributes:
        first_s: from the ids to the first new token, or to an encoder's answer.
        rest_s: from the first new token to the last; 0 for an encoder.
    """

    first_s: Sequence[float]
    rest_s: Sequence[float]

    @property
    def total_s(self) -> float:
        """Return the median of whole repetitions."""
        return statistics.median(first + rest for first, rest in zip(self.first_s, self.rest_s, strict=True))


Ask = Callable[[Request], Answer]


def open_bench(graph: str | os.PathLike[str], kind: str, *, threads: int | None = None, capacity: int = 1) -> Ask:
    """Load a graph; return what answers requests with its seconds.

    Args:
        graph: path of the .onnx file.
        kind: "decoder", or any of an encoder's.
        threads: threads per operator; None takes what this process was given.
        capacity: most tokens of prompt and answer, for a decoder.

    Raises:
        SessionError: the graph cannot be loaded, or is of another kind.
    """
    if kind == "decoder":
        decoder = DecoderSession(graph, capacity=capacity, threads=threads)
        return lambda request: _repeat(request, lambda: _generate(decoder, request))
    encoder = EncoderSession(graph, threads=threads, pad_id=pad_id(Path(graph).parent))
    return lambda request: _repeat(request, lambda: _encode(encoder, request))


def metrics_of(kind: str) -> tuple[str, ...]:
    """Return what can be measured of a model of this kind."""
    return DECODER_METRICS if kind == "decoder" else ENCODER_METRICS


def speeds(ask: Ask, texts: Sequence[Sequence[int]], new_tokens: int, wanted: Collection[str]) -> dict[str, float]:
    """Ask what the wanted metrics need; return their values, each a median of its repetitions.

    Args:
        ask: answers requests.
        texts: token ids, as many as the batch that `texts_per_s` counts; the others take the first alone.
        new_tokens: tokens to generate; 0 for an encoder.
        wanted: some of `metrics_of` this kind of model.
    """
    if not new_tokens:
        asked = {"latency_ms": texts[:1], "texts_per_s": texts}
        seconds = {name: ask(Request(ids, at_least_s=TURN_S)).total_s for name, ids in asked.items() if name in wanted}
        return {name: len(texts) / s if name == "texts_per_s" else 1e3 * s for name, s in seconds.items()}
    answer = ask(Request(texts[:1], new_tokens, TURN_S))
    first_s = statistics.median(answer.first_s)
    found = {
        "prefill_tokens_per_s": len(texts[0]) / first_s,
        "decode_tokens_per_s": (new_tokens - 1) / statistics.median(answer.rest_s),
        "ttft_ms": 1e3 * first_s,
        "latency_ms": 1e3 * answer.total_s,
    }
    return {name: value for name, value in found.items() if name in wanted}


def _repeat(request: Request, once: Callable[[], tuple[float, float]]) -> Answer:
    begin = time.perf_counter()
    seconds = [once()]
    while time.perf_counter() - begin < request.at_least_s:
        seconds.append(once())
    first_s, rest_s = zip(*seconds, strict=True)
    return Answer(first_s, rest_s)


def _generate(session: DecoderSession, request: Request) -> tuple[float, float]:
    """Prefill and decode greedily, as `runtime.generation` does; return the seconds of both."""
    (prompt,) = request.ids
    begin, past = time.perf_counter(), 0
    for size in prefill_chunks(len(prompt)):
        logits = session.run(prompt[past : past + size], past, rows=[size - 1])[0]
        past += size
    token = sample(logits, GREEDY, past)
    first = time.perf_counter()
    for position in range(past, past + request.new_tokens - 1):
        token = sample(session.step(token, position), GREEDY, position + 1)
    return first - begin, time.perf_counter() - first


def _encode(session: EncoderSession, request: Request) -> tuple[float, float]:
    begin = time.perf_counter()
    session.run(request.ids)
    return time.perf_counter() - begin, 0.0


def serve(ask: Ask, requests: TextIO, answers: TextIO) -> None:
    """Say that the graph is loaded, then answer one request per line until the input ends."""
    print(json.dumps({"loaded": True}), file=answers, flush=True)
    for line in requests:
        print(json.dumps(asdict(ask(Request(**json.loads(line))))), file=answers, flush=True)


def report(folder: Path, workload: Workload, threads: int | None, rounds: int) -> list[str]:
    """Measure an artifact for a person: median, lowest and highest of the rounds after one that warms up.

    Raises:
        ServingError: the artifact cannot be loaded, or its context does not hold the workload.
    """
    manifest = verify(folder)
    kind, tokens = manifest.kind, workload.tokens(manifest.kind)
    if tokens > manifest.context_length:
        expected = f"expected at most the context of {manifest.context_length}"
        raise PromptError(f"{folder}: got {tokens} tokens, {expected}; ask for fewer with --input-tokens")
    ask = open_bench(folder / manifest.graphs["model"], kind, threads=threads, capacity=tokens)
    chance, wanted = random.Random(0), metrics_of(kind)
    found = [
        speeds(ask, workload.texts(kind, manifest.vocabulary, chance), workload.generated(kind), wanted)
        for _ in range(1 + rounds)
    ]
    return [_line(metric, [one[metric] for one in found[1:]]) for metric in wanted]


def _line(metric: str, values: Sequence[float]) -> str:
    return f"{metric:<20} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
        return int(text)

    return whole_number


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench", description="Measure how fast an artifact answers."
    )
    parser.add_argument("path", type=Path, help="the artifact; with --serve, a graph")
    parser.add_argument(
        "--threads", type=_at_least(1), help="threads per operator; all this process may use if not given"
    )
    for option in fields(Workload):
        name, told = f"--{option.name.replace('_', '-')}", option.metadata
        parser.add_argument(name, type=_at_least(told["ge"]), default=option.default, help=told["help"])
    parser.add_argument("--rounds", type=_at_least(1), default=8, help="repetitions after one that warms up")
    parser.add_argument("--serve", metavar="KIND", help="answer requests on standard input; KIND of the graph")
    parser.add_argument("--capacity", type=int, default=1, help="with --serve: most tokens of a decoder's sequence")
    options = parser.parse_args()
    try:
        if options.serve:
            answers = os.fdopen(os.dup(1), "w")
            os.dup2(2, 1)  # what libraries print is no answer
            ask = open_bench(options.path, options.serve, threads=options.threads, capacity=options.capacity)
            serve(ask, sys.stdin, answers)
        else:
            workload = Workload(options.input_tokens, options.new_tokens, options.batch)
            print("\n".join(report(options.path, workload, options.threads, options.rounds)))
    except (ServingError, BrokenPipeError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
