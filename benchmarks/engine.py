"""Tokens per second of N requests at a time on the engine, beside the same requests one after the other.

Closed loop: N are always under way, and the next is added when one ends. Prompts are drawn token ids, of lengths drawn
from a range; answers have a fixed length. Both sides hold the same artifact and answer the same requests, in turns
within a round, in an order that rotates; a ratio is formed within a round before its median is taken. Every answer of
the engine is compared with the one given alone.

    python benchmarks/engine.py artifacts/stdlib-llama-int4
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from report import Spread, header, machine, say, table, versions, write_json

from runtime import Engine, TextGenerator
from runtime.threads import default_threads

ALONE = "one after the other"
Tokens = list[tuple[int, ...]]
Answers = Callable[[Sequence[list[int]]], Tokens]


def alone(generator: TextGenerator, new_tokens: int) -> Answers:
    """Answer requests one after the other."""

    def run(prompts: Sequence[list[int]]) -> Tokens:
        return [generator.generate(ids, max_tokens=new_tokens, ignore_eos=True).token_ids for ids in prompts]

    return run


def together(engine: Engine, at_once: int, new_tokens: int) -> Answers:
    """Answer requests so many at a time."""

    def run(prompts: Sequence[list[int]]) -> Tokens:
        tickets, left = [], list(reversed(prompts))
        under_way = 0
        while left or under_way:
            while left and under_way < at_once:
                tickets.append(engine.add(left.pop(), max_tokens=new_tokens, ignore_eos=True))
                under_way += 1
            under_way -= sum(ticket.is_finished for ticket in engine.step())
        return [ticket.completion.token_ids for ticket in tickets]

    return run


def measure(
    sides: dict[str, Answers], rounds: int, draw: Callable[[], list[list[int]]]
) -> tuple[dict[str, list[float]], int]:
    """Return the output tokens per second of each side, one per round, and how many answers differed."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    differing, order = 0, list(sides)
    for index in range(-1, rounds):  # round -1 warms up
        prompts, answers = draw(), {}
        for name in order:
            begin = time.perf_counter()
            answers[name] = sides[name](prompts)
            seconds = time.perf_counter() - begin
            if index >= 0:
                found[name].append(sum(map(len, answers[name])) / seconds)
        differing += sum(one != want for got in answers.values() for one, want in zip(got, answers[ALONE], strict=True))
        order = order[1:] + order[:1]
        say(f"round {index + 1} of {rounds}")
    return found, differing


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=32, help="of a round")
    parser.add_argument("--input-tokens", type=int, nargs=2, default=[32, 128], metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    generator = TextGenerator.load(options.artifact, threads=options.threads)
    engine = Engine.load(options.artifact, threads=options.threads, slots=max(options.at_once))
    sides = {ALONE: alone(generator, options.new_tokens)}
    sides |= {f"engine, {n} at a time": together(engine, n, options.new_tokens) for n in options.at_once}
    chance, least, most = random.Random(0), *options.input_tokens

    def draw() -> list[list[int]]:
        return [
            chance.choices(range(generator.tokenizer.vocabulary), k=chance.randint(least, most))
            for _ in range(options.requests)
        ]

    found, differing = measure(sides, options.rounds, draw)
    total = (options.rounds + 1) * options.requests * len(options.at_once)
    about = machine() | {
        "artifact": options.artifact.name,
        "load per request": f"prompt {least} to {most}, {options.new_tokens} new tokens, greedy",
        "threads": str(options.threads),
        "repetitions": f"{options.rounds} rounds of {options.requests} requests, sides taking turns; "
        "median (lowest to highest)",
        "answers that differ from those given alone": f"{differing} of {total}",
    }
    libraries = versions(("onnxruntime", "tokenizers", "numpy"))
    print(header("Engine", about, libraries))
    rows = []
    for name, values in found.items():
        ratio = Spread.of([one / base for one, base in zip(values, found[ALONE], strict=True)])
        rows.append([name, Spread.of(values).text(0), "" if name == ALONE else ratio.text(2)])
    print(table(["requests", "output tokens/s", "to one after the other"], rows))
    if options.json:
        write_json(options.json, {"about": about, "versions": libraries, "tokens_per_s": found})


if __name__ == "__main__":
    main()
