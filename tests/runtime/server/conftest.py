"""An application in this process, with the small decoder behind it; without the extra `serve` nothing here is run."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

HAS_SERVE = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "httptools", "prometheus_client"))
collect_ignore_glob = [] if HAS_SERVE and importlib.util.find_spec("httpx2") else ["test_*.py"]

NAME = "artifact-v1"


class Listening:
    """A server on a thread."""

    def __init__(self, app: Any, settings: Any) -> None:
        from runtime.server.run import bind, server_of

        self.admission = app.state.service.admission
        self.port: int = 0
        self._socket = bind(settings)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        listens = threading.Event()
        self._server = server_of(app, settings, listens.set)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        assert listens.wait(30)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


@pytest.fixture(scope="session")
def listening() -> type[Listening]:
    """Return what makes an application and its settings listen, inside `with`."""
    return Listening


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
