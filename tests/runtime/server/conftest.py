"""An application in this process, with the small decoder behind it; without the extra `serve` nothing here is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HAS_SERVE = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "httptools", "prometheus_client"))
collect_ignore_glob = [] if HAS_SERVE and importlib.util.find_spec("httpx2") else ["test_*.py"]

NAME = "artifact-v1"


def make_app(folder: Path, settings: Any = None, **options: Any) -> Any:
    """Return an application that serves one decoder on one thread."""
    from runtime.server.app import create_app
    from runtime.server.loading import EngineOptions, load
    from runtime.server.settings import Settings

    served = load(folder, EngineOptions(threads=1, **({"slots": 4} | options)))
    return create_app({NAME: served}, settings or Settings())


def make_client(app: Any) -> Any:
    """Return a client that starts and ends the application with `with`."""
    from starlette.testclient import TestClient

    return TestClient(app, base_url="http://localhost")


@pytest.fixture(scope="module")
def client(decoder_folder: Path) -> Iterator[Any]:
    with make_client(make_app(decoder_folder)) as made:
        yield made
