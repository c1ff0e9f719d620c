"""Make the restarts of `optimizer.speed`: a fresh pair of processes, both alive, that take turns to answer.

What a machine does to all alike (its clock, its other users) meets neighbours in time; which of the two comes first is
drawn anew for each pair. A process that waits sleeps on its input. Before each turn there is a pause: ONNX Runtime's
threads spin on for up to 50 ms after an answer, and would take a core from the other side.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import runtime
from optimizer.errors import CannotRun
from optimizer.speed import FIRST_LOOK, LAST_LOOK, Restart, SpeedLimit, SpeedVerdict, Timing, decide
from passes.base import Progress, no_progress
from runtime.bench import Answer, Ask, Request, Workload, metrics_of, speeds
from runtime.threads import default_threads

PAIRS = 8
"""Pairs of turns in one restart, after one that warms up."""
REST_S = 0.06
"""Longer than threads spin."""


@dataclass(frozen=True)
class Setup:
    """How models are asked.

    Attributes:
        kind: of model, as in `passes._kind`.
        vocabulary: number of token ids.
        workload: what is asked.
        threads: per operator.
    """

    kind: str
    vocabulary: int
    workload: Workload
    threads: int


class Worker(AbstractContextManager["Worker"]):
    """A process with one graph loaded; call it with a request. Leaving it kills the process."""

    def __init__(self, graph: Path, setup: Setup) -> None:
        """Start the process and wait until the graph is loaded; errors as for a call."""
        command = [sys.executable, "-P", "-m", "runtime.bench", str(graph), "--serve", setup.kind]
        command += ["--threads", str(setup.threads), "--capacity", str(setup.workload.tokens(setup.kind))]
        self._graph = graph
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed by `close`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "PYTHONPATH": _search_path()},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the other
        )
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        return self._process.pid

    def __call__(self, request: Request) -> Answer:
        """Ask, after a pause that lets the process before go to sleep.

        Raises:
            CannotRun: the process has ended; says what it said last.
        """
        assert self._process.stdin is not None
        time.sleep(REST_S)
        try:
            print(json.dumps(asdict(request)), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return Answer(**self._receive())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            assert stream is not None
            with suppress(BrokenPipeError):  # a request that a dead process never read
                stream.close()

    def _receive(self) -> dict[str, Sequence[float]]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Sequence[float]] = json.loads(line)
        return answer

    def _ended(self) -> CannotRun:
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().strip().splitlines()
        if code == -signal.SIGKILL:
            reason = "killed, as a system does that runs out of memory; both models are loaded at once"
        else:
            reason = said[-1] if said else f"signal {-code}" if code < 0 else f"exit code {code}"
        return CannotRun(f"{self._graph}: the process that measures its speed ended: {reason}")


def _search_path() -> str:
    """Return where the process finds `runtime`: where this one found it, whatever the working folder holds."""
    found = str(Path(runtime.__path__[0]).parent)
    return os.pathsep.join(filter(None, (found, os.environ.get("PYTHONPATH"))))


Start = Callable[[Path, Setup], AbstractContextManager[Ask]]


def measure(
    limits: Sequence[SpeedLimit],
    graphs: Mapping[str, Path],
    setup: Setup,
    *,
    alpha: float,
    fail_alpha: float,
    progress: Progress = no_progress,
    seed: int = 0,
    start: Start = Worker,
) -> tuple[tuple[SpeedVerdict, ...], Timing]:
    """Judge a model's speed on this machine, now.

    Args:
        limits: the budgets, at least one.
        graphs: "candidate", and "reference" where a budget compares with it -> path of the .onnx file.
        setup: how they are asked.
        alpha: one-sided level of each pass claim.
        fail_alpha: the same of each fail claim.
        progress: told of each restart.
        seed: of the order of turns, and of the token ids.
        start: starts a process; tests have their own.

    Raises:
        CannotRun: a process could not load its graph, or ended.
    """
    chance, begin, load_before = random.Random(seed), time.perf_counter(), os.getloadavg()[0]
    wanted = tuple(dict.fromkeys(limit.metric for limit in limits))

    def restart(number: int) -> Restart:
        progress(number, FIRST_LOOK if number < FIRST_LOOK else LAST_LOOK, "restarts")
        return take_turns(graphs, setup, wanted, chance, start)

    clock_mhz = _clock_mhz()
    verdicts = decide(limits, restart, alpha=alpha, fail_alpha=fail_alpha)
    kind, workload = setup.kind, setup.workload
    timing = Timing(
        restarts=max(verdict.restarts for verdict in verdicts),
        pairs=PAIRS,
        input_tokens=workload.input_tokens,
        new_tokens=workload.generated(kind),
        batch=workload.texts_at_once(kind),
        threads=setup.threads,
        cores=default_threads(),
        processor=_processor(),
        clock_mhz=clock_mhz,
        governor=_governor(),
        load_before=load_before,
        load_after=os.getloadavg()[0],
        seconds=time.perf_counter() - begin,
    )
    return verdicts, timing


def take_turns(
    graphs: Mapping[str, Path], setup: Setup, wanted: Sequence[str], chance: random.Random, start: Start
) -> Restart:
    """Make one restart: fresh processes, started in random order; a pair that warms up, then `PAIRS` that count."""
    sides = chance.sample(sorted(graphs), len(graphs))
    kind, workload = setup.kind, setup.workload
    values: dict[str, dict[str, list[float]]] = {side: {metric: [] for metric in wanted} for side in graphs}
    with ExitStack() as stack:
        asks = {side: stack.enter_context(start(graphs[side], setup)) for side in sides}
        for number in range(-1, PAIRS):
            texts = workload.texts(kind, setup.vocabulary, chance)
            for side in chance.sample(sides, len(sides)):
                found = speeds(asks[side], texts, workload.generated(kind), wanted)
                if number >= 0:
                    for metric, value in found.items():
                        values[side][metric].append(value)
    return Restart(values.get("reference", {}), values["candidate"])


def require_measurable(limits: Sequence[SpeedLimit], workload: Workload, kind: str, context: int) -> None:
    """Refuse a budget of what a model of this kind does not do, or a workload that it cannot hold.

    Raises:
        CannotRun: names the key of the recipe.
    """
    known = metrics_of(kind)
    for limit in limits:
        if limit.metric not in known:
            expected = " or ".join(known)
            raise CannotRun(f"gate.{limit.metric}: cannot be measured of a model of kind {kind}, expected {expected}")
    if workload.tokens(kind) > context:
        what = "input_tokens + new_tokens" if kind == "decoder" else "input_tokens"
        raise CannotRun(
            f"gate.workload: got {what} of {workload.tokens(kind)}, expected at most {context}, the model's context"
        )


def _processor() -> str:
    return next(_fields("model name"), platform.processor() or platform.machine())


def _clock_mhz() -> float | None:
    clocks = [float(value) for value in _fields("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _fields(name: str) -> Iterator[str]:
    """Yield what /proc/cpuinfo says under a name, once for each core; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            yield value.strip()


def _governor() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip() or None
    except OSError:
        return None
