"""Chains of fusions on an encoder: each built on the one before, all loaded at once, taking turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import Spread, say, table

from optimizer.catalogue import installed
from passes._graph import GRAPH, load_graph
from passes._skeleton import read_config
from passes.base import TORCH, Context, Model, Pass, PassError
from runtime.session import EncoderSession

WEIGHTS: Mapping[str, tuple[str, Mapping[str, Any]] | None] = {
    "float32": None,
    "quantize_rtn int8": ("quantize_rtn", {"format": "int8", "group_size": 32}),
    "quantize_int8": ("quantize_int8", {}),
}
FUSIONS = ("fuse_rotary", "fuse_attention", "fuse_embeddings", "fuse_norm", "fuse_gelu")
"""`fuse_norm` would take the norm of `fuse_embeddings` where no look-up is shared by all sequences."""


@dataclass(frozen=True)
class EncoderLoad:
    """What each chain is asked, and how often."""

    batches: Sequence[int]
    lengths: Sequence[int]
    threads: int
    rounds: int


@dataclass(frozen=True)
class Chain:
    """A graph to be timed; `refused` says why the last fusion left it as it was."""

    label: str
    model: Model
    refused: str = ""

    def nodes(self) -> int:
        """Return how many nodes the graph has."""
        return len(list(load_graph(self.model.folder).graph))


def encoder_sections(
    source: Path, work: Path, load: EncoderLoad, weights: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Measure every kind of weights; return sections of Markdown and the numbers of every round."""
    sections, document = [], []
    for name in weights:
        sections.append(f"### {source.name}, {name}\n")
        try:
            chains = build(source, work / "encoders" / source.name / name.replace(" ", "-"), WEIGHTS[name])
        except PassError as error:
            sections.append(f"Missing: {error}\n")
            continue
        refused = [chain for chain in chains if chain.refused]
        measured = [chain for chain in chains if not chain.refused]
        seconds = {shape: time_in_turns(measured, *shape, load) for shape in shapes(load)}
        sections.append(table(["chain", "nodes", *map(shape_title, seconds)], rows(measured, seconds)))
        sections += [f"Not part of a chain: {chain.label}: {chain.refused}\n" for chain in refused]
        numbers = {
            shape_title(shape): dict(zip(labels(measured), runs, strict=True)) for shape, runs in seconds.items()
        }
        document.append({"weights": name, "seconds": numbers})
    return sections, document


def shapes(load: EncoderLoad) -> list[tuple[int, int]]:
    """Return every (batch, length)."""
    return [(batch, length) for batch in load.batches for length in load.lengths]


def shape_title(shape: tuple[int, int]) -> str:
    """Name a column."""
    return f"{shape[0]} × {shape[1]}, ms and gain"


def labels(chains: Sequence[Chain]) -> list[str]:
    """Name the rows."""
    return [chain.label for chain in chains]


def rows(chains: Sequence[Chain], seconds: Mapping[tuple[int, int], list[list[float]]]) -> list[list[str]]:
    """Return each chain's milliseconds and their gain over the chain before it, formed round by round."""
    written = []
    for place, chain in enumerate(chains):
        cells = []
        for runs in seconds.values():
            before = runs[max(place - 1, 0)]
            gain = Spread.of([b / a for a, b in zip(runs[place], before, strict=True)])
            cells.append(f"{1e3 * Spread.of(runs[place]).median:.2f}, {gain.text(2)}")
        written.append([chain.label, str(chain.nodes()), *cells])
    return written


def build(source: Path, home: Path, weights: tuple[str, Mapping[str, Any]] | None) -> list[Chain]:
    """Lower a folder and add one fusion after another; a refused one is left out of the chains that follow.

    Raises:
        PassError: the weights' own pass is not installed or refuses, or the export does.
    """
    model = Model(TORCH, source, source, read_config(source))
    if weights is not None:
        model = run(weights[0], weights[1], model, home / weights[0])
    model = run("export_onnx", {}, model, home / "export_onnx")
    chains = [Chain("export_onnx alone", model)]
    for fusion in FUSIONS:
        try:
            model = run(fusion, {}, model, home / fusion)
        except PassError as refusal:
            chains.append(Chain(f"+ {fusion}", model, str(refusal)))
        else:
            chains.append(Chain(f"+ {fusion}", model))
    return chains


def run(name: str, options: Mapping[str, Any], model: Model, folder: Path) -> Model:
    """Run one pass, its own check included."""
    passes: Mapping[str, type[Pass]] = installed().passes
    if name not in passes:
        raise PassError(f"{name}: there is no such pass")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    step, ctx = passes[name](**options), Context(workdir=folder, source=model)
    step.requires(model)
    result = step.run(model, ctx).model
    step.ensures(model, result, ctx)
    say(f"{name}: done")
    return result


def time_in_turns(chains: Sequence[Chain], batch: int, length: int, load: EncoderLoad) -> list[list[float]]:
    """Return seconds per run of every chain, one number per round."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, int(chains[0].model.config["vocab_size"]), (batch, length))
    ends = [length, *rng.integers(max(1, length // 2), length + 1, batch - 1)]
    texts = [row[:end].tolist() for row, end in zip(ids, ends, strict=True)]
    sessions = [EncoderSession(chain.model.folder / GRAPH, threads=load.threads) for chain in chains]
    repeats = max(1, 512 // (batch * length))
    seconds: list[list[float]] = [[] for _ in chains]
    for session in sessions:
        session.run(texts)  # memory is planned and reserved in the first run of a shape
    for _ in range(load.rounds):
        for session, times in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                session.run(texts)
            times.append((time.perf_counter() - start) / repeats)
    say(f"{batch} x {length}: done")
    return seconds
