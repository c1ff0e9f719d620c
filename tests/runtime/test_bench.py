"""Measuring speed: what is asked, what is counted, and a process that answers one request after another."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.bench import Answer, Request, Workload, _generate, metrics_of, open_bench, speeds
from runtime.errors import SessionError

ROOT = Path(__file__).parents[2]


class Asked:
    """Answers with the seconds it was given, and remembers what it was asked."""

    def __init__(self, first_s: Sequence[float], rest_s: Sequence[float]) -> None:
        self.answer, self.requests = Answer(first_s, rest_s), list[Request]()

    def __call__(self, request: Request) -> Answer:
        self.requests.append(request)
        return self.answer


def bench(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


def test_decoder_is_counted_in_prompt_tokens_and_in_tokens_after_the_first() -> None:
    ask = Asked([0.2, 0.5, 0.4], [0.9, 0.6, 3.0])
    found = speeds(ask, [[1] * 128], 31, metrics_of("decoder"))
    # Medians: 0.4 s to the first token, 0.9 s for the other 30, and 1.1 s of the whole requests 1.1, 1.1 and 3.4.
    assert found == pytest.approx(
        {"prefill_tokens_per_s": 320, "decode_tokens_per_s": 30 / 0.9, "ttft_ms": 400, "latency_ms": 1100}
    )
    assert [(len(request.ids), request.new_tokens) for request in ask.requests] == [(1, 31)]


def test_encoder_is_asked_one_text_for_latency_and_the_batch_for_its_rate() -> None:
    ask = Asked([0.5], [0.0])
    assert speeds(ask, [[1, 2]] * 8, 0, metrics_of("embedder")) == {"latency_ms": 500, "texts_per_s": 16}
    assert [len(request.ids) for request in ask.requests] == [1, 8]


def test_only_what_is_wanted_is_measured() -> None:
    ask = Asked([0.5], [0.0])
    assert speeds(ask, [[1, 2]] * 8, 0, ["texts_per_s"]) == {"texts_per_s": 16}
    assert len(ask.requests) == 1
    assert speeds(Asked([0.5], [0.1]), [[1, 2]], 2, ["ttft_ms"]) == {"ttft_ms": 500}


def test_workload_is_that_of_the_kind() -> None:
    workload, chance = Workload(input_tokens=5, new_tokens=3, batch=4), random.Random(0)
    assert (workload.tokens("decoder"), workload.tokens("reranker")) == (8, 5)
    (prompt,), texts = (workload.texts(kind, 7, chance) for kind in ("decoder", "classifier"))
    assert len(prompt) == 5
    assert [len(text) for text in texts] == [5] * 4
    assert {token for text in texts for token in text} <= set(range(7))


class Session:
    """A decoder that always prefers the token after the last one."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object, int]] = []

    def run(self, ids: Sequence[int], past: int, rows: Sequence[int]) -> NDArray[np.float32]:
        self.calls.append(("run", len(ids), past))
        assert rows == [len(ids) - 1]
        return np.eye(300, dtype=np.float32)[[ids[-1] + 1]]

    def step(self, token: int, past: int) -> NDArray[np.float32]:
        self.calls.append(("step", token, past))
        return np.eye(300, dtype=np.float32)[token + 1]


def test_generation_prefills_in_chunks_and_feeds_each_token_back() -> None:
    session = Session()
    first_s, rest_s = _generate(session, Request([list(range(200))], 4))  # type: ignore[arg-type]
    assert session.calls == [
        ("run", 128, 0),
        ("run", 72, 128),
        ("step", 200, 200),
        ("step", 201, 201),
        ("step", 202, 202),
    ]
    assert first_s > 0 and rest_s > 0


def test_request_is_repeated_for_as_long_as_asked(classifier_folder: Path) -> None:
    ask = open_bench(classifier_folder / "model.onnx", "classifier", threads=1)
    assert len(ask(Request([[1, 2, 3]])).first_s) == 1
    answer = ask(Request([[1, 2, 3]] * 2, at_least_s=0.02))
    assert len(answer.first_s) == len(answer.rest_s) > 1
    assert sum(answer.first_s) <= 0.5
    assert set(answer.rest_s) == {0}


def test_graph_of_another_kind_is_refused(classifier_folder: Path) -> None:
    with pytest.raises(SessionError, match="is no decoder graph"):
        open_bench(classifier_folder / "model.onnx", "decoder", threads=1, capacity=8)


def test_process_answers_requests_until_its_input_ends(decoder_folder: Path) -> None:
    request = json.dumps({"ids": [[1, 2, 3]], "new_tokens": 4, "at_least_s": 0})
    options = ("--serve", "decoder", "--threads", 1, "--capacity", 8)
    done = bench(decoder_folder / "model.onnx", *options, input=f"{request}\n{request}\n")
    loaded, *answers = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, done.stderr, loaded) == (0, "", {"loaded": True})
    assert [sorted(answer) for answer in answers] == [["first_s", "rest_s"]] * 2
    assert all(answer["rest_s"][0] > 0 for answer in answers)


def test_process_that_cannot_load_says_why_in_one_line(tmp_path: Path) -> None:
    done = bench(tmp_path / "model.onnx", "--serve", "decoder", input="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path}/model.onnx: no such file; expected an ONNX graph\n"


@pytest.mark.parametrize("name", ["decoder_folder", "classifier_folder", "embedder_folder", "reranker_folder"])
def test_person_is_told_every_metric_of_an_artifact(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    done = bench(folder, "--threads", 1, "--input-tokens", 8, "--new-tokens", 4, "--rounds", 2)
    assert (done.returncode, done.stderr) == (0, "")
    kind = name.removesuffix("_folder")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(metrics_of(kind))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input-tokens", 1000), "got 1032 tokens, expected at most the context of"),
        (("--new-tokens", 1), "argument --new-tokens: got '1', expected a whole number of at least 2"),
        (("--threads", "x"), "argument --threads: got 'x', expected a whole number of at least 1"),
    ],
)
def test_person_is_told_what_is_wrong(decoder_folder: Path, arguments: tuple[object, ...], message: str) -> None:
    done = bench(decoder_folder, *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr.splitlines()[-1]


def test_measuring_needs_only_what_serving_needs(decoder_folder: Path) -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "tokenizers", "optimizer", "passes")
    code = f"import sys, runtime.bench; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == "[]\n"
