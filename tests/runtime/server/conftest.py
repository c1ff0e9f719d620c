"""An application in this process, with the small decoder behind it; without the extra `serve` nothing here is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

HAS_SERVE = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "httptools", "prometheus_client"))
collect_ignore_glob = [] if HAS_SERVE and importlib.util.find_spec("httpx2") else ["test_*.py"]

NAME = "artifact-v1"


@pytest.fixture(scope="session")
def app_of(decoder_folder: Path) -> Callable[..., Any]:
    """Return what makes an application of settings and of options of the engine: one decoder on one thread."""
    from runtime.server.app import create_app
    from runtime.server.loading import EngineOptions, load
    from runtime.server.settings import Settings

    def make(settings: Settings | None = None, **options: Any) -> Any:
        served = load(decoder_folder, EngineOptions(threads=1, **({"slots": 4} | options)))
        return create_app({NAME: served}, settings or Settings())

    return make


@pytest.fixture(scope="session")
def client_of() -> Callable[..., Any]:
    """Return what makes a client of an application, which `with` starts and ends."""
    from starlette.testclient import TestClient

    return partial(TestClient, base_url="http://localhost")


@pytest.fixture(scope="module")
def client(app_of: Callable[..., Any], client_of: Callable[..., Any]) -> Iterator[Any]:
    with client_of(app_of()) as made:
        yield made
