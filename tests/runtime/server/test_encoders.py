"""Vectors, labels and rankings over HTTP are those of the runtime, in the shapes that clients know."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.artifact import verify
from runtime.embedding import TextEmbedder
from runtime.prediction import TextClassifier
from runtime.reranking import TextReranker
from runtime.server.app import create_app
from runtime.server.loading import EngineOptions, load
from runtime.server.settings import Settings

DATA = Path(__file__).parents[2] / "data"
KINDS = ("embedder", "classifier", "reranker")
FOLDERS = {kind: DATA / f"artifact-v1-{kind}" for kind in KINDS}
TEXTS = ["the quick brown fox", "日本", "x", "the lazy dog", ""]
LONG = "fox " * 200
ROUNDING = 1e-6  # a text alone may be rounded differently, see test_encoder_batcher.py


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app({kind: load(folder, EngineOptions(threads=1)) for kind, folder in FOLDERS.items()}, Settings())


@pytest.fixture(scope="module")
def client(app: Any, client_of: Any) -> Iterator[Any]:
    with client_of(app) as made:
        yield made


def ask(client: Any, route: str, **body: Any) -> Any:
    response = client.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: Any, route: str, **body: Any) -> tuple[int, str, str | None]:
    response = client.post(route, json=body)
    error = response.json()["error"]
    return response.status_code, error["message"], error["param"]


def test_vectors_are_those_of_the_embedder(client: Any) -> None:
    embedder = TextEmbedder.load(FOLDERS["embedder"], threads=1)
    got = ask(client, "/v1/embeddings", input=TEXTS, model="embedder")
    assert [each["index"] for each in got["data"]] == list(range(len(TEXTS)))
    assert {each["object"] for each in got["data"]} == {"embedding"}
    np.testing.assert_allclose([each["embedding"] for each in got["data"]], embedder.embed(TEXTS), atol=ROUNDING)
    tokens = sum(len(each.ids) for each in embedder.encode(TEXTS))
    assert got["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (got["object"], got["model"]) == ("list", "embedder")


def test_a_vector_is_the_same_to_the_last_bit_alone_and_in_company(client: Any) -> None:
    together = ask(client, "/v1/embeddings", input=TEXTS)["data"]
    for text, got in zip(TEXTS, together, strict=True):
        assert ask(client, "/v1/embeddings", input=text)["data"][0]["embedding"] == got["embedding"]


def test_base64_holds_the_same_numbers(client: Any) -> None:
    (number,) = ask(client, "/v1/embeddings", input="x")["data"]
    (text,) = ask(client, "/v1/embeddings", input="x", encoding_format="base64")["data"]
    assert np.frombuffer(base64.b64decode(text["embedding"]), "<f4").tolist() == number["embedding"]


def test_token_ids_are_read_as_they_are(client: Any) -> None:
    embedder = TextEmbedder.load(FOLDERS["embedder"], threads=1)
    ids = [list(each.ids) for each in embedder.encode(TEXTS[:2])]
    want = ask(client, "/v1/embeddings", input=TEXTS[:2])["data"]
    assert ask(client, "/v1/embeddings", input=ids)["data"] == want
    assert ask(client, "/v1/embeddings", input=ids[0])["data"][0]["embedding"] == want[0]["embedding"]


def test_openai_s_own_client_gets_vectors(client: Any) -> None:
    openai = pytest.importorskip("openai")
    theirs = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=client)
    want = ask(client, "/v1/embeddings", input=TEXTS)["data"]
    width = len(want[0]["embedding"])
    for options in ({}, {"encoding_format": "float"}, {"dimensions": width}):
        got = theirs.embeddings.create(model="embedder", input=TEXTS, **options)
        assert [each.embedding for each in got.data] == [each["embedding"] for each in want]
    with pytest.raises(openai.BadRequestError, match=f"dimensions: got 3, expected {width}"):
        theirs.embeddings.create(model="embedder", input="x", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="is a classifier, expected embedder"):
        theirs.embeddings.create(model="classifier", input="x")


def test_labels_are_those_of_the_classifier(client: Any) -> None:
    classifier = TextClassifier.load(FOLDERS["classifier"], threads=1)
    got = ask(client, "/classify", input=TEXTS)
    for index, (each, want) in enumerate(zip(got["data"], classifier.predict(TEXTS), strict=True)):
        assert (each["index"], each["label"], each["num_classes"]) == (index, want.label, 3)
        assert max(each["probs"]) == pytest.approx(want.probability, abs=ROUNDING)
        assert each["probs"].index(max(each["probs"])) == want.index and sum(each["probs"]) == pytest.approx(1)


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_a_ranking_is_that_of_the_reranker(client: Any, route: str) -> None:
    reranker = TextReranker.load(FOLDERS["reranker"], threads=1)
    documents = ["fox", "a fox", "the lazy dog", "fox"]
    want = reranker.rank("the quick brown fox", documents)
    got = ask(client, route, query="the quick brown fox", documents=documents)["results"]
    assert [each["index"] for each in got] == [each.index for each in want]
    assert [each["document"]["text"] for each in got] == [each.document for each in want]
    assert [each["relevance_score"] for each in got] == pytest.approx([each.score for each in want], abs=ROUNDING)


def test_a_ranking_may_be_short_and_without_documents(client: Any) -> None:
    body: Any = {"query": "fox", "documents": [{"text": "a fox"}, "the dog", "x"]}
    whole = ask(client, "/rerank", **body)["results"]
    assert len(whole) == 3 and len(ask(client, "/rerank", **body, top_n=0)["results"]) == 3
    best = ask(client, "/rerank", **body, top_n=1, return_documents=False)["results"]
    assert best == [{key: value for key, value in whole[0].items() if key != "document"}]


def test_a_text_too_long_is_refused_unless_it_may_be_cut(client: Any) -> None:
    for route, body, field in (
        ("/v1/embeddings", {"input": ["x", LONG]}, "input[1]"),
        ("/classify", {"input": ["x", LONG]}, "input[1]"),
        ("/rerank", {"query": "x", "documents": ["x", LONG]}, "documents[1]"),
        ("/v1/embeddings", {"input": [[5], [5] * 100]}, "input[1]"),
    ):
        status, message, param = refused(client, route, **body)
        assert (status, param) == (400, field) and "is longer than the" in message
        assert client.post(route, json=body | {"truncate_prompt_tokens": -1}).status_code == 200
    cut = ask(client, "/v1/embeddings", input=LONG, truncate_prompt_tokens=-1)
    longest = verify(FOLDERS["embedder"]).context_length
    assert cut["usage"]["prompt_tokens"] == longest
    assert ask(client, "/v1/embeddings", input=[5] * 100, truncate_prompt_tokens=-1)["usage"]["total_tokens"] == longest


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("/v1/embeddings", {}, 400, "input: is missing"),
        ("/v1/embeddings", {"input": []}, 400, "input: expected a text, token ids, or a list of 1 to 2048 of either"),
        ("/v1/embeddings", {"input": ["x", 3]}, 400, "input: expected a text"),
        ("/v1/embeddings", {"input": [[]]}, 400, "input: expected a text"),
        ("/v1/embeddings", {"input": ["x"] * 2049}, 400, "input: expected a text"),
        ("/v1/embeddings", {"input": [3, 999_999]}, 400, "input[0]: got token 999999, expected ids from 0 to"),
        ("/v1/embeddings", {"input": "x", "dimensions": 3}, 400, "dimensions: got 3, expected 16"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, 400, "encoding_format: "),
        ("/v1/embeddings", {"input": "x", "prompt_name": "none"}, 400, "prompt: got 'none', expected "),
        ("/v1/embeddings", {"input": "\ud800"}, 400, ""),
        (
            "/v1/embeddings",
            {"input": "x", "model": "reranker"},
            400,
            "model: reranker is a reranker, expected embedder",
        ),
        ("/v1/embeddings", {"input": "x", "model": "gone"}, 404, "model: got 'gone', expected one of embedder, "),
        ("/v1/completions", {"prompt": "x", "model": "embedder"}, 400, "model: embedder is an embedder"),
        ("/classify", {"input": "x", "softmax": True}, 400, "softmax: is not a field of this route"),
        ("/rerank", {"query": "x", "documents": []}, 400, "documents: "),
        ("/rerank", {"query": "x", "documents": ["x"], "top_n": -1}, 400, "top_n: "),
        ("/rerank", {"query": "x", "documents": ["x"], "rank_fields": ["a"]}, 400, "rank_fields: is not supported"),
    ],
)
def test_what_is_wrong_is_told_by_its_field(client: Any, route: str, body: Any, status: int, message: str) -> None:
    response = client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"].startswith(message)


def test_models_and_metrics_tell_of_encoders(client: Any) -> None:
    listed = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert {name: each["kind"] for name, each in listed.items()} == {kind: kind for kind in KINDS}
    assert all(each["exact"] is True for each in listed.values())

    def count(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model_name="embedder"}}'))

    names = ("optimize_texts_total", "optimize_text_tokens_total", "optimize_text_batches_total")
    before = [count(name) for name in names]
    busy = count("optimize_engine_busy_seconds_total")
    tokens = ask(client, "/v1/embeddings", input=["x", "x", "a b c d"])["usage"]["total_tokens"]
    assert [count(name) - was for name, was in zip(names, before, strict=True)] == [3, tokens, 2]
    assert count("optimize_engine_busy_seconds_total") > busy and count("optimize_texts_waiting") == 0


class Held:
    """An application whose classifier does not answer until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        served = load(FOLDERS["classifier"], EngineOptions(threads=1))
        self.app = create_app({"classifier": served}, Settings(**settings))
        self.admission = self.app.state.service.admission
        self.entered, self.let_go = threading.Event(), threading.Event()
        inner = served.encoder.encoder.session.run

        def run(batch: Any, types: Any = None) -> Any:
            self.entered.set()
            assert self.let_go.wait(10)
            return inner(batch, types)

        monkeypatch.setattr(served.encoder.encoder.session, "run", run)

    async def request(self, receive: Any = None, **headers: str) -> tuple[int, bytes]:
        """Send one request straight to the application; return status and body."""
        sent: list[Any] = []
        body = {"type": "http.request", "body": b'{"input": "x"}', "more_body": False}
        messages = [body]

        async def default() -> Any:
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/classify",
            "raw_path": b"/classify",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), *named],
        }
        await self.app(scope, receive or default, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def run_held(held: Held, work: Any) -> None:
    async def main() -> None:
        async with held.app.router.lifespan_context(held.app):
            await asyncio.wait_for(work(), 30)
            held.let_go.set()

    asyncio.run(main())


def test_a_request_whose_time_is_up_gets_a_504_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)

    async def work() -> None:
        status, body = await held.request(x_timeout_s="0.05")
        assert status == 504 and b"its time ran out before its answer" in body
        assert (held.admission.running, held.admission.waiting, held.admission.waiting_tokens) == (0, 0, 0)

    run_held(held, work)


def test_a_client_that_leaves_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)

    async def work() -> None:
        left = asyncio.Event()
        messages = [{"type": "http.request", "body": b'{"input": "x"}', "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        request = asyncio.create_task(held.request(receive))
        await asyncio.to_thread(held.entered.wait, 10)
        assert held.admission.running == 1
        left.set()
        await request
        assert (held.admission.running, held.admission.waiting) == (0, 0)

    run_held(held, work)


def test_a_full_queue_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, queue=1)

    async def work() -> None:
        first = asyncio.create_task(held.request())
        await asyncio.to_thread(held.entered.wait, 10)
        status, body = await held.request()
        assert status == 429 and b"queue_full" in body
        held.let_go.set()
        assert (await first)[0] == 200

    run_held(held, work)
