"""Text over HTTP is the text of the engine, whole and in pieces, in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.generation import TextGenerator

GREEDY = {"temperature": 0, "ignore_eos": True}
HI = [{"role": "user", "content": "hi"}]


def ask(client: Any, route: str = "/v1/completions", **body: Any) -> Any:
    response = client.post(route, json={"prompt": "the", **GREEDY, **body} if "messages" not in body else GREEDY | body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client: Any, route: str, **body: Any) -> list[Any]:
    """Return what a stream says, without its last line."""
    response = client.post(route, json={**GREEDY, **body, "stream": True})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize("prompt", ["def main():", [5, 6, 7], "日本"])
def test_a_completion_is_that_of_the_generator(client: Any, generator: TextGenerator, prompt: Any) -> None:
    want = generator.generate(prompt, max_tokens=20, ignore_eos=True)
    got = ask(client, prompt=prompt, max_tokens=20)
    assert got["choices"] == [
        {"index": 0, "text": want.text, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    usage = {"prompt_tokens": want.prompt_tokens, "completion_tokens": 20, "total_tokens": want.prompt_tokens + 20}
    assert got["usage"] == usage and got["object"] == "text_completion"


@pytest.mark.parametrize("most", range(1, 41))
def test_the_pieces_of_a_stream_join_to_the_whole(client: Any, generator: TextGenerator, most: int) -> None:
    found = events(client, "/v1/completions", prompt="日本", max_tokens=most)
    text = "".join(event["choices"][0]["text"] for event in found)
    assert text == ask(client, prompt="日本", max_tokens=most)["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in found][-1] == "length"


def test_a_chat_goes_through_the_template_and_may_fill_the_context(client: Any, generator: TextGenerator) -> None:
    want = generator.generate(HI, max_tokens=1000, ignore_eos=True)
    got = ask(client, "/v1/chat/completions", messages=HI)
    assert got["choices"][0]["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    assert got["usage"]["total_tokens"] == 128 and got["object"] == "chat.completion"


def test_a_chat_is_streamed_with_its_role_and_its_usage(client: Any) -> None:
    whole = ask(client, "/v1/chat/completions", messages=HI, max_tokens=20)
    options = {"include_usage": True}
    found = events(client, "/v1/chat/completions", messages=HI, max_tokens=20, stream_options=options)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in found[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert found[-1]["choices"] == [] and found[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in found[:-1])
    assert len({event["id"] for event in found}) == 1
