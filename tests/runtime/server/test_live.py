"""A server that listens: the clients that people use, connections that are left or not read, signals."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from optimizer.cli import main
from runtime.errors import SettingsError
from runtime.generation import TextGenerator
from runtime.server.run import MAX_HEAD_BYTES, Connection, bind
from runtime.server.settings import Settings

Make = Callable[..., Any]
KEY = "sk-of-the-test"
BEARER = {"authorization": f"Bearer {KEY}"}
GREEDY: dict[str, Any] = {
    "model": "artifact-v1",
    "temperature": 0,
    "max_tokens": 20,
    "extra_body": {"ignore_eos": True},
}
HI: Any = [{"role": "user", "content": "hi"}]


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server(app_of: Make, listening: Make) -> Iterator[Any]:
    settings = Settings(port=0, api_keys=(KEY,), slow_reader_s=0.2)
    with listening(app_of(settings), settings) as made:
        yield made


def test_the_openai_package_gets_text_whole_and_in_pieces(server: Any, generator: TextGenerator) -> None:
    openai = pytest.importorskip("openai")
    want = generator.generate(HI, max_tokens=20, ignore_eos=True).text
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["artifact-v1"]
        whole = client.chat.completions.create(messages=HI, **GREEDY)
        assert whole.choices[0].message.content == want and whole.usage.completion_tokens == 20
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(messages=HI, stream=True, stream_options=options, **GREEDY))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == want
        assert chunks[-1].usage.completion_tokens == 20
        text = client.completions.create(prompt="the", logprobs=2, **GREEDY).choices[0]
        assert text.text == generator.generate("the", max_tokens=20, ignore_eos=True).text
        assert len(text.logprobs.tokens) == 20
        with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
            client.chat.completions.create(
                messages=HI, tools=[{"type": "function", "function": {"name": "f"}}], **GREEDY
            )
        with pytest.raises(openai.NotFoundError, match="expected one of artifact-v1"):
            client.completions.create(model="gpt-4o", prompt="the")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError, match="no valid API key"):
        stranger.models.list()


def test_the_openai_package_asks_many_at_once(server: Any, generator: TextGenerator) -> None:
    openai = pytest.importorskip("openai")
    prompts = ["the", "日本", "def main():", "x"] * 3

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def text(prompt: str) -> str:
                stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*map(text, prompts)))

    want = {prompt: generator.generate(prompt, max_tokens=20, ignore_eos=True).text for prompt in prompts}
    assert asyncio.run(main()) == [want[prompt] for prompt in prompts]


def test_lm_eval_scores_as_the_generator_does(
    server: Any, generator: TextGenerator, decoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url, tokenizer = f"{server.url}/v1/completions", str(decoder_folder)
    client = models.LocalCompletionsAPI(model="artifact-v1", base_url=url, tokenizer=tokenizer, batch_size=3)
    asked = [("the quick", " brown fox"), ("def main():", " pass"), ("x", " y z")]
    scored = client.loglikelihood([Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(asked)])
    for (context, rest), (total, is_greedy) in zip(asked, scored, strict=True):
        ids, before = generator.tokenizer.encode(context + rest), len(generator.tokenizer.encode(context))
        logprobs = generator.generate(ids, max_tokens=0, prompt_logprobs=1).prompt_logprobs or ()
        own = [each for each in logprobs[before:] if each is not None]
        assert total == sum(each.logprob for each in own)
        assert is_greedy == all(each.token == each.top[0][0] for each in own)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_shows_a_stream(server: Any) -> None:
    body = json.dumps({"prompt": "the", "max_tokens": 5, "stream": True})
    headers = ["-H", "content-type: application/json", "-H", f"authorization: Bearer {KEY}"]
    command = ["curl", "-sSN", f"{server.url}/v1/completions", *headers, "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")


def test_a_client_that_hangs_up_frees_its_slots(server: Any) -> None:
    body = {"prompt": "the", "max_tokens": 100, "n": 64, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, headers=BEARER) as response:
        assert response.status_code == 200
        next(response.iter_raw())
    until(lambda: server.admission.running == 0)


def aborted(server: Any) -> float:
    lines = httpx2.get(f"{server.url}/metrics", headers=BEARER).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if 'finished_reason="abort"' in line and "_total" in line
    )


def test_a_client_that_does_not_read_is_cut(server: Any) -> None:
    before = aborted(server)
    body = json.dumps({"prompt": "the", "max_tokens": 100, "n": 64, "ignore_eos": True, "stream": True, "logprobs": 20})
    head = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head += [f"authorization: Bearer {KEY}", f"content-length: {len(body)}", "", ""]
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall("\r\n".join(head).encode() + body.encode())
        until(lambda: server.admission.running == 64)
        until(lambda: server.admission.running == 0)  # 64 answers with their logprobs are more than a system holds
    assert aborted(server) > before


class Transport:
    """What a connection sees of its socket."""

    is_cut = False
    unread = 100
    written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.is_cut = True

    def abort(self) -> None:
        self.is_cut = True

    def get_extra_info(self, _: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return self.unread


def connected(transport: Any) -> Connection:
    from uvicorn import Config
    from uvicorn.server import ServerState

    connection = Connection(Config(app=lambda: None, log_config=None), ServerState(), {})
    connection.headers_timeout_s = connection.slow_reader_s = 0.01
    connection.connection_made(transport)
    return connection


async def cut(transport: Transport) -> None:
    async with asyncio.timeout(30):
        while not transport.is_cut:
            await asyncio.sleep(0.001)


def test_a_client_that_sends_no_headers_is_cut() -> None:
    async def main() -> None:
        transport = Transport()
        connected(transport)
        await cut(transport)

    asyncio.run(main())


def test_headers_of_a_later_request_are_waited_for_as_long() -> None:
    async def main() -> None:
        transport = Transport()
        connection = connected(transport)
        connection._stop_timer()  # as the first request did
        connection.data_received(b"GET / HT")
        await cut(transport)

    asyncio.run(main())


@pytest.mark.parametrize("part", [b"x: 1\r\n" * 1000, b"x" * 6000])
def test_headers_that_do_not_end_are_refused_before_they_fill_the_memory(part: bytes) -> None:
    async def main() -> None:
        transport = Transport()
        connection = connected(transport)
        connection.data_received(b"GET / HTTP/1.1\r\n")
        for _ in range(MAX_HEAD_BYTES // len(part)):
            connection.data_received(part)
        assert transport.written == b""
        connection.data_received(part)
        assert transport.written.startswith(b"HTTP/1.1 400") and transport.is_cut
        assert b"headers: are too long, expected at most 65536 bytes" in transport.written

    asyncio.run(main())


def test_a_client_that_reads_slowly_is_not_cut_before_it_stops() -> None:
    async def main() -> None:
        transport = Transport()
        connection = connected(transport)
        connection._stop_timer()
        connection.pause_writing()
        for _ in range(3):
            transport.unread -= 1
            before = connection._timer
            while connection._timer is before:
                await asyncio.sleep(0.001)
            assert not transport.is_cut
        await cut(transport)

    asyncio.run(main())


def test_nothing_is_asked_of_the_outside(app_of: Make, client_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with client_of(app_of()) as client:
        assert client.post("/v1/completions", json={"prompt": "the", "max_tokens": 3}).status_code == 200
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
        assert "http" not in client.get("/openapi.json").text
    assert asked == []


def test_an_address_that_is_taken_is_told_in_one_line(server: Any) -> None:
    with pytest.raises(SettingsError, match=f"127.0.0.1:{server.port}: cannot listen there, address already in use"):
        bind(Settings(port=server.port))


def test_a_command_line_that_makes_no_sense_exits_with_2(
    decoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(decoder_folder)
    for arguments, message in (
        (["--host", "0.0.0.0"], "host: 0.0.0.0 can be reached from other machines"),
        (["--api-key-file", "/missing"], "/missing: cannot be read"),
        *((["--kv-memory", size], f"--kv-memory: got '{size[:40]}'") for size in ("2T", "", "²", "G", "9" * 5000)),
        (["--threads", "9" * 20], "--threads"),
        ([folder], "is empty or taken; give it another as NAME=DIR"),
        ([f"b={folder}", "--digest", "0" * 64], "--digest: got 2 artifacts, expected one"),
        (["--digest", "0" * 63], "expected 64 hexadecimal digits"),
        (["--context", "1000"], "context: got 1000, expected 1 to 128"),
    ):
        assert main(["serve", folder, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_the_extra_one_line_says_what_to_install(
    decoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("runtime.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(decoder_folder)]) == 4
    assert capsys.readouterr().err == "fastapi is not installed; run: pip install 'optimize-models[serve]'\n"


class Process:
    """`optimize serve` as a process of its own, at a free port."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "optimizer.cli", "serve", f"m={folder}", "--port", "0", "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPTIMIZE_API_KEYS": KEY}
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.partition(" at ")[2].partition(": ")[0]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def get(self, path: str) -> int:
        return int(httpx2.get(f"{self.url}{path}", headers=BEARER).status_code)

    def end(self) -> tuple[int, list[Any]]:
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


