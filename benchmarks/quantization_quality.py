"""Fewer bits: our quantizers beside others', on the same models, calibration texts, bits and items; one evaluator.

Each engine quantizes in a process and an environment of its own. What its modules multiply by is read back as float32
weights, so that all are scored by one code, `optimize`'s own, and judged by its own paired test: is ours shown to be
no worse than the best of the others, but for a tenth of what rounding to nearest loses? Embedding and head stay as they
are, in float16.

    python benchmarks/quantization_quality.py --work DIR --peers PEERS --install --calibration TEXTS.jsonl

Every result is kept in DIR and used again. `--quantizers` and `--seeds` say which are made now; the tables show all
that are there.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outliers import write_with_outliers
from quantizers.protocol import Job, block_linears
from report import header, machine, say, table, versions, write_json
from safetensors.torch import load_file

from optimizer.evaluate.classification import Classification
from optimizer.evaluate.items import load_items
from optimizer.evaluate.perplexity import Perplexity
from optimizer.evaluate.run import evaluate
from optimizer.evaluate.scorers import TorchScorer
from optimizer.evaluate.text_reader import TextReader
from optimizer.gate import Budget, Scores, Verdict, judge
from optimizer.recipe import DataSource
from passes._skeleton import build_module, read_config
from passes.base import TORCH, Model

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
ALLOWED = 0.1
"""Share of what rounding to nearest loses that ours may be worse by."""
OURS = "ours"


@dataclass(frozen=True)
class Cell:
    """Formats that are compared with each other: the same numbers, the same groups."""

    name: str
    format: str
    group: int
    symmetric: bool = True


CELLS = (
    Cell("int4 g32", "int4", 32),
    Cell("int4 g128", "int4", 128),
    Cell("int4 g128 with zero points", "int4", 128, False),
    Cell("int2 g64 with zero points", "int2", 64, False),
    Cell("nvfp4", "nvfp4", 16),
    Cell("mxfp4", "mxfp4", 32),
)


@dataclass(frozen=True)
class Quantizer:
    """An engine and where it runs.

    Attributes:
        module: of `quantizers`.
        methods: that it is asked for; those that draw nothing and see no texts run once.
        packages: what its environment holds; empty for one that is given, or is the project's own.
        cells: names of those it knows; empty for all.
        environment: variables that its process needs.
        flags: of pip.
    """

    name: str
    module: str
    methods: tuple[str, ...]
    packages: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


QUANTIZERS = (
    Quantizer(OURS, "ours", ("rtn", "rtn mse", "rtn importance", "gptq", "awq", "autoround")),
    Quantizer("llm-compressor", "llmcompressor", ("rtn mse", "gptq", "awq"), ("llmcompressor",)),
    Quantizer(
        "GPTQModel",
        "gptqmodel",
        ("gptq", "awq"),
        ("setuptools>=77", "wheel", "gptqmodel"),
        environment={"GPTQMODEL_CPU_WORKERS": "2"},  # its pools want two, and take one of two cores by themselves
        flags=("--no-build-isolation",),
    ),
    Quantizer("AutoRound", "autoround", ("autoround",), ("auto-round",)),
    Quantizer("torchao", "torchao", ("rtn", "hqq"), ("torchao",)),
    Quantizer("neural-compressor", "neural_compressor", ("gptq", "awq", "hqq"), ("neural-compressor-pt",)),
    Quantizer("onnxruntime", "ort", ("rtn", "hqq")),
    Quantizer("llama.cpp", "gguf", ("Q4_0", "Q4_K_M"), cells=("int4 g32",)),
    Quantizer("OpenVINO", "openvino", ("rtn", "scale estimation", "gptq")),
)
UNSEEING = ("rtn", "rtn mse", "hqq", "Q4_0", "Q4_K_M")
"""Methods that see no texts: one run stands for all seeds."""


@dataclass(frozen=True)
class Subject:
    """A model, the texts it is scored on, and the draws of texts it is calibrated on.

    Attributes:
        draws: one file of token ids for each seed.
    """

    name: str
    folder: Path
    kind: str
    data: DataSource
    draws: tuple[Path, ...]
    items: int | None

    @cached_property
    def model(self) -> Model:
        """Return the source."""
        return Model(TORCH, self.folder, self.folder, read_config(self.folder))

    @cached_property
    def task(self) -> Perplexity | Classification:
        """Return how it is scored."""
        if self.kind == "decoder":
            return Perplexity(data="texts", context=512, items=self.items)
        return Classification(data="texts", context=128, items=self.items)

    @property
    def metric(self) -> str:
        """Return the name of its score."""
        return "perplexity" if self.kind == "decoder" else "accuracy"

    @cached_property
    def items_by_task(self) -> dict[str, Any]:
        """Return the items, made once."""
        reader = TextReader.of(self.folder, self.model.config)
        return load_items({"task": self.task}, {"texts": self.data}, reader)

    def scores(self, folder: Path, threads: int) -> Scores:
        """Score a folder of weights, or read what it scored."""
        path = folder / f"scores-{self.data.files[0].stem}-{self.items}.json"
        if not path.exists():
            model = Model(TORCH, folder, self.folder, self.model.config)
            result = evaluate({"task": self.task}, self.items_by_task, TorchScorer(model, self.kind, threads))
            found = result["task"].scores[self.metric]
            values = {name: np.asarray(each).tolist() for name, each in found.values.items()}
            path.write_text(json.dumps({**asdict(found), "values": values}))
        content = json.loads(path.read_text())
        arrays = {name: np.array(each) for name, each in content["values"].items()}
        return Scores(content["metric"], content["items"], tuple(content["groups"]), arrays, content["point"])

    @cached_property
    def own(self) -> Scores:
        """Return the source's scores."""
        return self.scores(self.folder_of_scores, 1)

    @property
    def folder_of_scores(self) -> Path:
        """Return a folder with the source's weights that may be written to."""
        return self.draws[0].parent / "source"


