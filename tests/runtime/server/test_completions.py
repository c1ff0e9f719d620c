"""Text over HTTP is the text of the engine, whole and in pieces, in OpenAI's shapes."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from runtime.generation import TextGenerator
from runtime.server.completions import CompletionShape

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


def test_several_prompts_have_several_answers_each_whose_seeds_follow_one_another(client: Any) -> None:
    hot = {"temperature": 1.5, "max_tokens": 12}
    got = ask(client, prompt=["the", "日本"], n=3, seed=40, **hot)
    assert [choice["index"] for choice in got["choices"]] == list(range(6))
    alone = [
        ask(client, prompt=prompt, seed=seed, **hot)["choices"][0]["text"]
        for prompt in ("the", "日本")
        for seed in (40, 41, 42)
    ]
    assert [choice["text"] for choice in got["choices"]] == alone and len(set(alone)) > 2
    assert got["usage"]["completion_tokens"] == 72 and got["usage"]["prompt_tokens"] < 10


def test_a_stream_of_several_answers_joins_to_the_whole(client: Any) -> None:
    body = {"prompt": ["the", "日本"], "n": 2, "max_tokens": 12, "echo": True, "temperature": 1.2, "seed": 3}
    texts = ["", "", "", ""]
    for event in events(client, "/v1/completions", **body):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in ask(client, **body)["choices"]]
    assert texts[0].startswith("the") and texts[3].startswith("日本")


def test_usage_may_stand_in_every_event(client: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(client, "/v1/completions", prompt="the", max_tokens=8, stream_options=options)
    counted = [event["usage"]["completion_tokens"] for event in found]
    assert counted == sorted(counted) and counted[0] > 0 and counted[-1] == 8


def test_a_seed_that_was_not_given_is_told_and_draws_the_same_again(client: Any) -> None:
    first = client.post("/v1/completions", json={"prompt": "the", "max_tokens": 12})
    again = client.post(
        "/v1/completions", json={"prompt": "the", "max_tokens": 12, "seed": int(first.headers["x-seed"])}
    )
    assert first.json()["choices"][0]["text"] == again.json()["choices"][0]["text"]


def test_logprobs_are_those_of_the_generator_in_both_shapes(client: Any, generator: TextGenerator) -> None:
    want = generator.generate("日本", max_tokens=6, logprobs=2, ignore_eos=True)
    assert want.logprobs is not None
    legacy = ask(client, prompt="日本", max_tokens=6, logprobs=2)["choices"][0]["logprobs"]
    assert legacy["token_logprobs"] == [each.logprob for each in want.logprobs]
    for each, top in zip(want.logprobs, legacy["top_logprobs"], strict=True):
        assert max(top.values()) == max(each.logprob, *(logprob for _, logprob in each.top))
    assert [len(legacy[name]) for name in ("tokens", "text_offset")] == [6, 6]
    body = {"messages": HI, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    chat = ask(client, "/v1/chat/completions", **body)["choices"][0]
    spelled = b"".join(bytes(each["bytes"]) for each in chat["logprobs"]["content"])
    assert spelled.decode(errors="replace") == chat["message"]["content"]
    assert all(len(each["top_logprobs"]) == 2 for each in chat["logprobs"]["content"])
    streamed = [event["choices"][0]["logprobs"] for event in events(client, "/v1/chat/completions", **body)]
    assert [each for found in streamed if found for each in found["content"]] == chat["logprobs"]["content"]


def test_offsets_point_into_the_text(client: Any) -> None:
    choice = ask(client, prompt="the quick", max_tokens=8, logprobs=0, echo=True, logit_bias={"70": 50})["choices"][0]
    found = choice["logprobs"]
    assert found["top_logprobs"] is None
    for token, at in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][at:].startswith(token)


def test_a_prompt_is_scored_as_evaluation_harnesses_ask_for_it(client: Any, generator: TextGenerator) -> None:
    ids = generator.tokenizer.encode("the quick brown fox")
    want = generator.generate(ids, max_tokens=1, prompt_logprobs=1, ignore_eos=True).prompt_logprobs
    assert want is not None
    none = ask(client, prompt=ids, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    one = ask(client, prompt=ids, max_tokens=1, echo=True, logprobs=1, ignore_eos=False)["choices"][0]
    scored = [None if each is None else each.logprob for each in want]
    assert none["logprobs"]["token_logprobs"] == one["logprobs"]["token_logprobs"][:-1] == scored
    assert none["text"] == "the quick brown fox" and one["text"].startswith(none["text"])
    assert len(one["logprobs"]["tokens"]) == len(ids) + 1


@pytest.mark.parametrize("seed", range(4))
def test_one_token_after_a_scored_prompt_counts_even_if_it_ends_the_answer(client: Any, seed: int) -> None:
    biased = {"logit_bias": {"0": 100}, "ignore_eos": False}  # EOS
    got = ask(client, prompt=[5, 6, 7], max_tokens=1, echo=True, logprobs=1, **biased)["choices"][0]
    assert len(got["logprobs"]["token_logprobs"]) == 4
    short = ask(client, prompt=[5, 6, 7], max_tokens=5, **biased)
    assert short["choices"][0]["finish_reason"] == "stop" and short["usage"]["completion_tokens"] == 0


def test_text_becomes_ids_and_ids_become_text(client: Any, generator: TextGenerator) -> None:
    def post(route: str, **body: Any) -> Any:
        return client.post(route, json=body).json()

    ids = generator.tokenizer.encode("the 日本")
    got = post("/tokenize", prompt="the 日本", return_token_strs=True)
    assert got["tokens"] == ids and got["count"] == len(ids) == len(got["token_strs"]) and got["max_model_len"] == 128
    assert post("/detokenize", tokens=ids) == {"prompt": "the 日本"}
    chat = post("/tokenize", messages=HI)["tokens"]
    assert chat == generator.tokenizer.encode_chat(HI)
    assert post("/detokenize", tokens=chat)["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for route, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": HI}),
        ("/detokenize", {"tokens": [288]}),
    ):
        assert client.post(route, json=body).status_code == 400


def test_metrics_count_what_was_answered(app_of: Any, client_of: Any) -> None:
    from runtime.server.settings import Settings

    with client_of(app_of(Settings(dollars_per_hour=3.6))) as client:
        ask(client, max_tokens=8)
        ask(client, max_tokens=4)
        assert client.get("/nothing").status_code == 404
        lines = client.get("/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    name = '{model_name="artifact-v1"}'
    assert float(found[f"vllm:generation_tokens_total{name}"]) == 12
    assert float(found[f"vllm:prompt_tokens_total{name}"]) == 2
    assert float(found['vllm:request_success_total{finished_reason="length",model_name="artifact-v1"}']) == 2
    assert float(found[f"vllm:time_to_first_token_seconds_count{name}"]) == 2
    assert float(found[f"vllm:request_generation_tokens_sum{name}"]) == 12
    assert float(found[f"vllm:num_requests_running{name}"]) == float(found[f"vllm:kv_cache_usage_perc{name}"]) == 0
    assert float(found['optimize_http_requests_total{route="/v1/completions",status="200"}']) == 2
    assert float(found['optimize_http_requests_total{route="other",status="404"}']) == 1
    busy = float(found[f"optimize_engine_busy_seconds_total{name}"])
    assert float(found['optimize_cost_dollars_total{time="busy"}']) == pytest.approx(busy / 1000)
    assert float(found['optimize_cost_dollars_total{time="reserved"}']) >= busy / 1000


def test_models_tell_what_they_can(client: Any) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert {"id": "artifact-v1", "object": "model", "kind": "decoder", "max_model_len": 128}.items() <= model.items()
    assert set(model["determinism"]) == {"rows", "chunks", "phases"}
    assert len(model["digest"]) == 64 and model["vocabulary"] == 288 and model["slots"] == 4


def test_a_whole_answer_is_written_beside_the_event_loop(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    whole = CompletionShape.whole

    def watched(self: CompletionShape, *args: Any) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return whole(self, *args)

    monkeypatch.setattr(CompletionShape, "whole", watched)
    ask(client, max_tokens=3, logprobs=2)
    assert len(threads) == 1 and threads[0].startswith("reader")
