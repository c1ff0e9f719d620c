"""`GET /`: a page to try the models with. One file, nothing from elsewhere; it asks the same routes as any client."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Final

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from runtime.server.service import Service

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def _policy(html: str) -> str:
    """Return a Content-Security-Policy under which the page's own script and style run, and nothing else does."""
    hashes: dict[str, str] = {}
    for kind, text in _INLINE.findall(html):
        hashes[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_HTML: Final = resources.files("runtime.server").joinpath("page.html").read_text(encoding="utf-8")
_HEADERS: Final = {"Content-Security-Policy": _policy(_HTML)}


def router(_: Service) -> APIRouter:
    """Return the route of the page's shell; whatever is shown on it, it asks with its reader's key."""
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_HTML, headers=_HEADERS)

    return routes
