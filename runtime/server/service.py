"""What all routes share: the models, the settings, who waits, and the threads that read prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol, TypeVar

from runtime.artifact import Manifest
from runtime.async_engine import AsyncEngine
from runtime.encoder_batcher import AsyncEncoder
from runtime.errors import ServingError
from runtime.server.admission import Admission
from runtime.server.errors import ApiError
from runtime.server.metrics import Metrics
from runtime.server.settings import Settings
from runtime.tokenizer import Tokenizer
from runtime.worker import Worker

READERS: Final = 2  # threads that tokenize: the libraries release the GIL
STUCK_S: Final = 120.0  # a worker that shows no life for so long never will

_T = TypeVar("_T")


@dataclass(frozen=True)
class Served:
    """A model and what runs it.

    Attributes:
        manifest: of its artifact.
        tokenizer: its own.
        worker: what answers.
        sampling: what its `generation_config.json` says of temperature and the like, for requests that say nothing.
    """

    manifest: Manifest
    tokenizer: Tokenizer
    worker: Worker
    sampling: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def engine(self) -> AsyncEngine:
        """The worker of a decoder."""
        assert isinstance(self.worker, AsyncEngine)
        return self.worker

    @property
    def encoder(self) -> AsyncEncoder:
        """The worker of any other."""
        assert isinstance(self.worker, AsyncEncoder)
        return self.worker

    @property
    def longest(self) -> int:
        """Most tokens of a text, or of a prompt and its answer together."""
        return self.engine.engine.longest if isinstance(self.worker, AsyncEngine) else self.manifest.context_length

    @property
    def described(self) -> str:
        """What it can, in words."""
        if not isinstance(self.worker, AsyncEngine):
            return f"{self.manifest.described_kind}, texts of at most {self.longest} tokens"
        engine, stats = self.worker.engine, self.worker.stats()
        megabytes = stats.budget_tokens * engine.session.cache.token_bytes / 1e6
        slots = f"{stats.slots} slot{'s' if stats.slots > 1 else ''}"
        memory = f"at most {megabytes:.0f} MB of keys and values"
        return f"{slots}, context {self.longest} tokens, {memory}; {engine.promises.words}"


class Service:
    """What a server is made of, but for HTTP.

    Attributes:
        models: name to model.
        settings: what it was told.
        admission: who waits.
        started: when, by `time.time`.
        metrics: what it counts.
    """

    def __init__(self, models: Mapping[str, Served], settings: Settings) -> None:
        self.models = dict(models)
        self.settings = settings
        self.admission = Admission(settings)
        self.started = time.time()
        engines = {name: each.worker for name, each in models.items() if isinstance(each.worker, AsyncEngine)}
        encoders = {name: each.worker for name, each in models.items() if isinstance(each.worker, AsyncEncoder)}
        self.metrics = Metrics(engines, encoders, settings.dollars_per_hour)
        self._jobs: set[Expiring] = set()
        self._is_over = False
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the workers, and end them."""
        async with AsyncExitStack() as stack:
            stack.callback(self._readers.shutdown)
            for served in self.models.values():
                await stack.enter_async_context(served.worker)
            yield

    def find(self, name: str | None, kinds: Collection[str]) -> tuple[str, Served]:
        """Return the model that a request names, with its name; it may name none where one alone is of its kind.

        Raises:
            ApiError: 404 for an unknown name, 400 for a model of another kind, 503 for one whose worker has stopped.
        """
        if name is None:
            fitting = [each for each, served in self.models.items() if served.manifest.kind in kinds]
            if not fitting:
                text = f"model: none of those served here is of the kind {' or '.join(sorted(kinds))}"
                raise ApiError(400, text, param="model")
            if len(fitting) > 1:
                raise ApiError(400, f"model: is missing, expected one of {', '.join(fitting)}", param="model")
            name = fitting[0]
        served = self.models.get(name)
        if served is None:
            text = f"model: got {name[:200]!r}, expected one of {self._names()}"
            raise ApiError(404, text, param="model", code="model_not_found")
        if served.manifest.kind not in kinds:
            text = f"model: {name} is {served.manifest.described_kind}, expected {' or '.join(sorted(kinds))}"
            raise ApiError(400, text, param="model")
        if served.worker.error is not None:
            raise ApiError(503, str(served.worker.error))
        return name, served

    async def read(self, function: Callable[[], _T]) -> _T:
        """Run what takes time for a long prompt on a thread, beside the event loop.

        Raises:
            ApiError: 400, for what it raises of the runtime's own errors.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, function)
        except ServingError as error:
            raise ApiError.of(error) from None

    def stuck(self) -> str | None:
        """Return what cannot go on without a restart, in words; None while all is well."""
        for name, served in self.models.items():
            if served.worker.error is not None:
                return f"{name}: {served.worker.error}"
            if served.worker.heartbeat_s > STUCK_S:
                return f"{name}: has shown no life for {served.worker.heartbeat_s:.0f} seconds; restart the server"
        return None

    def attend(self, job: Expiring) -> None:
        """Let a job be ended with `expire_all`, until `dismiss`; at once where that was called before."""
        self._jobs.add(job)
        if self._is_over:
            job.expire(self.admission.refusal())

    def dismiss(self, job: Expiring) -> None:
        """Forget a job."""
        self._jobs.discard(job)

    def expire_all(self) -> None:
        """End all answers where they are, now that the server ends."""
        self._is_over = True
        for job in list(self._jobs):
            job.expire(self.admission.refusal())

    def _names(self) -> str:
        return ", ".join(self.models)


class Expiring(Protocol):
    """An answer that can be ended where it is."""

    def expire(self, error: ApiError) -> None:
        """End it; with an error if it has not begun."""
