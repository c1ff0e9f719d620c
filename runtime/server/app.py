"""The application: routes behind the guard.

app = create_app({"name": load(Path("artifacts/stdlib-llama-int4"), EngineOptions())}, Settings())
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from runtime.server import chat, completions, encoders, health, metrics, models, page, tokens
from runtime.server.errors import ApiError, ErrorBody, answer_api_error, answer_http_error, answer_validation_error
from runtime.server.guard import Guard
from runtime.server.service import Served, Service
from runtime.server.settings import Settings

_NO_TELEMETRY: Final[Any] = dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False)


def create_app(models_served: Mapping[str, Served], settings: Settings) -> FastAPI:
    """Return an ASGI application that serves models by their names; its lifespan starts and ends their workers."""
    service = Service(models_served, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="optimize serve",
        lifespan=lifespan,
        docs_url=None,  # those pages load from a CDN
        redoc_url=None,
        telemetry=_NO_TELEMETRY,  # of OpenTelemetry, which an environment variable could switch on
        responses={status: {"model": ErrorBody} for status in ("4XX", "5XX")},
    )
    app.state.service = service
    for module in (page, health, metrics, models, completions, chat, encoders, tokens):
        app.include_router(module.router(service))
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    return app