@dataclass(frozen=True)
class Result:
    """What one run made, read from its folder."""

    quantizer: str
    method: str
    cell: Cell
    seed: int
    folder: Path
    facts: Mapping[str, Any]

    @property
    def failed(self) -> str:
        """Return why there is nothing."""
        return str(self.facts.get("failed", ""))


# ---- texts


def pieces(path: Path, reader: TextReader, context: int) -> list[list[int]]:
    """Return all texts of a file in pieces of exactly `context` tokens, each after BOS."""
    found = []
    start = [] if reader.bos is None else [reader.bos]
    size = context - len(start)
    for line in path.read_text(encoding="utf-8").splitlines():
        (ids,) = reader.encode_whole([json.loads(line)["text"]])
        ids = ids[len(start) :] if ids[: len(start)] == start and start else ids
        found += [start + ids[first : first + size] for first in range(0, len(ids) - size + 1, size)]
    return found


def rows(path: Path, reader: TextReader, context: int, column: str) -> list[list[int]]:
    """Return the texts of a CSV file as a classifier reads them."""
    with path.open(encoding="utf-8", newline="") as file:
        return [list(ids) for ids in reader.encode([row[column] for row in csv.DictReader(file)], context, bos=False)]


def draw(texts: Sequence[Sequence[int]], folder: Path, seeds: int, samples: int) -> tuple[Path, ...]:
    """Write disjoint draws of texts, one file for each seed."""
    if seeds * samples > len(texts):
        raise SystemExit(f"calibration: got {len(texts)} texts, expected {seeds} draws of {samples}; draw fewer")
    order = random.Random(0).sample(range(len(texts)), len(texts))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(seeds):
        path = folder / f"texts-{samples}-{seed}.json"
        path.write_text(json.dumps([texts[number] for number in order[seed * samples : (seed + 1) * samples]]))
        paths.append(path)
    return tuple(paths)


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """Yield the models that are asked for."""
    work = options.work / "models"
    data = DataSource(json=options.held_out, group="path")
    folders = {"stdlib-llama": options.model}
    if "outliers" in options.models:
        folders["outliers"] = work / "outliers-model"
        if not (folders["outliers"] / "config.json").exists():
            write_with_outliers(options.model, folders["outliers"])
    for name in (name for name in folders if name in options.models):
        folder = folders[name]
        texts = pieces(options.calibration, TextReader.of(folder, read_config(folder)), options.context)
        paths = draw(texts, work / name, options.draws, options.samples)
        yield _with_source(Subject(name, folder, "decoder", data, paths, options.items))
    if options.classifier and "classifier" in options.models:
        folder, name = options.classifier, options.classifier.name
        texts = rows(options.train, TextReader.of(folder, read_config(folder)), 128, options.text)
        paths = draw(texts, work / name, options.draws, options.samples)
        source = DataSource(csv=options.test, text=options.text, label=options.label)
        yield _with_source(Subject(name, folder, "classifier", source, paths, None))


