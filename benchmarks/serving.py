"""Sixteen clients at once, ours beside llama.cpp's own server and onnxruntime-genai: tokens per second and latencies.

Closed loop over HTTP: each client asks again when its answer is complete; prompts are drawn token ids and never repeat.
All servers hold their model all the time, but only the one whose turn it is runs; the others are stopped (SIGSTOP).
Servers take turns within a round, in an order that rotates, on the same questions; a ratio is formed within a round
before its median is taken. The client is `optimize bench`'s, in the process of this script.

    python benchmarks/serving.py --peers-python PEERS/bin/python --llama-server LLAMA/bin/llama-server --work DIR
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from report import Spread, header, machine, say, table, versions, write_json
from shapes import SHAPES, write_shape
from variants import BENCHMARKS, Missing, Setting, Variant, Weights, environment, genai, llama_cpp, ours

from runtime.traffic.bench import Bench, Settings, run
from runtime.traffic.measure import Load
from runtime.traffic.workload import Range

CLIENTS = 16
LOADED_S = 120.0  # a server that does not answer after so long has failed
FRESH_SEED = 1000  # of the first round; each round has its own, so that no prompt comes twice


@dataclass(frozen=True)
class Workload:
    """Lengths of prompts and answers, drawn evenly."""

    name: str
    input_tokens: Range
    output_tokens: Range

    def __str__(self) -> str:
        return f"{self.name} ({self.input_tokens} in, {self.output_tokens} out)"


WORKLOADS = (
    Workload("decode-heavy", Range(32, 128), Range(128, 256)),
    Workload("mixed", Range(32, 512), Range(32, 128)),
)
CONTEXT = max(each.input_tokens.most + each.output_tokens.most for each in WORKLOADS)


@dataclass(frozen=True)
class Turn:
    """What one server did in one round.

    Attributes:
        output_tokens_per_s, requests_per_s: over the whole turn.
        ttft_ms, tpot_ms: of each request.
        client_share: processor seconds of the client over the seconds of the turn.
    """

    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    client_share: float

    @classmethod
    def of(cls, bench: Bench, client_s: float) -> Turn:
        """Read a turn; raise Missing if an answer is missing or too short."""
        summary = bench.summary
        if summary.errors or summary.short:
            error = next((record.error for record in bench.requests if record.error), "too few tokens")
            raise Missing(f"{summary.errors} requests failed, {summary.short} answers were short: {error}")
        ttft = tuple(1e3 * record.ttft_s for record in bench.requests)
        tpot = tuple(1e3 * record.tpot_s for record in bench.requests if record.tpot_s is not None)
        return cls(summary.output_tokens_per_s, summary.requests_per_s, ttft, tpot, client_s / summary.duration_s)


@dataclass
class Server:
    """A server's process, stopped but in its turns."""

    variant: Variant
    weights: Weights
    process: subprocess.Popen[bytes]
    port: int
    turns: dict[Workload, list[Turn]] = field(default_factory=dict)

    def wake(self) -> None:
        """Let it run."""
        self.process.send_signal(signal.SIGCONT)

    def sleep(self) -> None:
        """Stop it where it is."""
        self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()

    def turn(self, workload: Workload, requests: int, seed: int) -> Turn:
        """Have the clients ask so many requests."""
        settings = Settings(
            Load(concurrency=CLIENTS, requests=requests), workload.input_tokens, workload.output_tokens, seed=seed
        )
        self.wake()
        before = time.process_time()
        bench = run(f"http://127.0.0.1:{self.port}", settings)
        turn = Turn.of(bench, time.process_time() - before)
        self.sleep()
        return turn


def command(variant: Variant, weights: Weights, options: argparse.Namespace, port: int) -> list[str]:
    """Return how a server is started."""
    model, slots, threads = str(weights.path), str(CLIENTS), str(options.threads)
    if variant.module == "llama_cpp":
        if options.llama_server is None:
            raise Missing(f"{variant.label}: no llama-server given")
        attention = "on" if "flash" in variant.settings else "off"
        arguments = ["-m", model, "-np", slots, "-cb", "-c", str(CLIENTS * CONTEXT), "-fa", attention, "-t", threads]
        return [str(options.llama_server), *arguments, "--no-cache-prompt", "--cache-ram", "0", "--port", str(port)]
    common = ["--port", str(port), "--slots", slots, "--threads", threads]
    if variant.module == "genai":
        return [str(options.peers_python), "-m", "engines.genai_server", model, *common]
    return [sys.executable, "-m", "optimizer.cli", "serve", model, "--context", str(CONTEXT), *common]


