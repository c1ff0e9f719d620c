"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes: what a text costs, and what ids mean."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from runtime.artifact import KINDS
from runtime.server.errors import ApiError
from runtime.server.protocol import DetokenizeBody, TokenizeBody
from runtime.server.service import Service
from runtime.server.token_logprobs import shown


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/tokenize", summary="Text to token ids")
    async def tokenize(body: TokenizeBody) -> JSONResponse:
        _, served = service.find(body.model, KINDS)

        def read() -> list[int]:
            if body.messages is None:
                return served.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
            conversation = [message.message for message in body.messages]
            return served.tokenizer.encode_chat(conversation, **body.chat_template_kwargs)

        with service.admission.enter():
            ids = await service.read(read)
        names = [shown(served.tokenizer.token_bytes(token)) for token in ids] if body.return_token_strs else None
        return JSONResponse({"count": len(ids), "max_model_len": served.longest, "tokens": ids, "token_strs": names})

    @routes.post("/detokenize", summary="Token ids to text")
    async def detokenize(body: DetokenizeBody) -> JSONResponse:
        _, served = service.find(body.model, KINDS)
        if wrong := [token for token in body.tokens if token >= served.manifest.vocabulary]:
            text = f"tokens: got token {wrong[0]}, expected ids from 0 to {served.manifest.vocabulary - 1}"
            raise ApiError(400, text, param="tokens")
        with service.admission.enter():
            text = await service.read(lambda: served.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSONResponse({"prompt": text})

    return routes
