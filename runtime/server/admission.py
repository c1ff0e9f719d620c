"""Who may wait, and how long: a queue that is bounded by requests and by the tokens of their prompts."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Final

from runtime.server.errors import ApiError
from runtime.server.settings import Settings

_REMEMBERED: Final = 32  # ends of requests that the rate is measured from
_LONGEST_RETRY_S: Final = 60


class Admission:
    """Counts the requests of a server: those that wait for their first token, and all.

    Attributes:
        is_draining: whether the server was told to end: nobody is let in any more.
        waiting: requests without a first token.
        waiting_tokens: of their prompts.
        running: requests let in that have not ended, those that wait among them.
    """

    def __init__(self, settings: Settings) -> None:
        self.is_draining = False
        self.waiting = self.waiting_tokens = self.running = 0
        self._settings = settings
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)

    def enter(self, requests: int = 1) -> Entry:
        """Let a request in before its prompt is read.

        Args:
            requests: answers it asks for.

        Raises:
            ApiError: 503 while the server drains, 429 when too many wait.
        """
        if self.is_draining:
            raise self.refusal()
        limit = self._settings.queue
        if self.waiting and self.waiting + requests > limit:
            text = f"queue: {self.waiting} requests wait, expected at most {limit} with this one; ask again later"
            raise ApiError(429, text, code="queue_full", headers=self._retry(self.waiting + requests - limit))
        return Entry(self, requests)

    def refusal(self) -> ApiError:
        """Return what those are told that come too late."""
        return ApiError(503, "server: is shutting down; ask another one, or later", headers=self._retry(1))

    def check_tokens(self, tokens: int) -> None:
        """Raise 429 when a prompt has no room among those that wait; one that waits alone always has."""
        limit = self._settings.queue_tokens
        if self.waiting_tokens and self.waiting_tokens + tokens > limit:
            text = f"queue: prompts of {self.waiting_tokens} tokens wait, expected at most {limit} with this one"
            raise ApiError(429, f"{text}; ask again later", code="queue_full", headers=self._retry(1))

    def ended(self, requests: int) -> None:
        """Note that requests have ended, for the rate."""
        self._ends.extend([time.monotonic()] * min(requests, _REMEMBERED))

    def _retry(self, requests: int) -> dict[str, str]:
        """Return a header that says when so many of the requests will have ended, by the rate of the last ones."""
        seconds = 1.0
        if len(self._ends) > 1:
            rate = (len(self._ends) - 1) / max(time.monotonic() - self._ends[0], 1e-3)
            seconds = requests / rate
        return {"Retry-After": str(min(max(math.ceil(seconds), 1), _LONGEST_RETRY_S))}


class Entry:
    """The place of one request among those of the server; it ends with `leave`, or as a context manager."""

    def __init__(self, admission: Admission, requests: int) -> None:
        self._admission = admission
        self._requests = requests
        self._waiting, self._tokens = requests, 0
        self._has_left = False
        admission.waiting += requests
        admission.running += requests

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def weigh(self, tokens: int) -> None:
        """Add the tokens of its prompts, now that they are known.

        Raises:
            ApiError: 429 when too many wait.
        """
        self._admission.check_tokens(tokens)
        self._tokens = tokens
        self._admission.waiting_tokens += tokens

    def start(self) -> None:
        """Note its first token: it waits no longer."""
        self._admission.waiting -= self._waiting
        self._admission.waiting_tokens -= self._tokens
        self._waiting = self._tokens = 0

    def leave(self) -> None:
        """Note its end; a second time does nothing."""
        if self._has_left:
            return
        self._has_left = True
        self.start()
        self._admission.running -= self._requests
        self._admission.ended(self._requests)
