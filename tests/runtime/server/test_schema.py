"""Whatever fits the published schema, or nearly does, is answered or refused; nothing breaks the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from runtime.server.settings import Settings

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def server(app_of: Any, listening: Any) -> Iterator[Any]:
    settings = Settings(port=0)
    app = app_of(settings)
    with listening(app, settings) as made:
        made.app = app
        yield made


POSTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{name}", "/livez", "/readyz", "/metrics"]


@pytest.mark.parametrize(
    ("route", "mode"),
    [*((route, "POSITIVE") for route in (*GETS, *POSTS)), *((route, "NEGATIVE") for route in POSTS)],
)
def test_no_request_breaks_the_server(server: Any, route: str, mode: str) -> None:
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    ((method, _),) = server.app.openapi()["paths"][route].items()
    cases = schema[route][method.upper()].as_strategy(generation_mode=schemathesis.GenerationMode[mode])

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=cases)
    def ask(case: Any) -> None:
        response = case.call(base_url=server.url, timeout=30)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
