"""An engine's throughput, the gaps of its streams while a long prompt is read, and what it burns without work.

*throughput*: tokens per second of N requests at a time, beside the same requests one after the other. Closed loop: N
are always under way, and the next is added when one ends. Prompts are drawn token ids, of lengths drawn from a range;
answers have a fixed length. Both sides hold the same artifact and answer the same requests, in turns within a round, in
an order that rotates; a ratio is formed within a round before its median is taken. Every answer of the engine is
compared with the one given alone.

*gaps*: streams run while a long prompt is read. A gap lies between two tokens of a stream; it should be a step and a
chunk, of which the limit is `max_stall_ms`. The prompt's share is its speed beside the streams over its speed alone,
measured just before. A first prompt, unmeasured, teaches the engine what chunks cost.

*idle*: processor seconds of an engine that has just given its last token and waits.

Where others use the machine, `--processor-time` measures by a clock that runs while this process does, for the engine's
own limits too. It counts all threads together, so it wants one.

    python benchmarks/engine.py artifacts/stdlib-llama-int4
    python benchmarks/engine.py ARTIFACT --parts gaps --long-prompts 2000 4000 --threads 2
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from report import Spread, header, machine, say, table, versions, write_json

from runtime import Engine, TextGenerator
from runtime.engine import MAX_STALL_MS, Ticket
from runtime.threads import default_threads

ALONE = "one after the other"
PARTS = ("throughput", "gaps", "idle")
STREAM_PROMPT = 20
IDLE_S = 5.0

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


@dataclass
class Beside:
    """Prompts of one length, each read alone and beside streams.

    Attributes:
        gaps_ms: between tokens of a stream while a prompt was read.
        steps_ms: the same right before.
        shares: of the speed alone, one per prompt.
    """

    gaps_ms: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def read_beside(engine: Engine, prompts: Sequence[list[int]], streams: int) -> Beside:
    """Read each prompt alone and then beside so many streams; the first does not count."""
    found = Beside()
    for index, ids in enumerate(prompts):
        alone_s = sum(seconds for seconds, _ in steps(engine, ids))
        running = [
            engine.add(ids[at : at + STREAM_PROMPT], max_tokens=engine.longest, ignore_eos=True)
            for at in range(streams)
        ]
        while not all(ticket.answer.ids for ticket in running):
            engine.step()
        before_ms = [1e3 * timed(engine)[0] for _ in range(20)]
        beside_s, gaps_ms, since = 0.0, [], 0.0
        for seconds, tickets in steps(engine, ids):
            beside_s += seconds
            if running[0] in tickets:
                gaps_ms.append(1e3 * (beside_s - since))
                since = beside_s
        for ticket in running:
            ticket.cancel()
        say(f"prompt of {len(ids)} tokens: {index} of {len(prompts) - 1}")
        if index > 0:
            found.gaps_ms += gaps_ms
            found.steps_ms += before_ms
            found.shares.append(alone_s / beside_s)
    return found


def steps(engine: Engine, ids: list[int]) -> Iterator[tuple[float, list[Ticket]]]:
    """Add a prompt and yield each step until its first token: seconds, and who got a token."""
    ticket = engine.add(ids, max_tokens=1, ignore_eos=True)
    while not ticket.is_finished:
        yield timed(engine)


def timed(engine: Engine) -> tuple[float, list[Ticket]]:
    """Run a step."""
    begin = time.perf_counter()
    tickets = engine.step()
    return time.perf_counter() - begin, tickets


def idle_cpu_s(engine: Engine, prompt: list[int]) -> float:
    """Return processor seconds of the `IDLE_S` after an answer."""
    engine.generate([prompt], max_tokens=8, ignore_eos=True)
    before = time.process_time()
    time.sleep(IDLE_S)
    return time.process_time() - before


class Bench:
    """The parts on one artifact.

    Attributes:
        about: what a reader needs to judge the numbers.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.slots = max(*options.at_once, options.streams + 1)
        self.engine = Engine.load(options.artifact, threads=options.threads, slots=self.slots)
        self.chance = random.Random(0)
        clock = "this process's own time" if options.processor_time else "the wall's"
        self.about = machine() | {"artifact": options.artifact.name, "threads": str(options.threads), "clock": clock}

    def draw(self, tokens: int) -> list[int]:
        """Return a prompt of so many ids."""
        return self.chance.choices(range(self.engine.session.vocabulary), k=tokens)

    def throughput(self) -> tuple[list[str], Any]:
        """Return lines of Markdown and the numbers of every round."""
        options = self.options
        generator = TextGenerator.load(options.artifact, threads=options.threads)
        sides = {ALONE: alone(generator, options.new_tokens)}
        sides |= {f"engine, {n} at a time": together(self.engine, n, options.new_tokens) for n in options.at_once}
        least, most = options.input_tokens
        found, differing = measure(
            sides,
            options.rounds,
            lambda: [self.draw(self.chance.randint(least, most)) for _ in range(options.requests)],
        )
        total = (options.rounds + 1) * options.requests * len(options.at_once)
        rows = []
        for name, values in found.items():
            ratio = Spread.of([one / base for one, base in zip(values, found[ALONE], strict=True)])
            rows.append([name, Spread.of(values).text(0), "" if name == ALONE else ratio.text(2)])
        lines = [
            f"{options.rounds} rounds of {options.requests} requests, sides taking turns: prompt {least} to {most}, "
            f"{options.new_tokens} new tokens, greedy; median (lowest to highest).",
            f"{differing} of {total} answers differ from those given alone.",
            "",
            table(["requests", "output tokens/s", "to one after the other"], rows),
        ]
        return lines, found

    def gaps(self) -> tuple[list[str], Any]:
        """Return lines of Markdown and all gaps."""
        options = self.options
        found, rows = {}, []
        for tokens in options.long_prompts:
            prompts = [self.draw(tokens) for _ in range(options.rounds + 1)]
            found[tokens] = beside = read_beside(self.engine, prompts, options.streams)
            points = [np.percentile(beside.gaps_ms, at) for at in (50, 90, 99, 100)]
            step = float(np.median(beside.steps_ms))
            gaps = [f"{point:.0f}" for point in points]
            rows.append([f"{tokens} tokens", f"{step:.1f}", *gaps, Spread.of(beside.shares).text(2)])
        lines = [
            f"{options.streams} streams, {options.rounds} prompts of each length; max_stall_ms {MAX_STALL_MS:.0f}. "
            "Milliseconds; share: median (lowest to highest).",
            "",
            table(["prompt", "step before", "gap p50", "p90", "p99", "most", "share of the speed alone"], rows),
        ]
        return lines, {tokens: asdict(beside) for tokens, beside in found.items()}

    def idle(self) -> tuple[list[str], Any]:
        """Return a line of Markdown and the processor seconds of every round."""
        found = [idle_cpu_s(self.engine, self.draw(8)) for _ in range(self.options.rounds)]
        return [f"Without work: {Spread.of(found).text(4)} s of processor in {IDLE_S:.0f} s.", ""], found


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=32, help="of a round")
    parser.add_argument("--input-tokens", type=int, nargs=2, default=[32, 128], metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long-prompts", type=int, nargs="+", default=[2000], help="lengths, for the gaps")
    parser.add_argument("--streams", type=int, default=2, help="beside a long prompt")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="of this process, instead of the wall's")
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    if options.processor_time:
        options.threads = 1
        time.perf_counter = time.process_time  # type: ignore[assignment]
    bench = Bench(options)
    libraries = versions(("onnxruntime", "tokenizers", "numpy"))
    numbers: dict[str, Any] = {"about": bench.about, "versions": libraries}
    print(header("Engine", bench.about, libraries))
    for part in options.parts:
        lines, numbers[part] = getattr(bench, part)()
        print("\n".join(lines), flush=True)
    if options.json:
        write_json(options.json, numbers)


if __name__ == "__main__":
    main()
