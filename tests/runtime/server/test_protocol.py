"""What OpenAI's clients send is understood or known to be harmless; all else is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runtime.generation import TextGenerator
from runtime.sampler import SamplingParams
from runtime.server.loading import sampling_defaults
from runtime.server.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, RerankBody, TextsBody

HI = [{"role": "user", "content": "hi"}]
HARMLESS: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "stream_options": None,
    "tools": None,
    "tool_choice": "none",
    "functions": [],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "reasoning_effort": None,
    "logit_bias": None,
    "stop": None,
    "n": 1,
    "top_logprobs": None,
    "presence_penalty": 0,
    "max_tokens": None,
}


def chat(client: Any, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HI, "max_completion_tokens": 3, **body})


def complete(client: Any, **body: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "the", "max_tokens": 3, **body})


def refused(response: Any, status: int = 400) -> tuple[Any, str]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_accepted(client: Any, name: str) -> None:
    assert chat(client, **{name: HARMLESS[name]}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("guided_json", {}),
        ("max_token", 5),
        ("temperature", "hot"),
        ("temperature", True),
        ("n", 0),
        ("n", 257),
        ("stop", [""]),
        ("stop", 7),
        ("stop", ["x"] * 65),
        ("top_p", 0),
        ("top_k", -2),
        ("seed", 1 << 64),
        ("seed", 0.5),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"288": 1}),
        ("logit_bias", {"7": 101}),
        ("logit_bias", {str(token): 0 for token in range(1025)}),
        ("presence_penalty", 3),
        ("min_tokens", 4),
        ("stop_token_ids", [288]),
        ("max_completion_tokens", 0),
        ("top_logprobs", 2),
        ("service_tier", "gold"),
        ("messages", []),
        ("chat_template_kwargs", {"x": []}),
        ("chat_template_kwargs", {"messages": "x"}),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(client: Any, name: str, value: Any) -> None:
    param, message = refused(chat(client, **{name: value}))
    assert param.split("[")[0].split(".")[0] == name and message.startswith(name)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0]"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 7}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content"),
        ({"role": "user", "content": "x", "weight": 1}, "messages[0].weight"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls"),
    ],
)
def test_a_message_that_is_not_text_is_refused(client: Any, message: Any, param: str) -> None:
    assert refused(chat(client, messages=[message]))[0] == param


def test_a_template_may_have_variables_of_any_name_but_messages(client: Any) -> None:
    assert chat(client, chat_template_kwargs={"self": "x", "variables": 1, "": True}).status_code == 200


@pytest.mark.parametrize("content", [b'{"prompt": "\xff"}', b'{"max_tokens": ' + b"9" * 5000 + b"}"])
def test_a_body_that_cannot_be_read_is_told(client: Any, content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert refused(response) == (None, "body: cannot be read, expected JSON in UTF-8")


def test_a_model_that_nobody_named_is_one_that_can(client: Any) -> None:
    response = client.post("/v1/embeddings", json={"input": "x"})
    assert refused(response) == ("model", "model: none of those served here is of the kind embedder")


def test_half_a_character_is_told_written_out(client: Any) -> None:
    content = b'{"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]}'
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert "got a part of type '\\ud800', expected text" in refused(response)[1]


@pytest.mark.parametrize("content", [b"{", b'{"prompt": "a"} x'])
def test_what_is_no_json_is_told_by_its_place(client: Any, content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    param, message = refused(response)
    assert param is None and message.startswith("body: is not JSON at character ")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (DetokenizeBody, {"tokens": ["x"] * 100}),
        (TextsBody, {"input": [{}] * 100}),
        (RerankBody, {"query": "x", "documents": [7] * 100}),
        (CompletionBody, {"prompt": [-1] * 100}),
        (CompletionBody, {f"field_{index}": 1 for index in range(100)}),
        (CompletionBody, {"prompt": "x", "stop_token_ids": ["x"] * 100}),
        (CompletionBody, {"prompt": "x", "metadata": {str(index): 1 for index in range(100)}}),
        (CompletionBody, {"prompt": "x", "logit_bias": {str(index): "x" for index in range(2000)}}),
        (ChatBody, {"messages": HI, "chat_template_kwargs": {str(index): [] for index in range(100)}}),
        (ChatBody, {"messages": [{"role": "user"}] * 100}),
    ],
)
def test_a_mistake_made_often_is_looked_at_once(kind: type[Body], content: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(content)
    assert caught.value.error_count() <= 2  # of a union, one for each of what it may be


def test_messages_as_clients_send_them_back_are_read() -> None:
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": None}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatBody.model_validate(
        {
            "messages": [
                {"role": "developer", "content": "be brief"},
                answer,
                {"role": "user", "content": parts, "name": "x"},
            ]
        }
    )
    assert body.conversation == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "a\nb", "name": "x"},
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "x"]),
        ("prompt", [-1]),
        ("prompt", [288]),
        ("prompt", ["x"] * 257),
        ("prompt", {"a": 1}),
        ("prompt", None),
        ("suffix", "x"),
        ("best_of", 2),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("messages", HI),
    ],
)
def test_a_completion_is_refused_by_the_name_of_what_is_wrong(client: Any, name: str, value: Any) -> None:
    param, message = refused(complete(client, **{name: value}))
    assert param.split("[")[0].split(".")[0] == name and message.startswith(name)


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(client: Any) -> None:
    assert "got 128 tokens, expected fewer than the context of 128" in refused(complete(client, prompt=[5] * 128))[1]
    assert refused(complete(client, prompt=[5] * 128))[0] == "prompt"


def test_an_unknown_model_is_not_found_and_the_only_one_need_not_be_named(client: Any) -> None:
    assert refused(chat(client, model="gpt-4o"), 404) == ("model", "model: got 'gpt-4o', expected one of artifact-v1")
    assert chat(client, model="artifact-v1").json()["model"] == chat(client).json()["model"] == "artifact-v1"
    assert client.get("/v1/models/artifact-v1").json()["id"] == "artifact-v1"
    assert refused(client.get("/v1/models/gpt-4o"), 404)[0] == "model"
    assert refused(client.get("/v1/nothing"), 404)
    assert refused(client.get("/v1/completions"), 405)


def test_what_is_not_said_is_as_the_model_s_own_file_has_it_or_as_openai_does(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": true, "eos_token_id": 2}')
    defaults = sampling_defaults(tmp_path)
    body = ChatBody(messages=HI, seed=-1, top_p=0.5)
    assert body.sampling(defaults) == SamplingParams(temperature=0.6, top_k=20, top_p=0.5, seed=2**64 - 1)
    assert body.sampling({}) == SamplingParams(temperature=1.0, top_p=0.5, seed=2**64 - 1)
    assert body.model_copy(update={"temperature": 1e-9}).sampling({}).temperature == 0  # as some write greedy
    assert ChatBody(messages=HI, top_k=-1, seed=0).sampling(defaults).top_k == 0
    assert ChatBody(messages=HI).sampling({}).seed != ChatBody(messages=HI).sampling({}).seed
    for broken in ("[]", "{", '{"temperature": "hot"}', '{"temperature": -1}'):
        file.write_text(broken)
        assert sampling_defaults(tmp_path) == {}
    assert sampling_defaults(tmp_path / "missing") == {}


def test_every_field_of_sampling_reaches_the_engine(client: Any, generator: TextGenerator) -> None:
    params = SamplingParams(
        temperature=1.5,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((40, 3.0), (50, -100.0)),
        seed=11,
    )
    want = generator.generate("the", max_tokens=30, min_tokens=5, sampling=params, stop=["q"], stop_token_ids=[60])
    got = complete(
        client,
        max_tokens=30,
        temperature=1.5,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={"40": 3, "50": -100},
        seed=11,
        min_tokens=5,
        stop="q",
        stop_token_ids=[60],
    )
    choice = got.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        want.text,
        want.finish_reason,
        want.stop_reason,
    )
    assert got.headers["x-seed"] == "11"


def test_prompts_are_one_or_several_texts_or_ids() -> None:
    for given, want in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        assert CompletionBody.model_validate({"prompt": given}).prompts == want
