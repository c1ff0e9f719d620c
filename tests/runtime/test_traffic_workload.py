"""What is asked, and when."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from runtime.errors import LoadError
from runtime.traffic.workload import Range, Workload, arrivals, read_prompts

DRAWN = Workload(Range(8, 16), Range(3, 5), seed=1, vocabulary=50)


def test_a_question_depends_on_the_seed_and_its_number_alone() -> None:
    numbers = range(-5, 40)
    questions = {number: DRAWN.question(number) for number in numbers}
    assert questions == {number: DRAWN.question(number) for number in reversed(numbers)}
    assert len({tuple(question.prompt) for question in questions.values()}) == len(questions)  # type: ignore[arg-type]
    assert DRAWN.question(0) != Workload(Range(8, 16), Range(3, 5), seed=2, vocabulary=50).question(0)


def test_lengths_and_ids_stay_in_their_ranges_and_reach_their_ends() -> None:
    questions = [DRAWN.question(number) for number in range(300)]
    assert {len(question.prompt) for question in questions} == set(range(8, 17))
    assert {question.max_tokens for question in questions} == {3, 4, 5}
    assert {token for question in questions for token in question.prompt} == set(range(50))


def test_texts_and_conversations_are_of_words() -> None:
    text = Workload(Range(7, 7), Range(1, 1), form="text").question(0).prompt
    assert isinstance(text, str) and len(text.split()) == 7
    (message,) = Workload(Range(7, 7), Range(1, 1), form="chat").question(0).prompt
    assert message == {"role": "user", "content": text}


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = list(islice(arrivals(50, seed=3), 10_000))
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert min(gaps) > 0
    assert mean == pytest.approx(1 / 50, rel=0.04)  # four standard errors, 1 / sqrt(10,000) of the mean each
    assert deviation == pytest.approx(mean, rel=0.06)  # as an exponential's; its error is sqrt(2) times as large
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)  # exp(-1), four errors
    assert times == list(islice(arrivals(50, seed=3), 10_000)) != list(islice(arrivals(50, seed=4), 10_000))


@pytest.mark.parametrize(("text", "want"), [("32:128", Range(32, 128)), ("64", Range(64, 64)), ("1:1", Range(1, 1))])
def test_a_range_is_read(text: str, want: Range) -> None:
    assert Range.parse("--x", text) == want


@pytest.mark.parametrize("text", ["", "0", "9:8", "a", "1:b", ":4", "-1", "1:2:3", "4:", "²", "9" * 5000])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match=r"--x: got '.*', expected 1 to 9999999, or LEAST:MOST"):
        Range.parse("--x", text)


def test_prompts_of_a_file_are_asked_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "id": 7}\n\n{"prompt": [1, 2]}\n')
    workload = Workload(Range(1, 1), Range(4, 4), prompts=read_prompts(path, is_chat=False))
    assert [workload.question(number).prompt for number in range(3)] == ["one", [1, 2], "one"]


def test_a_line_ends_at_a_line_break_and_at_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "one\u2028line\x85still"}\r\n{"prompt": "two"}\n'.encode())
    assert read_prompts(path, is_chat=False) == ("one\u2028line\x85still", "two")


def test_with_chat_a_text_becomes_a_message(tmp_path: Path) -> None:
    path, messages = tmp_path / "prompts.jsonl", [{"role": "system", "content": "be short"}]
    path.write_text('{"prompt": "one"}\n' + json.dumps({"messages": messages}) + "\n")
    assert read_prompts(path, is_chat=True) == ([{"role": "user", "content": "one"}], messages)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"p\.jsonl: is empty, expected a prompt in each line"),
        ('{"prompt": "x"}\n{', r"p\.jsonl:2: is not JSON"),
        ('{"prompt": ' + "[" * 100_000, r"p\.jsonl:1: is not JSON"),
        ("[1]", r"p\.jsonl:1: lacks a prompt"),
        ('{"prompt": ""}', r"p\.jsonl:1: lacks a prompt"),
        ('{"prompt": ["a"]}', r"p\.jsonl:1: prompt: expected a text or a list of token ids"),
        ('{"messages": [{}]}', r"p\.jsonl:1: got messages, expected a prompt; add --chat"),
        ('{"messages": "hi"}', r"p\.jsonl:1: messages: got str, expected a list of objects"),
    ],
)
def test_a_wrong_line_is_told_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(LoadError, match=message):
        read_prompts(path, is_chat=False)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read, no such file or directory"):
        read_prompts(tmp_path / "gone", is_chat=False)
