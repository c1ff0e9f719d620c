"""`GET /metrics` for Prometheus: vLLM's names where the meaning is the same, so that its dashboards work, and our own.

What engines count is read when it is asked for; a request costs a few observations at its end, a token nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.async_engine import AsyncEngine, Stats
from runtime.encoder_batcher import AsyncEncoder
from runtime.request import Completion, Request

if TYPE_CHECKING:
    from runtime.server.service import Service

_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_MODEL: Final = "model_name"

_ENGINE_COUNTERS: Final = (
    ("vllm:prompt_tokens", "Tokens of prompts that were read.", "prompt_tokens"),
    ("vllm:generation_tokens", "Tokens that were generated.", "generated_tokens"),
    ("optimize_engine_steps", "Steps that engines took.", "steps"),
)
_ENCODER_COUNTERS: Final = (
    ("optimize_texts", "Texts that encoders read.", "texts"),
    ("optimize_text_tokens", "Tokens of these.", "tokens"),
    ("optimize_text_batches", "Batches they ran in.", "batches"),
)


class Metrics:
    """What a server counts of its requests."""

    def __init__(
        self,
        engines: Mapping[str, AsyncEngine],
        encoders: Mapping[str, AsyncEncoder],
        dollars_per_hour: float | None,
    ) -> None:
        """Count for these models, by the names they are asked by."""
        self._registry = CollectorRegistry()
        self._visits = Counter(
            "optimize_http_requests", "Requests over HTTP.", ("route", "status"), registry=self._registry
        )
        self._ended = Counter(
            "vllm:request_success",
            "Answers that ended: stop, length, or abort where time, client or server ended them.",
            (_MODEL, "finished_reason"),
            registry=self._registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From the request to its first token.", _SECONDS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean of the tokens after the first.", _TOKEN_SECONDS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From the request to its end.", _SECONDS)
        self._read = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._written = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._registry.register(_Workers(engines, encoders, dollars_per_hour))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, (_MODEL,), buckets=buckets, registry=self._registry)

    def visited(self, route: str | None, status: int | None) -> None:
        """Count a request over HTTP."""
        self._visits.labels(route or "other", str(status or 0)).inc()

    def ended(self, model: str, request: Request, completion: Completion | None) -> None:
        """Count an answer; without a completion it was ended early."""
        reason = "abort" if completion is None else completion.finish_reason
        self._ended.labels(model, reason).inc()
        if completion is None:
            return
        tokens = len(completion.token_ids)
        self._ttft.labels(model).observe(completion.ttft_s)
        self._e2e.labels(model).observe(time.perf_counter() - request.started)
        self._read.labels(model).observe(completion.prompt_tokens)
        self._written.labels(model).observe(tokens)
        if completion.decode_tokens_per_s:
            self._tpot.labels(model).observe(1 / completion.decode_tokens_per_s)

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self._registry)


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.get("/metrics", summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes


class _Workers(Collector):
    """What engines and encoders tell of themselves when they are asked."""

    def __init__(
        self,
        engines: Mapping[str, AsyncEngine],
        encoders: Mapping[str, AsyncEncoder],
        dollars_per_hour: float | None,
    ) -> None:
        self._engines, self._encoders, self._dollars_per_hour = engines, encoders, dollars_per_hour
        self._started = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        yield _gauge("vllm:num_requests_running", "Requests that run.", {n: each.running for n, each in stats.items()})
        yield self._waiting(stats)
        usage = {name: each.reserved_tokens / each.budget_tokens for name, each in stats.items()}
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the cache that is reserved, 0 to 1.", usage)
        yield _gauge("optimize_slots", "Requests that can run at once.", {n: each.slots for n, each in stats.items()})
        yield from _counters(stats, _ENGINE_COUNTERS)
        encoded = {name: encoder.stats() for name, encoder in self._encoders.items()}
        yield _gauge("optimize_texts_waiting", "Texts that wait.", {n: each.waiting for n, each in encoded.items()})
        yield from _counters(encoded, _ENCODER_COUNTERS)
        busy = {name: each.busy_s for name, each in stats.items()}
        busy |= {name: each.busy_s for name, each in encoded.items()}
        yield _counter("optimize_engine_busy_seconds", "Seconds spent in steps and batches.", busy)
        yield from self._costs(sum(busy.values()))

    def _waiting(self, stats: Mapping[str, Stats]) -> GaugeMetricFamily:
        return _gauge(
            "vllm:num_requests_waiting", "Requests that wait.", {n: each.waiting for n, each in stats.items()}
        )

    def _costs(self, busy_s: float) -> Iterator[Metric]:
        hourly = self._dollars_per_hour
        if hourly is None:
            return
        seconds = {"reserved": time.monotonic() - self._started, "busy": busy_s}
        family = CounterMetricFamily(
            "optimize_cost_dollars",
            "Dollars by --dollars-per-hour: since the start, and while computing.",
            labels=("time",),
        )
        for name, each in seconds.items():
            family.add_metric([name], each * hourly / 3600)
        yield family


def _gauge(name: str, text: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=(_MODEL,))
    for model, value in values.items():
        family.add_metric([model], value)
    return family


def _counters(stats: Mapping[str, object], fields: Sequence[tuple[str, str, str]]) -> Iterator[CounterMetricFamily]:
    """Yield a counter for each of (name, text, attribute of the models' statistics)."""
    for name, text, field in fields:
        yield _counter(name, text, {model: getattr(each, field) for model, each in stats.items()})


def _counter(name: str, text: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(_MODEL,))
    for model, value in values.items():
        family.add_metric([model], value)
    return family
