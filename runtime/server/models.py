"""`GET /v1/models`: what is served, and what it can."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from runtime.async_engine import AsyncEngine
from runtime.encoder_batcher import AsyncEncoder
from runtime.server.errors import ApiError
from runtime.server.service import Served, Service


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.get("/v1/models", summary="The models served")
    async def models() -> JSONResponse:
        listed = [_described(service, name, served) for name, served in service.models.items()]
        return JSONResponse({"object": "list", "data": listed})

    @routes.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> JSONResponse:
        if name not in service.models:
            raise ApiError(404, f"model: there is none named {name[:200]!r}", param="model", code="model_not_found")
        return JSONResponse(_described(service, name, service.models[name]))

    return routes


def _described(service: Service, name: str, served: Served) -> dict[str, Any]:
    manifest = served.manifest
    described: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": manifest.lineage.base_model,
        "kind": manifest.kind,
        "chat": served.tokenizer.has_chat_template,
        "digest": manifest.digest,
        "vocabulary": manifest.vocabulary,
        "max_model_len": served.longest,
    }
    if isinstance(served.worker, AsyncEncoder):
        described["exact"] = served.worker.is_exact
    if isinstance(served.worker, AsyncEngine):
        engine = served.worker.engine
        described |= {"slots": engine.session.slots, "sampling": dict(served.sampling)}
        described["determinism"] = asdict(engine.promises)
    return described
