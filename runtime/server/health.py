"""`/livez`: whether a restart is needed. `/readyz`, to vLLM's clients `/health`: whether requests should come here."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from runtime.server.errors import ApiError
from runtime.server.service import Service


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.get("/livez", summary="Whether a restart is needed")
    async def livez() -> JSONResponse:
        if service.stuck() is not None:  # what is wrong is for those with a key: see readyz
            raise ApiError(503, "engine: cannot go on; restart the server")
        return JSONResponse({"status": "ok"})

    @routes.get("/health", include_in_schema=False)
    @routes.get("/readyz", summary="Whether requests should come here")
    async def readyz() -> JSONResponse:
        if service.admission.is_draining:
            raise ApiError(503, "server: is shutting down")
        if (reason := service.stuck()) is not None:
            raise ApiError(503, reason)
        return JSONResponse({"status": "ok"})

    return routes
