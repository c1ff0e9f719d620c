"""Thousands of requests against a real server: cancelled, cut off, malformed, streamed, whole; SIGTERM under load.

It fails, with exit code 1 and a line for each finding, unless
- each request gets what its kind promises: a whole answer, a stream that ends in [DONE], a 4xx if it is bad;
- afterwards nothing waits, nothing runs and no memory of keys and values is reserved;
- the server's memory (RSS) after the last request is within 5 % of that after the warm-up, a tenth of the requests;
- on SIGTERM under load each request that was admitted ends validly, and the process exits with 0.

    python benchmarks/soak.py artifacts/stdlib-llama-int4 --requests 5000
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from report import header, machine, say, versions

WARM_UP = 0.1  # of all requests
RSS_MARGIN = 0.05
BAD_BODIES = (
    b"{",
    b"[]",
    b'{"model": "MODEL", "prompt": "a", "max_tokens": -1}',
    b'{"model": "MODEL", "prompt": "a", "unknown": 1}',
    b'{"model": "MODEL", "prompt": [999999999]}',
    b'{"model": "MODEL", "prompt": "a", "temperature": "hot"}',
    b'{"model": "MODEL", "prompt": ' + b"[" * 200 + b"]" * 200 + b"}",
)


@dataclass
class Soak:
    """One server's run: what was asked, and what was found wrong."""

    client: httpx2.AsyncClient
    model: str
    chance: random.Random
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)

    async def one(self) -> None:
        """Send one request of a kind drawn by chance, and check what it gets."""
        kinds = {self.whole: 4, self.stream: 8, self.left_early: 3, self.timed_out: 1, self.bad: 2}
        kind = self.chance.choices(list(kinds), list(kinds.values()))[0]
        self.counts[kind.__name__] += 1
        try:
            await kind()
        except Exception as error:
            self.findings.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def whole(self) -> None:
        """Ask for a whole answer."""
        body = self._body(stream=False, n=self.chance.choice([1, 1, 1, 2]))
        response = await self._patiently(body)
        usage = response.json()["usage"]
        if not 0 <= usage["completion_tokens"] <= body["n"] * body["max_tokens"]:
            self.findings.append(f"whole: {usage} for max_tokens {body['max_tokens']}")

    async def stream(self) -> None:
        """Read a stream to its end."""
        if not await self._read(self._body(stream=True), most_events=None):
            self.findings.append("stream: it ended without [DONE]")

    async def left_early(self) -> None:
        """Hang up after a few events, perhaps before the first."""
        await self._read(self._body(stream=True), most_events=self.chance.randrange(6))

    async def timed_out(self) -> None:
        """Hang up by the clock, wherever the request is then."""
        try:
            async with asyncio.timeout(self.chance.uniform(0, 0.3)):
                await self.client.post("/v1/completions", json=self._body(stream=False))
        except TimeoutError:
            pass

    async def bad(self) -> None:
        """Send what no server should take."""
        content = self.chance.choice(BAD_BODIES).replace(b"MODEL", self.model.encode())
        response = await self.client.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        if not 400 <= response.status_code < 500 or "message" not in response.json()["error"]:
            self.findings.append(f"bad: {response.status_code} for {content[:60]!r}")

    def _body(self, **more: Any) -> dict[str, Any]:
        chance = self.chance
        prompt = "".join(chance.choices("def class:\n    return self.x é 漢 🙂", k=chance.randint(1, 400)))
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": chance.randint(1, 64),
            "temperature": chance.choice([0.0, 0.8]),
            "ignore_eos": chance.random() < 0.5,
            **({"stop": ["\n\n", "def "]} if chance.random() < 0.2 else {}),
            **({"logprobs": 3} if chance.random() < 0.1 else {}),
            **more,
        }

    async def _patiently(self, body: dict[str, Any]) -> httpx2.Response:
        """Post, and again after a while as long as the queue is full."""
        while True:
            response = await self.client.post("/v1/completions", json=body)
            if response.status_code != 429:
                response.raise_for_status()
                return response
            self.counts["429"] += 1
            await asyncio.sleep(0.1)

    async def _read(self, body: dict[str, Any], most_events: int | None) -> bool:
        """Read so many events of a stream, None: all; return whether it ended as it should."""
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                self.counts["429"] += 1
                return True
            response.raise_for_status()
            events = 0
            async for line in response.aiter_lines():
                if events == most_events or line == "data: [DONE]":
                    return True
                if line.startswith("data: ") and "error" in json.loads(line[6:]):
                    self.findings.append(f"stream: {line[:200]}")
                events += bool(line)
        return False


