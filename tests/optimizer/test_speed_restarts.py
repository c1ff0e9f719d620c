"""Restarts: who is asked what and when, and what becomes of the processes."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from optimizer.errors import CannotRun
from optimizer.speed import SpeedLimit
from optimizer.speed_restarts import PAIRS, Setup, Worker, measure, take_turns
from runtime.bench import Answer, Ask, Request, Workload

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
GRAPHS = {"reference": Path("a.onnx"), "candidate": Path("b.onnx")}
DECODER = Setup("decoder", 100, Workload(input_tokens=8, new_tokens=5), threads=1)
ENCODER = Setup("classifier", 100, Workload(input_tokens=8, batch=4), threads=1)


class Machine:
    """Processes that answer in no time: `seconds` says how long they claim to have taken, given their graph."""

    def __init__(self, seconds: Callable[[Path], float]) -> None:
        self.seconds = seconds
        self.alive: list[Path] = []
        self.started: list[Path] = []
        self.asked: list[tuple[Path, Request]] = []

    @contextmanager
    def start(self, graph: Path, setup: Setup) -> Iterator[Ask]:
        self.started.append(graph)
        self.alive.append(graph)

        def ask(request: Request) -> Answer:
            self.asked.append((graph, request))
            seconds = self.seconds(graph)
            return Answer([seconds], [4 * seconds if request.new_tokens else 0.0])

        yield ask
        self.alive.remove(graph)


def twice_as_fast(graph: Path) -> float:
    return {"a.onnx": 0.2, "b.onnx": 0.1}[graph.name]


def restart(machine: Machine, setup: Setup = DECODER, graphs: Mapping[str, Path] = GRAPHS, seed: int = 0) -> object:
    return take_turns(graphs, setup, ("latency_ms",), random.Random(seed), machine.start)


def test_both_sides_answer_the_same_texts_after_a_pair_that_warms_up() -> None:
    machine = Machine(twice_as_fast)
    found = take_turns(GRAPHS, DECODER, ("ttft_ms", "decode_tokens_per_s"), random.Random(0), machine.start)
    assert found.reference == {"ttft_ms": [200.0] * PAIRS, "decode_tokens_per_s": [5.0] * PAIRS}
    assert found.candidate == {"ttft_ms": [100.0] * PAIRS, "decode_tokens_per_s": [10.0] * PAIRS}
    pairs = [machine.asked[place : place + 2] for place in range(0, len(machine.asked), 2)]
    assert len(pairs) == 1 + PAIRS
    assert all({graph.name for graph, _ in pair} == {"a.onnx", "b.onnx"} for pair in pairs)
    assert all(pair[0][1] == pair[1][1] for pair in pairs)
    assert len({tuple(pair[0][1].ids[0]) for pair in pairs}) == 1 + PAIRS


def test_processes_are_fresh_alive_together_and_gone_afterwards() -> None:
    machine = Machine(twice_as_fast)
    machine.seconds = lambda graph: float(len(machine.alive))
    found = take_turns(GRAPHS, DECODER, ("ttft_ms",), random.Random(0), machine.start)
    assert set(found.candidate["ttft_ms"]) == {2000.0}
    assert (len(machine.started), machine.alive) == (2, [])


def test_order_of_starts_and_of_turns_is_random() -> None:
    machine = Machine(twice_as_fast)
    for seed in range(50):
        restart(machine, seed=seed)
    starts = Counter(graph.name for graph in machine.started[::2])
    turns = Counter(graph.name for graph, _ in machine.asked[::2])
    # 50 and 450 fair coins: 4 standard deviations are 14 and 42.
    assert abs(starts["a.onnx"] - 25) < 14
    assert abs(turns["a.onnx"] - 225) < 42


def test_candidate_alone_needs_no_reference() -> None:
    machine = Machine(twice_as_fast)
    found = take_turns({"candidate": Path("b.onnx")}, ENCODER, ("texts_per_s",), random.Random(0), machine.start)
    assert (found.reference, found.candidate) == ({}, {"texts_per_s": [40.0] * PAIRS})
    assert {len(request.ids) for _, request in machine.asked} == {4}


def test_measure_judges_every_budget_and_tells_the_conditions() -> None:
    machine, told = Machine(twice_as_fast), list[tuple[int, int, str]]()
    limits = [
        SpeedLimit("decode_tokens_per_s", 1.5, is_ratio=True),
        SpeedLimit("latency_ms", 600, is_ratio=False),
        SpeedLimit("ttft_ms", 0.4, is_ratio=True),
    ]
    verdicts, timing = measure(
        limits, GRAPHS, DECODER, alpha=0.05, fail_alpha=0.05, progress=lambda *so_far: told.append(so_far),
        start=machine.start,
    )  # fmt: skip
    assert [(verdict.outcome, verdict.estimate) for verdict in verdicts] == [
        ("pass", pytest.approx(2)),
        ("pass", pytest.approx(500)),
        ("fail", pytest.approx(0.5)),
    ]
    assert (timing.restarts, timing.pairs, timing.input_tokens, timing.new_tokens, timing.batch) == (8, PAIRS, 8, 5, 1)
    assert timing.cores >= 1 and timing.processor and timing.load_before >= 0
    assert told == [(number, 8, "restarts") for number in range(8)]
    assert len(machine.started) == 16


def test_undecided_measurement_goes_on_to_the_last_look() -> None:
    machine = Machine(lambda graph: 0.1)
    limit = SpeedLimit("decode_tokens_per_s", 1.0, is_ratio=True)
    machine.seconds = lambda graph: 0.1 * (1 + len(machine.started) % 4 / 10 if graph.name == "a.onnx" else 1.1)
    (verdict,), timing = measure([limit], GRAPHS, DECODER, alpha=0.05, fail_alpha=0.05, start=machine.start)
    assert (verdict.outcome, verdict.restarts, timing.restarts) == ("inconclusive", 16, 16)


def test_real_processes_measure_real_graphs() -> None:
    graphs = dict.fromkeys(GRAPHS, DATA / "artifact-v1" / "model.onnx")
    found = take_turns(graphs, DECODER, ("latency_ms",), random.Random(0), Worker)
    assert len(found.reference["latency_ms"]) == len(found.candidate["latency_ms"]) == PAIRS
    assert all(value > 0 for value in (*found.reference["latency_ms"], *found.candidate["latency_ms"]))


def test_graph_that_does_not_load_is_one_line() -> None:
    graph = DATA / "artifact-v1-classifier" / "model.onnx"
    with pytest.raises(CannotRun) as caught, Worker(graph, DECODER):
        pass
    message = f"{graph}: the process that measures its speed ended: {graph}: is no decoder graph"
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "killed, as a system does that runs out of memory"), (signal.SIGTERM, "signal 15")],
)
def test_process_that_dies_is_one_line(number: int, reason: str) -> None:
    graph = DATA / "artifact-v1" / "model.onnx"
    with Worker(graph, DECODER) as worker:
        os.kill(worker.pid, number)
        with pytest.raises(CannotRun, match=rf"^{graph}: the process that measures its speed ended: {reason}"):
            worker(Request([[1]], 2))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_leaving_ends_the_process() -> None:
    with Worker(DATA / "artifact-v1" / "model.onnx", DECODER) as worker:
        assert is_running(worker.pid)
    assert not is_running(worker.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(number: int) -> None:
    program = textwrap.dedent(f"""
        import random
        from pathlib import Path
        from optimizer.speed_restarts import *
        def start(graph, setup):
            worker = Worker(graph, setup)
            print(worker.pid, flush=True)
            return worker
        graphs = dict.fromkeys(["reference", "candidate"], Path({str(DATA / "artifact-v1" / "model.onnx")!r}))
        setup = Setup("decoder", 100, Workload(input_tokens=8, new_tokens=5), 1)
        take_turns(graphs, setup, ("latency_ms",), random.Random(0), start)
    """)
    started = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert started.stdout is not None
    pids = [int(started.stdout.readline()) for _ in range(2)]
    time.sleep(0.3)  # in the middle of the turns
    started.send_signal(number)
    started.communicate()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def test_folder_called_runtime_where_the_user_works_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "bench.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    with Worker(DATA / "artifact-v1" / "model.onnx", DECODER) as worker:
        assert worker(Request([[1, 2]], 2)).first_s
