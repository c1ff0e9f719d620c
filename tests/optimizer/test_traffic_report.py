"""`optimize bench` as a person sees it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from optimizer.cli import main
from optimizer.traffic_report import lines, svg
from runtime.traffic.bench import Bench, Settings
from runtime.traffic.measure import Load, Measured, Record, Work
from runtime.traffic.metrics import summarize
from runtime.traffic.workload import Range

DATA = Path(__file__).parents[1] / "data"
RECORDS = [
    Record(0, 0.0, 0.0, 1.5, (0.5, 1.0, 1.5), 10, 3, 3),
    Record(1, 0.0, 0.0, 2.0, (1.0, 2.0), 20, 2, 4),
    Record(2, 1.5, 1.5, 2.0, (), None, 0, 4, "answered 503, busy"),
]


def bench(**about: Any) -> Bench:
    limits, work = {"ttft_ms": 600.0}, Work(1.0, 0.25, 0.75, 3_000_000_000)
    settings = Settings(Load(concurrency=2, requests=3, warm_up=1), Range(10, 20), Range(3, 4), limits=limits)
    known: dict[str, Any] = {
        "date": "2026-11-25T18:00:00+00:00",
        "target": "artifacts/x",
        "model": "0" * 64,
        "kind": "decoder",
        "settings": settings,
        "vocabulary": 256,
        "is_complete": True,
        "is_counted": True,
        "memory_bytes_per_s": 16e9,
        "summary": summarize(Measured(RECORDS, work), limits, 36.0),
        "requests": tuple(RECORDS),
    }
    return Bench(**known | about)


def test_the_table_says_all_that_was_measured() -> None:
    assert list(lines(bench())) == [
        "artifacts/x (decoder): 2 clients, 1 to warm up; 10 to 20 tokens in, 3 to 4 out; seed 0",
        "3 requests in 2.00 s, 1 failed (the first: answered 503, busy), 1 answers shorter than asked",
        "",
        "ms             p50       p90       p99      mean       max",
        "TTFT         750.0     950.0     995.0     750.0      1000",
        "TPOT         750.0     950.0     995.0     750.0      1000",
        "ITL          500.0     900.0     990.0     666.7      1000",
        "E2E           1750      1950      1995      1750      2000",
        "",
        "output    2.5 tokens/s",
        "total     17.5 tokens/s, prompts included",
        "requests  1.00 /s",
        "goodput   0.50 /s (33.3 % of requests) within ttft_ms <= 600",
        "busy      1.00 s",
        "cost      $166.7 input, $3000 output per million tokens, by reserved time",
        "          $83.33 input, $1500 output per million tokens, by busy time",
        "memory    4.0 GB/s in decode steps, 25 % of the 16.0 that a plain read reaches",
    ]


def test_the_table_says_what_is_not_known() -> None:
    settings = Settings(Load(rate=2.5, seconds=9), Range(1, 1), Range(3, 3), prompts=("a", "b"), dollars_per_hour=1)
    summary = summarize(Measured(RECORDS[:2]), dollars_per_hour=1)
    text = "\n".join(
        lines(bench(kind="server", settings=settings, summary=summary, is_counted=False, is_complete=False))
    )
    assert "2.5 arrivals/s (Poisson), 0 to warm up; 2 prompts of a file, 3 out" in text
    assert "interrupted: these are the requests that had ended" in text
    assert "tokens counted by pieces: the server sent no usage" in text
    assert "busy      unknown: the target does not tell" in text and "unknown, by busy time" in text
    assert "memory" not in text and "goodput" not in text


def test_the_drawing_has_a_panel_for_each_latency() -> None:
    root = ElementTree.fromstring(svg(bench()))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text.split(",")[0] for text in texts if "by percent" in text] == ["TTFT", "TPOT", "ITL", "E2E"]
    assert "p50 750.0" in texts and "p99 995.0" in texts  # as in the table
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 4


@pytest.mark.parametrize("seconds", [(1.0, 1.0, 1.0), (0.1, 0.1, 2.0), (1.0, 1.9, 2.0)])
def test_labels_keep_within_their_panel_and_off_each_other(seconds: tuple[float, ...]) -> None:
    records = tuple(Record(at, 0.0, 0.0, end, (end,), 1, 1, 1) for at, end in enumerate(seconds))
    root = ElementTree.fromstring(svg(bench(requests=records)))
    for rect in list(root.iter("{http://www.w3.org/2000/svg}rect"))[1:]:
        left, top = float(rect.attrib["x"]), float(rect.attrib["y"])
        lines_of = [
            float(text.attrib["y"]) - top
            for text in root.iter("{http://www.w3.org/2000/svg}text")
            if (text.text or "").startswith(("p50 ", "p90 ", "p99 "))
            and 0 < float(text.attrib["x"]) - left < 280
            and 0 < float(text.attrib["y"]) - top + 20 < 220
        ]
        assert len(lines_of) == 3 and min(lines_of) >= 12 and max(lines_of) <= 160
        assert min(b - a for a, b in pairwise(sorted(lines_of))) >= 12  # pixels of a font of 12


LOAD = ["--threads", "1", "--requests", "4", "--input-tokens", "4", "--output-tokens", "3", "--warm-up", "1"]


def test_a_command_prints_a_table_or_a_document_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(DATA / "artifact-v1-classifier")
    assert main(["bench", target, *LOAD, "--plot", str(tmp_path / "x.svg")]) == 0
    assert "4 requests in " in capsys.readouterr().out
    ElementTree.parse(tmp_path / "x.svg")
    assert main(["bench", target, *LOAD, "--json", "--rate", "1000"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], len(document["requests"])) == ("classifier", 4)
    assert document["settings"]["load"]["rate"] == 1000


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["htp://x"], 2, "htp://x: is no address of a server"),
        (["http://127.0.0.1:9"], 4, "http://127.0.0.1:9: cannot be reached, connection refused"),
        (["x", "--rate", "1", "--concurrency", "1"], 2, "load: expected one of --concurrency"),
        (["x", "--goodput", "ttft:1"], 2, "--goodput: got 'ttft:1'"),
        (["x", "--input-tokens", "9:1"], 2, "--input-tokens: got '9:1'"),
        (["x", "--plot", "x.png"], 2, "--plot: got x.png, expected a name that ends in .svg"),
        (["x"], 4, "x: is not a folder"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and len(err.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals to oneself")
def test_ctrl_c_prints_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    target = str(DATA / "artifact-v1-classifier")
    assert main(["bench", target, "--threads", "1", "--input-tokens", "4", "--seconds", "60"]) == 130
    out, err = capsys.readouterr()
    assert "interrupted: these are the requests that had ended" in out and " failed" in out
    assert err == "interrupted\n"