async def run(soak: Soak, requests: int, at_once: int) -> None:
    """Send so many requests, at most `at_once` at a time."""
    left = iter(range(requests))

    async def worker() -> None:
        for number in left:
            await soak.one()
            if number % max(1, requests // 10) == 0:
                say(f"{number} of {requests} requests, {len(soak.findings)} findings")

    await asyncio.gather(*(worker() for _ in range(at_once)))


async def drained(client: httpx2.AsyncClient) -> dict[str, float]:
    """Return what the server says it still holds, after waiting for it to be nothing."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    held: dict[str, float] = {}
    for _ in range(100):
        lines = (await client.get("/metrics")).text.splitlines()
        found = [line for line in lines if line.startswith(names)]
        assert len(found) >= len(names), f"/metrics lacks one of {names}"
        held = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in found}
        if not any(held.values()):
            break
        await asyncio.sleep(0.1)
    return {name: value for name, value in held.items() if value}


def rss_bytes(pid: int) -> int:
    """Return the memory of a process that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def terminated(soak: Soak, server: subprocess.Popen[bytes], at_once: int) -> None:
    """Send SIGTERM while streams run; each that began must end in [DONE], and the process with exit code 0."""
    before = len(soak.findings)
    streams = [asyncio.create_task(soak.stream()) for _ in range(at_once)]
    await asyncio.sleep(0.5)
    server.send_signal(signal.SIGTERM)
    refused = 0
    for done in await asyncio.gather(*streams, return_exceptions=True):
        if isinstance(done, httpx2.HTTPStatusError) and done.response.status_code == 503:
            refused += 1
        elif isinstance(done, BaseException):
            soak.findings.append(f"SIGTERM: {type(done).__name__}: {done}")
    try:
        code = await asyncio.to_thread(server.wait, 60)
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        soak.findings.append(f"SIGTERM: exit code {code}, expected 0 within 60 s")
    say(f"SIGTERM with {at_once} streams: {len(soak.findings) - before} findings, {refused} refused with 503")


async def main_async(options: argparse.Namespace) -> int:
    """Start the server, soak it, end it; return the exit code."""
    port = options.port
    command = [sys.executable, "-m", "optimizer.cli", "serve", str(options.artifact), "--port", str(port)]
    server = subprocess.Popen([*command, "--slots", str(options.slots)], stderr=subprocess.DEVNULL)
    limits = httpx2.Limits(max_connections=2 * options.at_once)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as client:
            await _ready(client, server)
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            soak = Soak(client, model, random.Random(options.seed))
            warm = max(50, int(WARM_UP * options.requests))
            await run(soak, warm, options.at_once)
            before, begin = rss_bytes(server.pid), time.perf_counter()
            await run(soak, options.requests - warm, options.at_once)
            seconds, held = time.perf_counter() - begin, await drained(client)
            after = rss_bytes(server.pid)
            if held:
                soak.findings.append(f"after the last request the server holds {held}")
            if after > (1 + RSS_MARGIN) * before:
                soak.findings.append(f"RSS {before / 1e6:.1f} MB after the warm-up, {after / 1e6:.1f} MB at the end")
            await terminated(soak, server, options.at_once)
    finally:
        server.kill()
    print(header("Soak", machine() | {"artifact": options.artifact.name}, versions(("onnxruntime", "uvicorn"))))
    print(
        f"{options.requests} requests, {options.at_once} at once, {seconds:.0f} s after the warm-up: "
        f"{dict(soak.counts)}"
    )
    print(
        f"RSS {before / 1e6:.1f} MB after {warm} requests, {after / 1e6:.1f} MB at the end ({after / before - 1:+.1%})"
    )
    print(f"{len(soak.findings)} findings", *soak.findings[:50], sep="\n- ")
    return 1 if soak.findings else 0


async def _ready(client: httpx2.AsyncClient, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            if (await client.get("/readyz")).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit(f"the server ended with exit code {server.returncode} before it was ready")


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--at-once", type=int, default=24, help="more than slots, so that some wait")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8907)
    return asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