def start(variant: Variant, setting: Setting, source: Path, options: argparse.Namespace) -> Server:
    """Build what is absent, start a server and wait until it answers; raise Missing if it does not."""
    weights = variant.build(setting, source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = setting.work / "logs" / f"serving-{variant.label.replace(' ', '-').replace(',', '')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        arguments = command(variant, weights, options, port)
        search = environment(BENCHMARKS.parent if variant.is_ours else BENCHMARKS)
        process = subprocess.Popen(arguments, env=search, stdout=output, stderr=output)
    server = Server(variant, weights, process, port)
    until = time.monotonic() + LOADED_S
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > until:
            server.close()
            last = (log.read_text(errors="replace").strip() or "no message").splitlines()[-1]
            raise Missing(f"{variant.label}: its server did not start: {last}")
        time.sleep(0.2)
    server.sleep()
    return server


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def measure(servers: Sequence[Server], options: argparse.Namespace) -> None:
    """Give every server its turns; round -1 warms up with one request of each client."""
    for workload in WORKLOADS:
        for index in range(-1, options.rounds):
            first = index % max(len(servers), 1)
            for server in [*servers[first:], *servers[:first]]:
                requests = options.requests if index >= 0 else CLIENTS
                turn = server.turn(workload, requests, FRESH_SEED + index)
                if index >= 0:
                    server.turns.setdefault(workload, []).append(turn)
            say(f"{workload.name}: round {index + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}")


MEASURES: dict[str, tuple[Callable[[Turn], float], int]] = {
    "output tokens/s": (lambda turn: turn.output_tokens_per_s, 0),
    "requests/s": (lambda turn: turn.requests_per_s, 2),
    "TTFT p50 ms": (lambda turn: float(np.percentile(turn.ttft_ms, 50)), 0),
    "TTFT p99 ms": (lambda turn: float(np.percentile(turn.ttft_ms, 99)), 0),
    "TPOT p50 ms": (lambda turn: float(np.percentile(turn.tpot_ms, 50)), 1),
    "TPOT p99 ms": (lambda turn: float(np.percentile(turn.tpot_ms, 99)), 1),
    "client's share of a core": (lambda turn: turn.client_share, 3),
}


def speed_table(servers: Sequence[Server], workload: Workload) -> str:
    """Return the numbers of each server: median (lowest to highest) of the rounds."""
    rows = [
        [
            server.variant.label,
            *(Spread.of([of(turn) for turn in server.turns[workload]]).text(n) for of, n in MEASURES.values()),
        ]
        for server in servers
    ]
    return table(["server", *MEASURES], rows)


def ratio_table(servers: Sequence[Server], workload: Workload) -> str:
    """Return ours to each peer, formed round by round."""
    names = list(MEASURES)[:-1]
    rows = []
    for mine in (server for server in servers if server.variant.is_ours):
        for peer in (server for server in servers if not server.variant.is_ours):
            pairs = list(zip(mine.turns[workload], peer.turns[workload], strict=True))
            spreads = [Spread.of([MEASURES[name][0](a) / MEASURES[name][0](b) for a, b in pairs]) for name in names]
            rows.append([f"{mine.variant.label} / {peer.variant.label}", *(spread.text(2) for spread in spreads)])
    return table(["ours / peer", *names], rows)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shapes and models; reused")
    parser.add_argument("--peers-python", type=Path, help="interpreter with onnxruntime-genai and llama-cpp-python")
    parser.add_argument("--llama-server", type=Path, help="program built from llama.cpp's source")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--head", choices=("int8", "int4"), default="int8", help="of all, and of the embedding")
    parser.add_argument("--only", nargs="+", default=[], help="servers whose label contains one of these words")
    parser.add_argument("--requests", type=int, default=48, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers of every round here")
    return parser.parse_args()


def main() -> None:
    """Measure, print Markdown, write JSON."""
    options = parse_options()
    if options.peers_python:
        options.peers_python = options.peers_python.absolute()
    setting = Setting(options.work.absolute(), options.peers_python, None)
    source = setting.work / "shapes" / options.shape
    write_shape(SHAPES[options.shape], source)
    gguf_head = {"int8": "q8_0", "int4": "q4_0"}[options.head]
    wanted = [ours(128, options.head), ours(32, options.head)]
    wanted += [llama_cpp(gguf_head, "flash"), llama_cpp(gguf_head, "plain"), genai(128, options.head)]
    about = machine() | {
        "shape": options.shape,
        "load": f"closed loop, {CLIENTS} clients, {options.requests} requests a turn, greedy, no prompt twice",
        "threads": f"{options.threads} of each server",
        "repetitions": f"{options.rounds} rounds, servers taking turns; median (lowest to highest)",
    }
    servers, missing = [], []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no stopped server behind
    try:
        for variant in wanted:
            if not options.only or any(word in variant.label for word in options.only):
                say(f"starting {variant.label}")
                try:
                    servers.append(start(variant, setting, source, options))
                except Missing as reason:
                    missing.append(str(reason))
                    say(f"missing: {reason}")
        measure(servers, options)
    finally:
        for server in servers:
            server.close()
    libraries = versions(("onnxruntime", "uvicorn", "fastapi"))
    print(header("Serving", about, libraries))
    for workload in WORKLOADS:
        print(f"### {workload}\n")
        print(speed_table(servers, workload))
        print(ratio_table(servers, workload))
    print("\n".join(f"Missing: {reason}\n" for reason in missing))
    if options.json:
        document = [
            {"server": server.variant.label, "workload": workload.name, "turns": [asdict(turn) for turn in turns]}
            for server in servers
            for workload, turns in server.turns.items()
        ]
        write_json(options.json, {"about": about, "versions": libraries, "missing": missing, "servers": document})


if __name__ == "__main__":
    main()
