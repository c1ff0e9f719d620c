"""What HTTP costs: streams from `optimize serve`, beside the same requests on the engine without a server.

Closed loop: N requests are always under way, and the next begins when one ends; prompts are drawn token ids, answers
have a fixed length, decoding is greedy. The engine runs in this process in a plain loop; the server is a process of its
own with the same artifact, slots and threads, and its clients are N connections in this process that look for the end
of an answer and no more. Sides take turns, and a ratio is formed within a turn before its median is taken. Processor
seconds are those of the process that holds the engine: unlike tokens per second they hardly depend on who else is busy.

    python benchmarks/server_overhead.py artifacts/stdlib-llama-int4
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from report import Spread, header, machine, say, table, versions, write_json

from runtime import Engine
from runtime.threads import default_threads

END = b"data: [DONE]"
OFFLINE, SERVED = "engine in a loop", "streams over HTTP"


@dataclass(frozen=True)
class Turn:
    """One side's turn: output tokens per second, and processor seconds per thousand of them."""

    tokens_per_s: float
    processor_s: float


def offline(engine: Engine, at_once: int, new_tokens: int, prompts: Sequence[list[int]]) -> None:
    """Answer all prompts on the engine, so many at a time."""
    left, under_way = list(reversed(prompts)), 0
    while left or under_way:
        while left and under_way < at_once:
            engine.add(left.pop(), max_tokens=new_tokens, ignore_eos=True)
            under_way += 1
        under_way -= sum(ticket.is_finished for ticket in engine.step())


class Stream(asyncio.Protocol):
    """A connection that asks for one answer after the other until none is left."""

    def __init__(self, left: list[bytes]) -> None:
        self._left = left
        self._tail = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        seen = self._tail + data
        self._tail = seen[-len(END) :]
        if END in seen:
            self._tail = b""
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server hung up"))

    def _ask(self) -> None:
        if self._left:
            self._transport.write(self._left.pop())
        else:
            self.done.set_result(None)
            self._transport.close()


def request(prompt: list[int], new_tokens: int) -> bytes:
    """Return an HTTP request for a stream."""
    asked = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def streamed(port: int, at_once: int, requests: Sequence[bytes]) -> None:
    """Have all requests answered, so many at a time."""
    left = list(reversed(requests))
    loop = asyncio.get_running_loop()
    connections = [await loop.create_connection(lambda: Stream(left), "127.0.0.1", port) for _ in range(at_once)]
    await asyncio.gather(*(stream.done for _, stream in connections))


@contextmanager
def serving(artifact: Path, slots: int, threads: int) -> Iterator[tuple[int, int]]:
    """Start a server; give its port and process."""
    command = [sys.executable, "-m", "optimizer.cli", "serve", str(artifact), "--port", "0"]
    command += ["--slots", str(slots), "--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            yield int(line.partition("://127.0.0.1:")[2].partition(":")[0]), server.pid
        finally:
            server.terminate()


def processor_s(process: int) -> float:
    """Return the processor seconds that a process has used, all threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def turn(process: int, tokens: int, work: Callable[[], None]) -> Turn:
    """Time one side."""
    before, begin = processor_s(process), time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    return Turn(tokens / seconds, (processor_s(process) - before) / tokens * 1e3)


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="of a turn")
    parser.add_argument("--input-tokens", type=int, nargs=2, default=[32, 128], metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    options = parser.parse_args()
    engine = Engine.load(options.artifact, threads=options.threads, slots=options.streams)
    chance, least, most = random.Random(0), *options.input_tokens
    tokens = options.requests * options.new_tokens
    found: dict[str, list[Turn]] = {OFFLINE: [], SERVED: []}
    with serving(options.artifact, options.streams, options.threads) as (port, server):

        def measured(name: str, prompts: Sequence[list[int]]) -> Turn:
            if name == OFFLINE:
                return turn(os.getpid(), tokens, lambda: offline(engine, options.streams, options.new_tokens, prompts))
            requests = [request(prompt, options.new_tokens) for prompt in prompts]
            return turn(server, tokens, lambda: asyncio.run(streamed(port, options.streams, requests)))

        for index in range(-1, options.rounds):  # round -1 warms up
            prompts = [
                chance.choices(range(engine.tokenizer.vocabulary), k=chance.randint(least, most))
                for _ in range(options.requests)
            ]
            for name in sorted(found, reverse=index % 2 == 0):
                one = measured(name, prompts)
                if index >= 0:
                    found[name].append(one)
            say(f"round {index + 1} of {options.rounds}")
    about = machine() | {
        "artifact": options.artifact.name,
        "load per turn": f"{options.requests} requests, {options.streams} at a time, "
        f"prompts of {least} to {most}, {options.new_tokens} new tokens, greedy",
        "threads": str(options.threads),
        "repetitions": f"{options.rounds} rounds, sides taking turns; median (lowest to highest)",
    }
    libraries = versions(("onnxruntime", "fastapi", "starlette", "uvicorn", "httptools", "numpy"))
    print(header("Server overhead", about, libraries))
    rows = []
    for name, turns in found.items():
        speed = [one.tokens_per_s / base.tokens_per_s for one, base in zip(turns, found[OFFLINE], strict=True)]
        spent = [one.processor_s / base.processor_s for one, base in zip(turns, found[OFFLINE], strict=True)]
        numbers = [Spread.of([one.tokens_per_s for one in turns]).text(0)]
        numbers += [Spread.of([one.processor_s for one in turns]).text(2)]
        ratios = ["", ""] if name == OFFLINE else [Spread.of(speed).text(3), Spread.of(spent).text(3)]
        rows.append([name, numbers[0], ratios[0], numbers[1], ratios[1]])
    columns = ["requests", "output tokens/s", "ratio", "processor s per 1,000 tokens", "ratio"]
    print(table(columns, rows))
    if options.json:
        document = {name: [vars(each) for each in turns] for name, turns in found.items()}
        write_json(options.json, {"about": about, "versions": libraries, "turns": document})


if __name__ == "__main__":
    main()
