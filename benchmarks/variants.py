"""The engines that are compared: each with the weights it is given, and how these are made when they are absent."""

from __future__ import annotations

import json
import math
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
        step_bytes: those that every pass reads.
    """

    path: Path
    body: str
    head: str
    size_bytes: int
    step_bytes: int


@dataclass(frozen=True)
class Variant:
    """One line of a table: an engine with one form of the weights.

    Attributes:
        weights_label: names the engine and its weights.
        module: of `engines`.
        tables: those it stands in.
        python: its interpreter.
        build: makes its weights of a shape's folder where they are absent.
        settings: of its process, in the engine's own words.
    """

    weights_label: str
    module: str
    tables: tuple[str, ...]
    python: Callable[[Setting], Path | None]
    build: Callable[[Setting, Path], Weights]
    settings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name it: weights and settings."""
        return ", ".join([self.weights_label, *self.settings])

    @property
    def is_ours(self) -> bool:
        """Whether the project's own environment and source run it."""
        return self.module == "ours"

    def interpreter(self, setting: Setting) -> Path:
        """Return the interpreter that has this engine; raise Missing when there is none."""
        python = self.python(setting)
        if python is None or not python.exists():
            raise Missing(f"{self.label}: no interpreter given for it, got {python}")
        return python


EQUAL, BEST = "equal 8-bit head", "best of each"


def variants() -> list[Variant]:
    """Return every variant, ours first."""
    return [
        ours(32, "int8", (EQUAL,)),
        ours(128, "int8", (EQUAL,)),
        ours(128, "int8", (EQUAL,), "ours g128, int8 head, INT8 prompts", (*FUSIONS, "quantize_prefill")),
        ours(32, "int4", (BEST,)),
        ours(128, "int4", (BEST,)),
        llama_cpp("q8_0", "flash", (EQUAL,)),
        llama_cpp("q8_0", "plain", (EQUAL,)),
        llama_cpp("q4_0", "flash", (BEST,)),
        llama_cpp("q4_0", "plain", (BEST,)),
        genai(32, "int8", (EQUAL,)),
        genai(128, "int8", (EQUAL,)),
        genai(128, "int4", (BEST,)),
        openvino(64, "int8", (EQUAL,)),
        openvino(128, "int4", (BEST,)),
    ]


def ours(
    group_size: int, head: str, tables: tuple[str, ...] = (), label: str = "", fusions: tuple[str, ...] = FUSIONS
) -> Variant:
    """Return our artifact: int4 body in groups of `group_size`, decoded by our runtime."""
    label = label or f"ours g{group_size}, {head} head"

    def build(setting: Setting, source: Path) -> Weights:
        home = setting.work / "ours" / "-".join([source.name, f"g{group_size}", head, *fusions])
        job = Job(source, home, group_size, fusions=fusions, head=head)
        if not (job.artifact / "manifest.json").exists():
            try:
                lower(job)
            except LoweringFailed as error:
                raise Missing(f"{label}: {error}") from None
        return describe_onnx(job.artifact, source)

    return Variant(label, "ours", tables, lambda _: Path(sys.executable), build)


def genai(block_size: int, head: str, tables: tuple[str, ...] = ()) -> Variant:
    """Return onnxruntime-genai on what its own builder writes, with its fusions and the last token's logits alone."""

    def build(setting: Setting, source: Path) -> Weights:
        folder = setting.work / "genai" / f"{source.name}-b{block_size}-{head}"
        if not (folder / "genai_config.json").exists():
            # Not `int4_block_size`: 0.18 takes that older name without a word and writes blocks of 32.
            options = ["accuracy_level=4", f"block_size={block_size}", "prune_lm_head=true", "fuse_mlp_gate_up=true"]
            # Its default method loses an int8 head that is tied.
            options += ["algo_config=rtn", "matmul_mixed_precision=last_matmul:int8"] if head == "int8" else []
            command = ["-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
            command += ["-p", "int4", "-e", "cpu", "-c", str(setting.work / "cache"), "--extra_options", *options]
            _run(setting.peers_python, command)
        return describe_onnx(folder, source)

    return Variant(f"genai b{block_size}, {head} head", "genai", tables, _peers, build)


def llama_cpp(head: str, attention: str, tables: tuple[str, ...] = ()) -> Variant:
    """Return llama.cpp on Q4_0; Q8_0 is what it takes for a tied head by itself."""

    def build(setting: Setting, source: Path) -> Weights:
        path = setting.work / "gguf" / f"{source.name}-head-{head}.gguf"
        facts = path.with_name(path.name + ".json")
        if not facts.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _run(setting.peers_python, ["-m", "engines.gguf_file", str(source), str(path), "--head", head])
        described = json.loads(facts.read_text())
        size_bytes = path.stat().st_size
        return Weights(path, described["body"], described["head"], size_bytes, described["step_bytes"])

    return Variant(f"llama.cpp Q4_0, {head} head", "llama_cpp", tables, _peers, build, (attention,))


def openvino(group_size: int, head: str, tables: tuple[str, ...]) -> Variant:
    """Return OpenVINO on int4 as optimum-intel writes it: all layers, or all but the head."""

    def build(setting: Setting, source: Path) -> Weights:
        folder = setting.work / "openvino" / f"{source.name}-g{group_size}-{head}"
        if not (folder / "openvino_model.bin").exists():
            command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(source)]
            command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--ratio", "1.0"]
            command += ["--group-size", str(group_size), "--group-size-fallback", "adjust"]
            command += ["--all-layers"] if head == "int4" else []
            _run(setting.openvino_python, [*command, str(folder)])
        size_bytes = (folder / "openvino_model.bin").stat().st_size
        body = f"int4 b{group_size} with zero points"  # or the largest smaller block that divides
        return Weights(folder, body, body if head == "int4" else "int8 per channel", size_bytes, size_bytes)

    return Variant(
        f"OpenVINO g{group_size}, {head} head", "openvino", tables, lambda setting: setting.openvino_python, build
    )


def _peers(setting: Setting) -> Path | None:
    return setting.peers_python


def _openvino(setting: Setting) -> Path | None:
    return setting.openvino_python


def describe_onnx(folder: Path, source: Path) -> Weights:
    """Read from the graph what was really written; the head is the product as wide as the vocabulary."""
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    sizes = {tensor.name: _size_bytes(tensor) for tensor in graph.initializer}
    body, head, read = set(), {"float"}, set[str]()
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
            read.update(sizes.keys() & set(node.input))
    if (folder / "prefill.onnx").exists():
        body.add("int8 for prompts")
    size_bytes = sum(path.stat().st_size for pattern in ("*.onnx", "*.data") for path in folder.glob(pattern))
    step_bytes = sum(sizes[name] for name in read)
    return Weights(folder, ", ".join(sorted(body)), ", ".join(head), size_bytes, step_bytes)


def _size_bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def environment(*search: Path) -> dict[str, str]:
    """Return the environment of an engine's process: no telemetry, no network, modules found in `search`."""
    return {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(map(str, search))}


def _run(python: Path | None, arguments: Sequence[str]) -> None:
    command = [str(python), *arguments]
    done = subprocess.run(command, env=environment(BENCHMARKS), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Missing(f"`{' '.join(command[:4])} ...` ended with {done.returncode}: {last}")
