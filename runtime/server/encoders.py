"""`POST /v1/embeddings` as OpenAI has it, `/classify` and `/rerank` as vLLM, and Jina and Cohere for the last.

A text that the model cannot read whole is refused, unless the request says that it may be cut.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from runtime.embedding import TextEmbedder
from runtime.encoder import TextEncoder
from runtime.encoder_batcher import AsyncEncoder
from runtime.errors import PromptError, ServingError
from runtime.prediction import TextClassifier, probabilities
from runtime.reranking import TextReranker
from runtime.server.admission import Entry
from runtime.server.answering import LATE
from runtime.server.errors import ApiError
from runtime.server.generating import read_timeout
from runtime.server.log import note
from runtime.server.protocol import ClassifyBody, EmbeddingBody, EncoderBody, RerankBody, TextsBody
from runtime.server.service import Service
from runtime.tokenizer import Encoded

Rows = NDArray[np.float32]
Content = dict[str, Any]


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/embeddings", summary="Texts to vectors")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        name, served = service.find(body.model, ("embedder",))
        embedder = served.encoder.encoder
        assert isinstance(embedder, TextEmbedder)
        if body.dimensions not in (None, embedder.width):
            text = f"dimensions: got {body.dimensions}, expected {embedder.width}, which is all that this model makes"
            raise ApiError(400, text, param="dimensions")

        def read() -> list[Encoded]:
            return _read(body, embedder, lambda texts: embedder.encode(texts, body.prompt_name))

        def whole(rows: Rows) -> Content:
            return {"object": "list", "data": [_vector(index, row, body) for index, row in enumerate(rows)]}

        return await _answer(service, name, served.encoder, body, request, read, whole)

    @routes.post("/classify", summary="Texts to labels")
    async def classify(body: ClassifyBody, request: Request) -> Response:
        name, served = service.find(body.model, ("classifier",))
        classifier = served.encoder.encoder
        assert isinstance(classifier, TextClassifier)

        def read() -> list[Encoded]:
            return _read(body, classifier, classifier.tokenizer.encode_batch)

        def whole(rows: Rows) -> Content:
            shares = probabilities(rows)
            return {"object": "list", "data": [_label(index, row, classifier) for index, row in enumerate(shares)]}

        return await _answer(service, name, served.encoder, body, request, read, whole)

    @routes.post("/rerank", summary="Documents by their fit to a query")
    @routes.post("/v1/rerank", summary="Documents by their fit to a query")
    @routes.post("/v2/rerank", summary="Documents by their fit to a query")
    async def rerank(body: RerankBody, request: Request) -> Response:
        name, served = service.find(body.model, ("reranker",))
        reranker = served.encoder.encoder
        assert isinstance(reranker, TextReranker)

        def read() -> list[Encoded]:
            pairs = reranker.tokenizer.encode_pairs([(body.query, text) for text in body.texts])
            return _uncut(body, reranker, pairs, "documents")

        def whole(rows: Rows) -> Content:
            return {"results": _ranking(reranker.activated(rows[:, 0]), body)}

        return await _answer(service, name, served.encoder, body, request, read, whole)

    return routes


async def _answer(
    service: Service,
    name: str,
    worker: AsyncEncoder,
    body: EncoderBody,
    request: Request,
    read: Callable[[], list[Encoded]],
    whole: Callable[[Rows], Content],
) -> Response:
    """Return the response to a request: a place in the queue, its texts read on a thread, then the encoder's turn.

    Raises:
        ApiError: it is refused.
    """
    timeout_s = read_timeout(request, service.settings.timeout_s)
    entry = service.admission.enter()
    try:
        texts = await service.read(read)
        tokens = sum(len(text.ids) for text in texts)
        entry.weigh(tokens)
        note(request.scope, model=name, texts=len(texts), prompt_tokens=tokens)
        about = {"id": f"enc-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        about["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Encoding(service, entry, worker, texts, lambda rows: about | whole(rows), timeout_s)
    except BaseException:
        entry.leave()
        raise


class Encoding(Response):
    """The response to a request whose texts are read: it ends early when its client leaves or its time is up."""

    def __init__(
        self,
        service: Service,
        entry: Entry,
        worker: AsyncEncoder,
        texts: Sequence[Encoded],
        whole: Callable[[Rows], Content],
        timeout_s: float,
    ) -> None:
        """Prepare to answer.

        Args:
            service: that it belongs to.
            entry: its place in the queue, which it leaves at the end.
            worker: who runs the texts.
            texts: at least one.
            whole: makes the body of the encoder's rows.
            timeout_s: seconds until it is given up.
        """
        super().__init__()
        self._service, self._entry, self._worker = service, entry, worker
        self._texts, self._whole, self._timeout_s = texts, whole, timeout_s
        self._expired = LATE
        self._is_gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and leave nothing behind however that ends."""
        loop = asyncio.get_running_loop()
        self._running = loop.create_task(self._body())
        watcher = loop.create_task(self._watch(receive))
        timer = loop.call_later(self._timeout_s, self.expire, LATE)
        self._service.attend(self)
        try:
            await asyncio.wait([self._running])
            await self._response()(scope, receive, send)
        finally:
            timer.cancel()
            watcher.cancel()
            self._running.cancel()
            self._service.dismiss(self)
            self._entry.leave()
            if self._is_gone:
                note(scope, finish="disconnect")

    def expire(self, error: ApiError) -> None:
        """Give it up, with this error."""
        self._expired = error
        self._running.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._running.cancel()

    async def _body(self) -> bytes:
        rows = await self._worker.run(self._texts)
        self._entry.start()
        return await self._service.read(lambda: json.dumps(self._whole(rows), ensure_ascii=False).encode())

    def _response(self) -> Response:
        if self._running.cancelled():
            return self._expired.response()
        error = self._running.exception()
        if isinstance(error, ServingError):
            error = ApiError.of(error)
        if isinstance(error, ApiError):
            return error.response()
        return Response(self._running.result(), media_type="application/json")


