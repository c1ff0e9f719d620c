"""The application: routes behind the guard.

app = create_app({"name": load(Path("artifacts/stdlib-llama-int4"), EngineOptions())}, Settings())
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from runtime.server import chat, completions, health, models
from runtime.server.errors import ApiError, answer_api_error, answer_http_error, answer_validation_error
from runtime.server.guard import Guard
from runtime.server.service import Served, Service
from runtime.server.settings import Settings


def create_app(models_served: Mapping[str, Served], settings: Settings) -> FastAPI:
    """Return an ASGI application that serves models by their names; its lifespan starts and ends their workers."""
    service = Service(models_served, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="optimize serve", lifespan=lifespan, docs_url=None, redoc_url=None)  # those load from a CDN
    app.state.service = service
    for module in (health, models, completions, chat):
        app.include_router(module.router(service))
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
    app.add_middleware(Guard, settings=settings)
    return app
