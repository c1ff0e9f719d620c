"""One load on one target, from what is asked for to a document of what came."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from runtime.artifact import verify
from runtime.errors import LoadError, ServingError
from runtime.threads import default_threads
from runtime.traffic.bandwidth import read_bandwidth
from runtime.traffic.measure import Load, Measured, Measurement, Record, Target
from runtime.traffic.metrics import Summary, summarize
from runtime.traffic.workload import KNOWN_IDS, Form, Prompt, Range, Workload

GENERATING: Final = ("server", "decoder")
"""Kinds of targets whose answers are tokens."""


@dataclass(frozen=True)
class Settings:
    """What `optimize bench` is told.

    Attributes:
        load: how questions are asked.
        input_tokens: of drawn prompts.
        output_tokens: of answers.
        prompts: given ones; empty draws them.
        form: of drawn ones.
        model: of a server; None takes its first.
        threads: of an artifact; None takes what this process was given.
        slots: of an artifact; None takes as many as clients of a closed loop, or 8.
        seed: of all that is drawn.
        limits: milliseconds of a good answer, by name.
        dollars_per_hour: price of the machine.
    """

    load: Load
    input_tokens: Range
    output_tokens: Range
    prompts: tuple[Prompt, ...] = ()
    form: Form = "ids"
    model: str | None = None
    threads: int | None = None
    slots: int | None = None
    seed: int = 0
    limits: Mapping[str, float] | None = None
    dollars_per_hour: float | None = None


@dataclass(frozen=True)
class Bench:
    """What `optimize bench --json` prints. Names end in their units: `_s`, `_ms`, `_bytes`.

    Attributes:
        format: of this document, 1.
        date: of the run, ISO 8601.
        target: the folder or the address.
        model: its name on a server, or the artifact's digest.
        kind: "server", or what the artifact is: decoder, classifier, reranker, embedder.
        settings: what was asked for; prompts of a file by their number alone.
        vocabulary: token ids were drawn below this; None where none were drawn.
        is_complete: false when it was interrupted: the numbers are those of the requests that had ended.
        is_counted: whether output tokens are counted by the target; if not, pieces are.
        memory_bytes_per_s: what a plain read of memory reaches with as many threads; None for a server or an encoder.
        summary: see `runtime.traffic.metrics.Summary`.
        requests: see `runtime.traffic.measure.Record`; every request that ended, in that order.
    """

    date: str
    target: str
    model: str
    kind: str
    settings: Settings
    vocabulary: int | None
    is_complete: bool
    is_counted: bool
    memory_bytes_per_s: float | None
    summary: Summary
    requests: tuple[Record, ...]
    format: int = 1

    @property
    def is_generating(self) -> bool:
        """Whether answers are tokens; an encoder's are numbers, all at once."""
        return self.kind in GENERATING

    def to_json(self) -> str:
        """Return the document."""
        document = asdict(replace(self, settings=replace(self.settings, prompts=())))
        document["settings"]["prompts"] = len(self.settings.prompts)
        return json.dumps(document)


@dataclass(frozen=True)
class _Opened:
    """A target, and what is known of it; names as in `Bench`."""

    target: Target
    model: str
    kind: str
    vocabulary: int | None
    memory_bytes_per_s: float | None = None


def run(target: str, settings: Settings) -> Bench:
    """Measure an artifact's folder or a server's address; Ctrl-C ends it with what there is.

    Raises:
        LoadError: what is asked for makes no sense for this target, or it wants another key.
        ServingError: the target cannot be used, or gave no answer at all.
        KeyboardInterrupt: Ctrl-C before any request had ended.
    """
    opened = _server(target, settings) if "://" in target else _artifact(Path(target), settings)
    draws_ids = settings.form == "ids" and not settings.prompts
    vocabulary = (opened.vocabulary or KNOWN_IDS) if draws_ids else None
    workload = Workload(
        settings.input_tokens,
        settings.output_tokens if opened.kind in GENERATING else Range(0, 0),
        settings.seed,
        settings.form,
        vocabulary or KNOWN_IDS,
        settings.prompts,
    )
    measured = _measure(Measurement(opened.target, workload, settings.load))
    errors = [record.error for record in measured.records if record.error]
    if errors and len(errors) == len(measured.records):
        raise ServingError(f"all {len(errors)} requests failed; the first: {errors[0]}")
    return Bench(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        target=target,
        model=opened.model,
        kind=opened.kind,
        settings=settings,
        vocabulary=vocabulary,
        is_complete=measured.is_complete,
        is_counted=measured.is_counted,
        memory_bytes_per_s=opened.memory_bytes_per_s,
        summary=summarize(measured, settings.limits, settings.dollars_per_hour),
        requests=tuple(measured.records),
    )


def _measure(measurement: Measurement) -> Measured:
    """Run to the end or to Ctrl-C, which asyncio makes a cancellation where nobody else handles the signal."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if is_main else None
    try:
        return asyncio.run(measurement.run())
    except KeyboardInterrupt:
        if not measurement.measured.records:
            raise
        return measurement.measured
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def _server(url: str, settings: Settings) -> _Opened:
    from runtime.traffic.server import Server

    for name in ("threads", "slots"):
        if getattr(settings, name) is not None:
            raise LoadError(f"--{name}: is for an artifact's folder; {url} has its own")
    server = Server(url, key=os.environ.get("OPENAI_API_KEY"))
    served = server.find(settings.model)
    return _Opened(server, served.model, "server", served.vocabulary)


def _artifact(folder: Path, settings: Settings) -> _Opened:
    from runtime.encoder import open_encoder
    from runtime.engine import SLOTS, Engine
    from runtime.traffic.local import LocalEncoder, LocalEngine, require_room, weight_bytes

    if settings.model is not None:
        raise LoadError(f"--model: is for a server; {folder} holds one model")
    manifest = verify(folder)
    is_decoder = manifest.kind == "decoder"
    if not is_decoder and settings.form == "chat":
        raise LoadError(f"--chat: {folder} is {manifest.described_kind}, expected a decoder")
    if not settings.prompts and settings.form == "ids":
        most = settings.input_tokens.most + (settings.output_tokens.most if is_decoder else 0)
        require_room(folder, manifest, most)
    if not is_decoder:
        encoder = open_encoder(folder, manifest, settings.threads)
        return _Opened(LocalEncoder(encoder), manifest.digest, manifest.kind, encoder.tokenizer.vocabulary)
    slots = settings.slots or settings.load.concurrency or SLOTS
    engine = Engine.load(folder, slots=slots, threads=settings.threads)
    target = LocalEngine(engine, weight_bytes(folder, manifest))
    bandwidth = read_bandwidth(settings.threads or default_threads())
    return _Opened(target, manifest.digest, manifest.kind, engine.session.vocabulary, bandwidth)