def _read(body: TextsBody, encoder: TextEncoder, encode: Callable[[list[str]], list[Encoded]]) -> list[Encoded]:
    """Return what the encoder reads of each text of a request.

    Raises:
        PromptError: an id is out of range, or a text is too long and may not be cut.
    """
    texts = body.texts
    if isinstance(texts[0], str):
        return _uncut(body, encoder, encode([str(text) for text in texts]), "input")
    vocabulary, longest = encoder.manifest.vocabulary, encoder.manifest.context_length
    found = []
    for index, ids in enumerate(texts):
        assert isinstance(ids, list)
        if max(ids) >= vocabulary:
            raise PromptError(f"input[{index}]: got token {max(ids)}, expected ids from 0 to {vocabulary - 1}")
        found.append(Encoded(ids[:longest], [0] * min(len(ids), longest), len(ids) > longest))
    return _uncut(body, encoder, found, "input")


def _uncut(body: EncoderBody, encoder: TextEncoder, texts: list[Encoded], field: str) -> list[Encoded]:
    """Return the texts, or refuse those that are cut without leave."""
    cut = next((index for index, text in enumerate(texts) if text.is_cut), None)
    if cut is not None and body.truncate_prompt_tokens is None:
        limit = f"the {encoder.manifest.context_length} tokens that this model reads"
        raise PromptError(f"{field}[{cut}]: is longer than {limit}; shorten it, or send truncate_prompt_tokens: -1")
    return texts


def _vector(index: int, row: Rows, body: EmbeddingBody) -> Content:
    is_text = body.encoding_format == "base64"
    vector = base64.b64encode(row.astype("<f4").tobytes()).decode() if is_text else row.tolist()
    return {"object": "embedding", "index": index, "embedding": vector}


def _label(index: int, shares: NDArray[np.float64], classifier: TextClassifier) -> Content:
    label = classifier.labels[int(shares.argmax())]
    return {"index": index, "label": label, "probs": shares.tolist(), "num_classes": len(shares)}


def _ranking(scores: Rows, body: RerankBody) -> list[Content]:
    """Return the documents, best first; equal scores stay in the order given."""
    order = np.argsort(-scores, kind="stable")[: body.top_n or None].tolist()
    texts = body.texts
    results: list[Content] = [{"index": index, "relevance_score": float(scores[index])} for index in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    return results