def _with_source(subject: Subject) -> Subject:
    if not (subject.folder_of_scores / "config.json").exists():
        shutil.copytree(subject.folder, subject.folder_of_scores, dirs_exist_ok=True)
        for path in subject.folder_of_scores.iterdir():
            path.chmod(0o644)
    return subject


# ---- engines


def python_of(quantizer: Quantizer, options: argparse.Namespace) -> Path:
    """Return the interpreter that has an engine."""
    given = {"llama.cpp": options.llama_python, "OpenVINO": options.openvino_python}
    if quantizer.name in given:
        return Path(given[quantizer.name] or "")
    return options.peers / f"q-{quantizer.module}" / "bin/python" if quantizer.packages else Path(sys.executable)


def install(quantizer: Quantizer, options: argparse.Namespace) -> str:
    """Make the environment of an engine; return why that failed, or "".

    It sees the project's own packages after its own, so that torch is not kept twice where one version serves both.
    """
    folder = options.peers / f"q-{quantizer.module}"
    if (folder / "installed").exists():
        return ""
    say(f"installing {quantizer.name}")
    venv.create(folder, with_pip=True, clear=True)
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = folder / "lib" / python / "site-packages" / "shared.pth"
    shared.write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {**os.environ, "BUILD_CUDA_EXT": "0"}
    *needed, package = quantizer.packages
    for packages, flags in ((needed, ()), ([package], quantizer.flags)):
        if packages:
            command = [folder / "bin/pip", "install", "-q", *flags, *packages]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    (folder / "installed").touch()
    return ""


def jobs(subject: Subject, quantizer: Quantizer, options: argparse.Namespace) -> Iterator[tuple[Cell, Job]]:
    """Yield the jobs of an engine on a model, those with one seed once."""
    for cell in (cell for cell in CELLS if cell.name in options.cells):
        if quantizer.cells and cell.name not in quantizer.cells:
            continue
        for method in quantizer.methods:
            for seed, path in enumerate(subject.draws[:1] if method in UNSEEING else subject.draws):
                if options.seeds is not None and seed not in options.seeds:
                    continue
                if options.methods and method not in options.methods:
                    continue
                yield cell, _job(subject, quantizer, cell, method, seed, path, options)


def _job(
    subject: Subject, quantizer: Quantizer, cell: Cell, method: str, seed: int, path: Path, options: argparse.Namespace
) -> Job:
    place = [subject.name, quantizer.module, method, cell.name, path.stem]
    out = options.work / "runs" / "-".join(place).replace(" ", "_")
    texts, threads = str(path.absolute()), options.threads
    format_, group, symmetric = cell.format, cell.group, cell.symmetric
    source, kind = str(subject.folder.absolute()), subject.kind
    return Job(source, kind, texts, method, format_, group, symmetric, seed, threads, str(out.absolute()))


def is_made(job: Job) -> bool:
    """Return whether a job was done; one that failed may work by now."""
    path = Path(job.out) / "facts.json"
    return path.exists() and "failed" not in json.loads(path.read_text())


def run(quantizer: Quantizer, wanted: Sequence[Job], options: argparse.Namespace) -> str:
    """Do the jobs that are not done yet in one process; return why there is none, or ""."""
    again = [job for job in wanted if options.again or not is_made(job)]
    if not again:
        return ""
    python = python_of(quantizer, options)
    if not python.is_file():
        return f"no interpreter at {python}"
    listed = hashlib.sha256(repr(again).encode()).hexdigest()[:12]
    path = options.work / "runs" / f"{quantizer.module}-{listed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(job) for job in again]))
    say(f"{quantizer.name}: {len(again)} jobs, log in {path.with_suffix('.log')}")
    search = [BENCHMARKS, ROOT] if quantizer.name == OURS else [BENCHMARKS]
    environment = {**os.environ, **quantizer.environment, "PYTHONPATH": os.pathsep.join(map(str, search))}
    environment |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": str(options.threads)}
    command = [python, "-m", f"quantizers.{quantizer.module}", path]
    with path.with_suffix(".log").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, cwd=path.parent, check=False).returncode
    if code:
        lines = path.with_suffix(".log").read_text().strip().splitlines() or [f"ended with {code}"]
        return lines[-1]
    return ""


