"""What a client makes of a stream: when pieces came, how many tokens, what went wrong."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sse_server import Event, Script, StepClock, delta, served, token, usage

pytest.importorskip("httptools", reason="needs the extra serve")

from runtime.errors import LoadError, ServingError
from runtime.traffic.http_client import HttpClient, host_header
from runtime.traffic.measure import Heard, Load, Measurement, Work
from runtime.traffic.server import Server
from runtime.traffic.workload import Prompt, Question, Range, Workload

DONE: Event = (0.0, "data: [DONE]\n\n")
ANSWER: list[Event] = [
    (0.25, token("a")),
    (0.0625, token("")),  # a token that is no whole character yet
    (0.125, token("b")),
    (0.5, token("", "length")),
    (0.5, usage(7, 4)),
    DONE,
]


def heard(script: Script, prompt: Prompt = (1, 2, 3), clock: StepClock | None = None) -> Heard:
    clock = clock or StepClock()

    async def ask(url: str) -> Heard:
        server = Server(url, clock=clock)
        async with server.opened():
            return await server.ask(Question(0, prompt, 4))

    with served(script, clock) as url:
        return asyncio.run(ask(url))


def test_ttft_tpot_and_itl_are_the_servers_delays_exactly() -> None:
    clock, script = StepClock(), Script(ANSWER)

    async def measure(url: str) -> Any:
        load = Load(concurrency=1, requests=2)
        workload = Workload(Range(3, 3), Range(4, 4))
        return await Measurement(Server(url, clock=clock), workload, load, clock=clock).run()

    with served(script, clock) as url:
        measured = asyncio.run(measure(url))
    for record in measured.records:
        assert record.error is None
        assert (record.ttft_s, record.itl_s) == (0.25, (0.0625, 0.125))  # what comes after the last token is no token
        assert record.e2e_s == 0.4375 and record.tpot_s == 0.1875 / 3
        assert (record.input_tokens, record.output_tokens, record.asked_tokens) == (7, 4, 4)
    assert measured.is_counted
    assert script.connections == 1  # kept, with that of /metrics


def test_a_request_says_all_that_makes_answers_alike() -> None:
    script = Script(ANSWER)
    heard(script)
    assert script.asked == [
        (
            "/v1/completions",
            {
                "model": "",
                "prompt": [1, 2, 3],
                "max_tokens": 4,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
    ]


def test_without_usage_pieces_are_counted_and_the_prompt_is_what_was_sent() -> None:
    found = heard(Script([event for event in ANSWER if event[1] != usage(7, 4)]))
    assert (found.output_tokens, found.input_tokens, found.is_counted) == (3, 3, False)
    assert heard(Script([ANSWER[0], DONE]), "a text").input_tokens is None


def test_a_chat_begins_with_a_role_that_is_no_token() -> None:
    events: list[Event] = [
        (1.0, delta(role="assistant", content="")),
        (1.0, delta(content="a")),
        (0.5, delta(content="")),
        (0.5, delta(reasoning_content="hm")),
        (2.0, delta("stop")),
        (0.0, usage(9, 3)),
        DONE,
    ]
    script, clock = Script(events), StepClock()
    begin = clock.now
    found = heard(script, [{"role": "user", "content": "x"}], clock)
    assert [at - begin for at in found.arrivals_s] == [2.0, 2.5, 3.0]
    path, body = script.asked[0]
    assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "x"}]


def test_pieces_with_text_count_wherever_they_stand() -> None:
    whole = heard(Script([(1.0, delta(role="assistant", content="a")), (1.0, delta("stop", content="b")), DONE]))
    assert len(whole.arrivals_s) == 2
    assert len(heard(Script([(1.0, token("all", "stop")), DONE])).arrivals_s) == 1


def test_events_may_be_cut_anywhere_or_come_together() -> None:
    text = "".join(f"data: {json.dumps(token(c))}\r\n\r\n" for c in "abc") + ": a comment\n\ndata:[DONE]\n\n"
    want = heard(Script([(0.0, text)]))
    assert want.output_tokens == 3
    for size in (1, 7, 50):
        cut = [(0.0, text[at : at + size]) for at in range(0, len(text), size)]
        assert heard(Script(cut)).output_tokens == 3


def test_a_body_may_end_with_its_connection() -> None:
    assert heard(Script(ANSWER, is_framed=False)).output_tokens == 4


def test_a_connection_closed_while_idle_is_made_anew() -> None:
    script = Script(ANSWER, closes=True)

    async def ask_twice(url: str) -> None:
        server = Server(url)
        async with server.opened():
            for number in range(2):
                await server.ask(Question(number, [1], 4))

    with served(script) as url:
        asyncio.run(ask_twice(url))
    assert (len(script.asked), script.connections) == (2, 2)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            Script(status=400, error={"error": {"message": "max_tokens:\n too large"}}),
            "400, max_tokens: too large",
        ),
        (Script(status=503, error={"detail": "busy"}), "answered 503, busy"),
        (Script(status=500), "answered 500, without a message"),
        (Script([ANSWER[0], (0.0, {"error": {"message": "out of memory"}})]), "out of memory"),
        (Script([(0.0, "data: {\n\n")]), "sent an event that is no JSON"),
        (Script([(0.0, "data: 3\n\n")]), "without a message"),
        (Script(ANSWER[:3]), r"ended a stream without \[DONE\] or a finish_reason"),
        (Script(ANSWER, cut_after=2), "closed the connection in the middle of an answer"),
        (Script(ANSWER, cut_after=2, is_framed=False), "ended a stream without"),
    ],
)
def test_what_is_no_answer_is_one_line(script: Script, message: str) -> None:
    with pytest.raises(ServingError, match=message) as refusal:
        heard(script)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("http://127.0.0.1:")


def test_busy_seconds_come_from_our_own_servers_page() -> None:
    page = (
        "# TYPE optimize_engine_busy_seconds_total counter\n"
        'optimize_engine_busy_seconds_total{model_name="a b"} 1.5\n'
        'optimize_engine_busy_seconds_total{model_name="b"} 2\nothers 7\n'
    )

    async def work(url: str) -> Work | None:
        return await Server(url).work()

    for metrics, want in ((page, Work(3.5)), ("others 7\n", None), (None, None)):
        with served(Script(metrics=metrics)) as url:
            assert asyncio.run(work(url)) == want


def test_a_server_names_its_models() -> None:
    with served(Script(key="secret")) as url:
        first, other = Server(url + "/v1/", key="secret").find(None), Server(url, key="secret").find("n")
        assert (first.model, first.vocabulary) == ("m", None)
        assert (other.model, other.vocabulary) == ("n", 77)
        with pytest.raises(LoadError, match="--model: got 'x', expected one of m, n"):
            Server(url, key="secret").find("x")
        with pytest.raises(LoadError, match="answered 401, wrong API key; set OPENAI_API_KEY"):
            Server(url).find(None)


def test_a_server_without_a_list_of_models_needs_a_name() -> None:
    with served(Script(models="no JSON")) as url:
        assert Server(url).find("mine").model == "mine"
        with pytest.raises(ServingError, match="expected a list of models; name one by --model"):
            Server(url).find(None)


@pytest.mark.parametrize(
    "url",
    [
        "htp://x",
        "http://",
        "http://x:port",
        "http://x?y=1",
        "http://..",
        "http://" + "a" * 64,
        "http://x/é",
        "http://x/a b",
    ],
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(LoadError, match="is no address of a server, expected one such as"):
        Server(url)


def test_a_server_is_called_by_its_name_as_http_has_it() -> None:
    HttpClient("http://me:secret@bücher.example/v1", {}, StepClock())  # no letter of it is beyond a header
    assert host_header("x", None) == "x"
    assert host_header("::1", 80) == "[::1]:80"


@pytest.mark.parametrize("key", ["ключ", "a b", "a\r\nhost: other"])
def test_a_key_that_no_header_holds_is_refused(key: str) -> None:
    with pytest.raises(LoadError, match="OPENAI_API_KEY: holds a space, a line break or a letter that is not ASCII"):
        Server("http://x", key=key)


def test_a_server_that_does_not_run_is_told() -> None:
    with served(Script()) as url:
        pass
    with pytest.raises(ServingError, match="cannot be reached, connection refused; is the server running"):
        Server(url).find(None)