def test_sigterm_ends_streams_validly_and_the_process_well(decoder_folder: Path) -> None:
    with Process(decoder_folder, "--slots", "1", "--drain-s", "2") as served:
        assert served.line.startswith("serving m at http://127.0.0.1:") and "1 slot, context 128 tokens" in served.line
        body = {"prompt": "the", "max_tokens": 100, "n": 256, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{served.url}/v1/completions", json=body, headers=BEARER, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            served.process.send_signal(signal.SIGTERM)
            until(lambda: served.get("/readyz") == 503)
            assert httpx2.post(f"{served.url}/v1/completions", json=body, headers=BEARER).status_code == 503
            told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]"
        reasons = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in told[:-1]]
        assert reasons.count("length") == 256 and len(reasons) < 256 * 60  # most were ended before their time
        code, log = served.end()
        assert code == 0
        assert [line["event"] for line in log if line["event"] != "request"] == ["draining", "drained"]


def test_a_second_ctrl_c_ends_the_process_at_once(decoder_folder: Path) -> None:
    body = {"prompt": "the", "max_tokens": 100, "n": 256, "ignore_eos": True, "stream": True}
    with (
        Process(decoder_folder, "--slots", "1") as served,
        httpx2.stream("POST", f"{served.url}/v1/completions", json=body, headers=BEARER, timeout=30) as response,
    ):
        pieces = response.iter_raw()  # which hangs up when it is forgotten
        next(pieces)
        served.process.send_signal(signal.SIGINT)
        until(lambda: served.get("/readyz") == 503)
        served.process.send_signal(signal.SIGINT)
        assert served.end()[0] == 130
