"""A thread that has a model to itself, for everybody else to call from asyncio.

Only that thread touches the model: what others want reaches it through a queue, between two turns, and a turn wakes the
event loop once, for all that it has news for. With nothing to do the thread sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Self

from runtime.errors import ServingError, SessionError

NAP_S: Final = 1.0

_log = logging.getLogger(__name__)


class Worker(ABC):
    """Works on its own thread, between `async with` and its end.

    Attributes:
        error: why it stopped; None while it is well. It never starts again.
    """

    def __init__(self, name: str, nap_s: float) -> None:
        """Take the name of the thread, and how often it shows life without work."""
        self.error: ServingError | None = None
        self._name, self._nap_s = name, nap_s
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_closing = False
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=name)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._commands.put(self._close)
        await asyncio.to_thread(self._thread.join)

    @property
    def heartbeat_s(self) -> float:
        """Seconds since the thread last showed life; it does after each turn and each nap."""
        return time.monotonic() - self._alive_at

    # ---- on the thread

    @property
    @abstractmethod
    def _has_work(self) -> bool:
        """Whether a turn would do something."""

    @abstractmethod
    def _turn(self) -> None:
        """Do the next piece of work, if there is any."""

    @abstractmethod
    def _fail(self, error: ServingError) -> None:
        """Tell all who wait that nothing more is to come."""

    def _close(self) -> None:
        """Let no turn follow."""
        self._is_closing = True

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function on the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            self._obey()
            while not self._is_closing:
                self._turn()
                self._alive_at = time.monotonic()
                self._obey()
            self.error = ServingError(f"{self._name}: is closed; ask again later")
        except Exception as error:
            _log.exception("the %s has stopped", self._name)
            text = f"{self._name}: has stopped after {type(error).__name__}: {error}; restart the server"
            self.error = SessionError(text)
        self._fail(self.error)
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _obey(self) -> None:
        """Carry out what was asked since the last turn; wait for something when there is no work."""
        with contextlib.suppress(queue.Empty):
            if not self._has_work:
                self._commands.get(timeout=self._nap_s)()
            while True:
                self._commands.get_nowait()()
