"""What `decode.py` measures: each engine, the weights it is given, and how these are made when they are absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from lowering import FUSIONS, Job, LoweringFailed, lower

BENCHMARKS = Path(__file__).resolve().parent
QUIET = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Missing(Exception):
    """An engine cannot take part; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where engines live and files go.

    Attributes:
        work: folder for shapes and models; what is there is used again.
        peers_python: interpreter that has the peers, or None.
        openvino_python: interpreter that has OpenVINO and optimum-intel, or None.
    """

    work: Path
    peers_python: Path | None
    openvino_python: Path | None


@dataclass(frozen=True)
class Weights:
    """What an engine really reads.

    Attributes:
        path: what its process is given.
        body: format of the linear layers of the blocks.
        head: format of the tied head.
        size_bytes: all weights on disk.
    """

    path: Path
    body: str
    head: str
    size_bytes: int


@dataclass(frozen=True)
class Variant:
    """One line of the table: an engine with one form of the weights."""

    label: str
    module: str
    is_ours: bool
    python: Callable[[Setting], Path | None]
    build: Callable[[Setting, Path], Weights]
    sets_threads: bool = True  # or else the engine runs with the number of threads it takes by itself

    def interpreter(self, setting: Setting) -> Path:
        """Return the interpreter that has this engine; raise Missing when there is none."""
        python = self.python(setting)
        if python is None or not python.exists():
            raise Missing(f"{self.label}: no interpreter given for it, got {python}")
        return python


def variants() -> list[Variant]:
    """Return every variant, ours first. Blocks and head bits match line by line where the label says so."""
    return [
        ours(32),
        ours(64),
        ours(128),
        genai("b32, its own threads", 32, sets_threads=False),
        genai("b32", 32),
        genai("b32, its fusions", 32, "prune_lm_head=true", "fuse_mlp_gate_up=true"),
        genai("b128, its fusions", 128, "prune_lm_head=true", "fuse_mlp_gate_up=true"),
        llama_cpp("default"),
        llama_cpp("q4_0"),
        openvino(),
    ]


def ours(group_size: int, label: str = "", fusions: tuple[str, ...] = FUSIONS) -> Variant:
    """Return our artifact: int4 body and head in groups of `group_size`, decoded by our runtime."""
    label = label or f"ours int4 g{group_size}"

    def build(setting: Setting, source: Path) -> Weights:
        home = setting.work / "ours" / "-".join([source.name, f"g{group_size}", *fusions])
        job = Job(source, home, group_size, fusions=fusions)
        if not (job.artifact / "manifest.json").exists():
            try:
                lower(job)
            except LoweringFailed as error:
                raise Missing(f"{label}: {error}") from None
        return describe_onnx(job.artifact, source)

    return Variant(label, "ours", True, lambda _: Path(sys.executable), build)


def genai(label: str, block_size: int, *options: str, sets_threads: bool = True) -> Variant:
    """Return onnxruntime-genai on what its own builder writes with these extra options."""

    def build(setting: Setting, source: Path) -> Weights:
        folder = setting.work / "genai" / "-".join([source.name, f"b{block_size}", *options])
        if not (folder / "genai_config.json").exists():
            # Not `int4_block_size`: 0.18 takes that older name without a word and writes blocks of 32.
            extra = ["accuracy_level=4", f"block_size={block_size}", *options]
            command = ["-m", "onnxruntime_genai.models.builder", "-m", str(source), "-o", str(folder)]
            command += ["-p", "int4", "-e", "cpu", "-c", str(setting.work / "cache"), "--extra_options", *extra]
            _run(setting.peers_python, command)
        return describe_onnx(folder, source)

    def python(setting: Setting) -> Path | None:
        return setting.peers_python

    return Variant(f"onnxruntime-genai int4 {label}", "genai", False, python, build, sets_threads)


def llama_cpp(head: str) -> Variant:
    """Return llama.cpp on Q4_0; `head` "default" leaves the tied head to llama.cpp, "q4_0" asks for 4 bits there."""

    def build(setting: Setting, source: Path) -> Weights:
        path = setting.work / "gguf" / f"{source.name}-head-{head}.gguf"
        facts = path.with_name(path.name + ".json")
        if not facts.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _run(setting.peers_python, ["-m", "engines.gguf_file", str(source), str(path), "--head", head])
        described = json.loads(facts.read_text())
        return Weights(path, described["body"], described["head"], path.stat().st_size)

    label = "llama.cpp Q4_0" + ("" if head == "default" else ", head Q4_0")
    return Variant(label, "llama_cpp", False, lambda setting: setting.peers_python, build)


def openvino() -> Variant:
    """Return OpenVINO on int4 in groups of 64, all layers but the head, as optimum-intel writes it."""

    def build(setting: Setting, source: Path) -> Weights:
        folder = setting.work / "openvino" / source.name
        if not (folder / "openvino_model.bin").exists():
            command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(source)]
            command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64"]
            _run(setting.openvino_python, [*command, "--ratio", "1.0", str(folder)])
        size_bytes = (folder / "openvino_model.bin").stat().st_size
        return Weights(folder, "int4 b64 with zero points", "int8 per channel", size_bytes)

    return Variant("OpenVINO int4 g64", "openvino", False, lambda setting: setting.openvino_python, build)


def describe_onnx(folder: Path, source: Path) -> Weights:
    """Read from the graph what was really written; the head is the product as wide as the vocabulary."""
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    body, head = set(), {"float"}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            text = f"int{attributes['bits']} b{attributes['block_size']}"
            if attributes.get("accuracy_level") != 4:
                text += " float activations"
            if attributes["N"] == vocabulary:
                head = {text}
            else:
                body.add(text)
    size_bytes = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    return Weights(folder, ", ".join(sorted(body)), ", ".join(head), size_bytes)


def environment(*search: Path) -> dict[str, str]:
    """Return the environment of an engine's process: no telemetry, no network, modules found in `search`."""
    return {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(map(str, search))}


def _run(python: Path | None, arguments: Sequence[str]) -> None:
    command = [str(python), *arguments]
    done = subprocess.run(command, env=environment(BENCHMARKS), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Missing(f"`{' '.join(command[:4])} ...` ended with {done.returncode}: {last}")
