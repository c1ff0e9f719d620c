"""Files of requests: answered once each, by the same routes, whatever happens in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAME = "artifact-v1"


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    asked = {"model": NAME, "prompt": "def main():", "max_tokens": 5, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def read(path: Path) -> dict[str, Any]:
    return {each["custom_id"]: each["response"] for each in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def run(decoder_folder: Path) -> Callable[..., Any]:
    from runtime.server.batch import run_batch
    from runtime.server.loading import EngineOptions, load

    def answer(requests: Path, answers: Path, **options: Any) -> Any:
        served = {NAME: load(decoder_folder, EngineOptions(threads=1, slots=4))}
        return run_batch(served, requests, answers, at_once=4, **options)

    return answer


def test_each_request_gets_what_the_server_would_answer(run: Callable[..., Any], tmp_path: Path, client: Any) -> None:
    asked = [line(f"r{index}", prompt=f"x = {index}", max_tokens=index + 1) for index in range(9)]
    chat = line("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}])
    del chat["body"]["prompt"]
    done = run(write(tmp_path / "in.jsonl", *asked, chat), tmp_path / "out.jsonl")
    assert (done.requests, done.answered, done.refused) == (10, 10, 0)
    found = read(tmp_path / "out.jsonl")
    for each in [*asked, chat]:
        want = client.post(each["url"], json=each["body"]).json()
        got = found[each["custom_id"]]
        assert got["status_code"] == 200
        assert (got["body"]["choices"], got["body"]["usage"]) == (want["choices"], want["usage"])


def test_a_killed_run_goes_on_with_what_is_missing(run: Callable[..., Any], tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", *(line(f"r{index}") for index in range(6)))
    answers = tmp_path / "out.jsonl"
    run(requests, answers)
    whole = answers.read_bytes().splitlines(keepends=True)
    kept = b"".join(whole[:2])
    answers.write_bytes(kept + whole[2][:20])  # killed in the middle of a line
    done = run(requests, answers)
    assert (done.before, done.answered) == (2, 4)
    assert answers.read_bytes().startswith(kept)
    assert sorted(read(answers)) == [f"r{index}" for index in range(6)]
    assert run(requests, answers).answered == 0


def test_a_request_that_is_wrong_is_answered_by_what_is_wrong(run: Callable[..., Any], tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", line("good"), line("bad", max_tokens=-1), line("tools", tools=[{}]))
    done = run(requests, tmp_path / "out.jsonl")
    assert (done.answered, done.refused) == (3, 2)
    found = read(tmp_path / "out.jsonl")
    assert {name: answer["status_code"] for name, answer in found.items()} == {"good": 200, "bad": 400, "tools": 400}
    assert found["bad"]["body"]["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no request"),
        ("{\n", "in.jsonl:1: is not JSON"),
        ('{"custom_id": "a"}\n', "in.jsonl:1: got ['custom_id'], expected an object with body, custom_id"),
        (json.dumps(line("a")) + "\n" + json.dumps(line("a")), "'a' is there twice"),
        (json.dumps(line("a", "/v1/models")), "expected POST and one of"),
        (json.dumps(line("a", stream=True)), "without stream"),
        (json.dumps(line("")), "custom_id: got ''"),
        (json.dumps(line("\ud800")), "custom_id: got '\\ud800'"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_before_any_work(tmp_path: Path, content: str, told: str) -> None:
    from runtime.server.batch import BatchError, run_batch

    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(BatchError) as caught:
        run_batch({}, tmp_path / "in.jsonl", tmp_path / "out.jsonl", at_once=1)
    assert told in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_read_twice_or_gone_on_with_is_refused(tmp_path: Path) -> None:
    from runtime.server.batch import BatchError, run_batch

    requests = write(tmp_path / "in.jsonl", line("a"))
    for paths in ((Path("/dev/zero"), tmp_path / "out.jsonl"), (requests, Path("/dev/null"))):
        with pytest.raises(BatchError, match=r"/dev/\w+: is a pipe or a device, expected a file"):
            run_batch({}, *paths, at_once=1)


@pytest.mark.parametrize("old", ['{"custom_id": ["a"]}', '{"custom_id": ' + "[" * 100_000, "[]"])
def test_an_output_that_is_no_batch_is_left_alone(tmp_path: Path, old: str) -> None:
    from runtime.server.batch import BatchError, run_batch

    requests, answers = write(tmp_path / "in.jsonl", line("a")), tmp_path / "out.jsonl"
    answers.write_text(old + "\n")
    with pytest.raises(BatchError, match=r"out\.jsonl:1: answers nothing of the input"):
        run_batch({}, requests, answers, at_once=1)
    assert answers.read_text() == old + "\n"


def test_a_full_disk_is_told_in_one_line() -> None:
    from runtime.errors import ServingError
    from runtime.server.batch import write_whole

    told = "/dev/full: cannot be written, no space left on device; make room and"
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(ServingError, match=told):
        write_whole(file, b"{}\n")


def test_the_output_of_another_batch_is_left_alone(tmp_path: Path) -> None:
    from runtime.server.batch import BatchError, run_batch

    requests = write(tmp_path / "in.jsonl", line("a"))
    answers = write(tmp_path / "out.jsonl", {"custom_id": "b"})
    before = answers.read_bytes()
    with pytest.raises(BatchError, match=r"out\.jsonl:1: answers nothing of the input"):
        run_batch({}, requests, answers, at_once=1)
    assert answers.read_bytes() == before


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    from runtime.server.batch import BatchError, run_batch

    requests = write(tmp_path / "in.jsonl", line("a"))
    with pytest.raises(BatchError, match="the input itself"):
        run_batch({}, requests, requests, at_once=1)


def test_two_runs_never_write_one_output(tmp_path: Path) -> None:
    import fcntl

    from runtime.server.batch import BatchError, run_batch

    requests = write(tmp_path / "in.jsonl", line("a"))
    with (tmp_path / "out.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BatchError, match="another run writes it"):
            run_batch({}, requests, tmp_path / "out.jsonl", at_once=1)


def test_an_engine_that_fails_ends_the_run_and_leaves_the_request_for_the_next(
    run: Callable[..., Any], tmp_path: Path, decoder_folder: Path
) -> None:
    from runtime.errors import ServingError
    from runtime.server.batch import run_batch
    from runtime.server.loading import EngineOptions, load

    served = load(decoder_folder, EngineOptions(threads=1, slots=4))

    def fail() -> None:
        raise RuntimeError("no more")

    served.engine.engine.step = fail  # type: ignore[method-assign, assignment]
    requests = write(tmp_path / "in.jsonl", line("a"), line("b"))
    with pytest.raises(ServingError, match="no more"):
        run_batch({NAME: served}, requests, tmp_path / "out.jsonl", at_once=1)
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert run(requests, tmp_path / "out.jsonl").answered == 2