def results(subject: Subject, options: argparse.Namespace) -> list[Result]:
    """Return all that is there of a model."""
    found = []
    everything = argparse.Namespace(**{**vars(options), "seeds": None, "methods": (), "cells": [c.name for c in CELLS]})
    for quantizer in QUANTIZERS:
        for cell, job in jobs(subject, quantizer, everything):
            path = Path(job.out) / "facts.json"
            if path.exists():
                facts = json.loads(path.read_text())
                found.append(Result(quantizer.name, job.method, cell, job.seed, path.parent, facts))
    return found


# ---- what was really made


@cache
def linears(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the shapes [N, M] of the linear layers of the blocks."""
    module = build_module(read_config(folder), "sdpa")
    return {name: (layer.out_features, layer.in_features) for name, layer in block_linears(module).items()}


def bits(result: Result, subject: Subject) -> tuple[float, float]:
    """Return the bits of a weight in the blocks and in all, head and embedding in float16, as stored."""
    layers, stored = linears(subject.folder), result.facts["stored"]
    body = sum(size for name, size in stored.items() if any(name.startswith(f"{each}.") for each in layers))
    module = build_module(subject.model.config, "sdpa")
    biases = sum(module.get_submodule(name).bias is not None and shape[0] for name, shape in layers.items())
    weights = sum(rows * features for rows, features in layers.values())
    everything = sum(each.numel() for each in module.parameters())
    body -= 2 * biases
    return 8 * body / weights, (8 * body + 16 * (everything - weights)) / everything


def most_values(result: Result, subject: Subject) -> int:
    """Return the largest number of different values in a group of a layer's weight: what says how many bits it has."""
    weights, most = load_file(result.folder / "model.safetensors"), 0
    for name, (rows, features) in linears(subject.folder).items():
        groups = weights[f"{name}.weight"].reshape(rows, features // result.cell.group, result.cell.group)
        ordered = groups.sort(-1).values
        scale = groups.abs().amax(-1, keepdim=True)
        steps = (ordered.diff(dim=-1) > 1e-4 * scale).sum(-1) + 1
        most = max(most, int(steps.max()))
    return most


def untouched(result: Result, subject: Subject) -> bool:
    """Return whether embedding and head are the source's."""
    mine, own = load_file(result.folder / "model.safetensors"), load_file(subject.folder / "model.safetensors")
    names = [name for name in own if "embed" in name or "head" in name]
    return all(torch.allclose(mine[name], own[name].float(), atol=1e-3) for name in names)


# ---- verdicts


def pooled(scores: Sequence[Scores]) -> Scores:
    """Return the scores of several seeds as one: of a document its mean loss, of a text each answer by itself."""
    first = scores[0]
    if first.metric == "perplexity":
        nll = np.mean([each.values["nll"] for each in scores], axis=0)
        tokens = first.values["tokens"]
        point = float(np.exp(nll.sum() / tokens.sum()))
        return Scores(first.metric, first.items, first.groups, {"nll": nll, "tokens": tokens}, point)
    correct = np.concatenate([each.values["correct"] for each in scores])
    groups = tuple(str(number) for number in range(len(first.groups)))  # a text's answers depend on each other
    point = float(correct.mean())
    return Scores(first.metric, f"{len(scores)} x {first.items}", groups * len(scores), {"correct": correct}, point)


def loss(scores: Scores, source: Scores) -> float:
    """Return what was lost: nats per token, or points of accuracy as a share."""
    if scores.metric == "perplexity":
        return math.log(scores.point / source.point)
    return source.point - scores.point


@dataclass(frozen=True)
class Line:
    """An engine's method in a cell, over its seeds."""

    quantizer: str
    method: str
    results: tuple[Result, ...]
    scores: Scores
    points: tuple[float, ...]

    @property
    def label(self) -> str:
        """Name it."""
        return f"{self.quantizer} {self.method}"


def lines(subject: Subject, cell: Cell, found: Sequence[Result], threads: int) -> list[Line]:
    """Return all that can be scored in a cell."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for result in found:
        if result.cell == cell and not result.failed:
            grouped.setdefault((result.quantizer, result.method), []).append(result)
    made = []
    for (quantizer, method), some in grouped.items():
        for result in some:
            config = result.folder / "config.json"
            if not config.exists():
                shutil.copyfile(subject.folder / "config.json", config)
        scores = [subject.scores(result.folder, threads) for result in some]
        made.append(Line(quantizer, method, tuple(some), pooled(scores), tuple(each.point for each in scores)))
    return made


def verdict(ours: Line, rival: Line, rounding: float) -> Verdict:
    """Judge ours against a rival, each over its own seeds."""
    one, other = ours.scores, rival.scores
    if one.metric == "accuracy":
        seeds = math.lcm(len(ours.results), len(rival.results))
        one, other = _repeated(one, seeds // len(ours.results)), _repeated(other, seeds // len(rival.results))
        return judge(other, replace(one, items=other.items), Budget("accuracy", ALLOWED * rounding))
    return judge(other, one, Budget("perplexity", math.expm1(ALLOWED * rounding), relative=True))


def _repeated(scores: Scores, times: int) -> Scores:
    values = {name: np.tile(each, times) for name, each in scores.values.items()}
    return replace(scores, groups=scores.groups * times, values=values)


COLUMNS = (
    "quantizer",
    "bits in blocks",
    "in all",
    "values",
    "score",
    "by seed",
    "won back",
    "ours against the best of the others",
    "processor s",
    "peak MiB",
)


@dataclass(frozen=True)
class Standing:
    """A cell, the best first.

    Attributes:
        rounding: what our rounding to nearest loses; nan where there is none.
        best: of the others; None where there is none.
    """

    subject: Subject
    found: Sequence[Line]
    rounding: float
    best: Line | None

    @classmethod
    def of(cls, subject: Subject, found: Sequence[Line]) -> Standing:
        """Sort the lines of a cell."""
        ordered = sorted(found, key=lambda each: loss(each.scores, subject.own))
        base = next((each for each in ordered if (each.quantizer, each.method) == (OURS, "rtn")), None)
        best = next((each for each in ordered if each.quantizer != OURS), None)
        return cls(subject, ordered, loss(base.scores, subject.own) if base else math.nan, best)

    def verdicts(self) -> dict[str, Verdict]:
        """Return what is said of each of ours."""
        if self.best is None or not self.rounding > 0:
            return {}
        own = (each for each in self.found if each.quantizer == OURS)
        return {each.label: verdict(each, self.best, self.rounding) for each in own}

    def rows(self) -> Iterator[list[str]]:
        """Yield a row for each line."""
        judged, digits = self.verdicts(), 3 if self.subject.kind == "decoder" else 4
        for line in self.found:
            first = line.results[0]
            body, whole = bits(first, self.subject)
            checked = f"{most_values(first, self.subject)}" + (
                "" if untouched(first, self.subject) else ", head changed"
            )
            points = ", ".join(f"{point:.{digits}f}" for point in line.points)
            won = 1 - loss(line.scores, self.subject.own) / self.rounding
            seconds = float(np.mean([each.facts["processor_s"] for each in line.results]))
            peak = max(each.facts["peak_bytes"] for each in line.results) / 2**20
            said = judged.get(line.label)
            size = [f"{body:.3f}", f"{whole:.3f}", checked]
            scored = [f"{line.scores.point:.{digits}f}", points, f"{won:.0%}", in_words(said) if said else ""]
            yield [line.label, *size, *scored, f"{seconds:.0f}", f"{peak:.0f}"]

    def document(self) -> dict[str, Any]:
        """Return all of it for other programs."""
        return {
            "rounding": self.rounding,
            "best other": self.best and self.best.label,
            "points": {line.label: line.points for line in self.found},
            "settings": {line.label: line.results[0].facts["settings"] for line in self.found},
            "verdicts": {name: asdict(said) for name, said in self.verdicts().items()},
        }


def in_words(said: Verdict) -> str:
    """Write an outcome, its bounds and what is allowed, in percent."""
    return f"{said.outcome} [{100 * said.lower:+.2f}, {100 * said.upper:+.2f}] of {100 * said.limit:.2f}"


def failures(found: Sequence[Result]) -> list[list[str]]:
    """Return what could not be made, once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in found:
        if result.failed:
            cells = reasons.setdefault((f"{result.quantizer} {result.method}", result.failed), [])
            cells += [result.cell.name] if result.cell.name not in cells else []
    return [[name, ", ".join(cells), why.replace("|", "/")] for (name, why), cells in reasons.items()]


def make(subject: Subject, options: argparse.Namespace) -> dict[str, str]:
    """Run what is asked for and not there; return engine -> why it could not."""
    absent = {}
    for quantizer in (each for each in QUANTIZERS if each.name in options.quantizers):
        why = install(quantizer, options) if options.install and quantizer.packages else ""
        why = why or run(quantizer, [job for _, job in jobs(subject, quantizer, options)], options)
        if why:
            absent[quantizer.name] = why
    return absent


def standings(subject: Subject, found: Sequence[Result], threads: int) -> dict[str, Standing]:
    """Return every cell that something was made for."""
    cells = {cell.name: lines(subject, cell, found, threads) for cell in CELLS}
    return {name: Standing.of(subject, scored) for name, scored in cells.items() if scored}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in QUANTIZERS]
    parser.add_argument("--work", type=Path, required=True, help="folder for results; reused")
    parser.add_argument("--peers", type=Path, required=True, help="folder of the engines' environments")
    parser.add_argument("--install", action="store_true", help="make the environments that are not there")
    parser.add_argument("--llama-python", type=Path, help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--openvino-python", type=Path, help="interpreter that has openvino and nncf")
    parser.add_argument("--model", type=Path, default=ROOT / "recipes/models/stdlib-llama")
    parser.add_argument("--held-out", type=Path, default=ROOT / "recipes/data/stdlib-heldout.jsonl")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON lines with `text`, of which seeds draw")
    parser.add_argument("--classifier", type=Path, help="folder of a sequence classifier")
    parser.add_argument("--test", type=Path, help="CSV file that the classifier is scored on")
    parser.add_argument("--train", type=Path, help="CSV file that it is calibrated on")
    parser.add_argument("--text", default="text", help="column of both files with the text")
    parser.add_argument("--label", default="label", help="column of both files with the label")
    parser.add_argument("--models", nargs="*", default=["stdlib-llama", "outliers", "classifier"])
    parser.add_argument("--quantizers", nargs="*", default=names, choices=names, help="those that run now")
    parser.add_argument("--methods", nargs="*", default=[], help="methods that run now; all if none is named")
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS], help="cells that run now")
    parser.add_argument("--seeds", nargs="*", type=int, help="draws that run now; all if none is named")
    parser.add_argument("--only-make", action="store_true", help="score and print nothing")
    parser.add_argument("--again", action="store_true", help="run what has run before")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64, help="texts of a draw")
    parser.add_argument("--context", type=int, default=256, help="tokens of a calibration text")
    parser.add_argument("--items", type=int, help="documents that are scored; all if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    options.peers, options.work = options.peers.absolute(), options.work.absolute()
    return options


def main() -> None:
    """Quantize what is missing, score, judge, print Markdown, write JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    absent: dict[str, str] = {}
    made: dict[str, Any] = {}
    parts: list[str] = []
    for subject in subjects(options):
        absent |= make(subject, options)
        if options.only_make:
            continue
        found = results(subject, options)
        cells = standings(subject, found, options.threads)
        made[subject.name] = {name: standing.document() for name, standing in cells.items()}
        parts.append(f"## {subject.name}: {subject.metric} of the source {subject.own.point:.4f}\n")
        for name, standing in cells.items():
            parts += [f"### {name}\n", table(COLUMNS, standing.rows())]
        failed = failures(found)
        parts += ["Not made:\n", table(["quantizer", "cells", "why"], failed)] if failed else []
    about = machine() | {
        "calibration": f"{options.draws} disjoint draws of {options.samples} texts of {options.context} tokens",
        "judged": f"paired, one-sided 95 %; allowed {ALLOWED:.0%} of the loss of our rounding to nearest",
    }
    libraries = versions(("torch", "transformers"))
    print(header("Fewer bits: ours beside others", about, libraries))
    print("\n".join([*parts, *(f"- {name}: {why}" for name, why in absent.items())]))
    if options.json:
        write_json(options.json, {"about": about, "absent": absent, "cells": made})


if __name__ == "__main__":
    main()
