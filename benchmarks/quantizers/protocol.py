"""How a quantizer's process is asked: a file of jobs in, for each a folder with what it made of the weights.

    python -m quantizers.NAME JOBS.json

Each job's folder gets `model.safetensors`, the source's tensors with every weight as the quantizer's own modules
multiply by it, in float32, and `facts.json`. Torch and safetensors only: this file runs in the peers' environments too.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

CLEAR_PEAK = "5"


@dataclass(frozen=True)
class Job:
    """One model to quantize: the linear layers of its blocks; embedding, norms and head stay as they are.

    Attributes:
        source: folder of a Hugging Face model.
        kind: "decoder" or "classifier".
        calibration: JSON file with token ids of texts, all of one length in a decoder's.
        method: rtn, gptq, awq, autoround, hqq, or what the quantizer calls its own.
        format: int4, int2, nvfp4 or mxfp4.
        group: input features that share a scale.
        symmetric: without zero points.
        seed: of whatever the method draws.
        threads: that it may use.
        out: folder that takes the result.
    """

    source: str
    kind: str
    calibration: str
    method: str
    format: str
    group: int
    symmetric: bool
    seed: int
    threads: int
    out: str

    @property
    def bits(self) -> int:
        """Return the bits of one value."""
        return 2 if self.format == "int2" else 4

    def texts(self) -> list[list[int]]:
        """Return the token ids of the calibration texts."""
        texts: list[list[int]] = json.loads(Path(self.calibration).read_text())
        return texts

    def load(self) -> nn.Module:
        """Return the source in float32."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        auto = AutoModelForCausalLM if self.kind == "decoder" else AutoModelForSequenceClassification
        model: nn.Module = auto.from_pretrained(self.source, dtype=torch.float32).eval()
        return model


@dataclass(frozen=True)
class Spent:
    """Time by the clock and of all processors, and the largest resident set, libraries included."""

    seconds: float
    processor_s: float
    peak_bytes: int


class Stopwatch:
    """Starts where it is made; the peak begins anew at what is resident then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        self._start, self._processor = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        """Return what was spent until now."""
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
        return Spent(time.perf_counter() - self._start, time.process_time() - self._processor, peak)


@dataclass(frozen=True)
class Made:
    """What a quantizer made.

    Attributes:
        weights: tensor name of the source -> float32 values.
        stored: tensor name -> bytes in the quantizer's own file, head and embedding included; the names of a layer's
            tensors begin with the layer's.
        spent: on quantizing, without reading back what was made.
        settings: what was chosen for the method, in the quantizer's own words.
    """

    weights: Mapping[str, torch.Tensor]
    stored: Mapping[str, int]
    spent: Spent
    settings: Mapping[str, Any] = field(default_factory=dict)


class Unfit(Exception):
    """The quantizer has no such method, format or model; the message says which."""


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return name -> linear layer inside the blocks, which are what the outermost `nn.ModuleList`s hold."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{each}.") for each in lists)
    }


@torch.no_grad()
def effective_weight(layer: nn.Module, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the [N, M] that a layer multiplies by, whatever it holds: its answers to the unit vectors."""
    unit = torch.eye(features, dtype=dtype)
    answers: torch.Tensor = layer(unit)
    if getattr(layer, "bias", None) is not None:
        answers = answers - layer(torch.zeros(1, features, dtype=dtype))
    return answers.t().float().contiguous()


@torch.no_grad()
def effective_weights(
    model: nn.Module, source: nn.Module, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return the source's tensors as a quantized twin has them, which computes in `dtype`."""
    linears = block_linears(source)
    values = model.state_dict()
    weights = {}
    for name, tensor in source.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer in linears and leaf == "weight":
            weights[name] = effective_weight(model.get_submodule(layer), linears[layer].in_features, dtype)
        elif name in values:
            weights[name] = values[name].float().contiguous()
        else:
            raise Unfit(f"{name} is not among the tensors of the quantized model")
        if weights[name].shape != tensor.shape:
            raise Unfit(f"{name}: got shape {list(weights[name].shape)}, expected {list(tensor.shape)}")
    return weights


def stored_bytes(folder: Path) -> dict[str, int]:
    """Return tensor name -> bytes of all safetensors files in a folder."""
    sizes = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                sizes[name] = tensor.numel() * tensor.element_size()
    if not sizes:
        raise Unfit(f"nothing was stored in {folder}")
    return sizes


def serve(quantize: Callable[[Job], Made], libraries: Iterable[str]) -> None:
    """Do every job of the file named on the command line; one that fails says so in its `facts.json`."""
    from importlib.metadata import version

    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    versions = {name: version(name) for name in libraries}
    for content in json.loads(Path(sys.argv[1]).read_text()):
        job = Job(**content)
        out = Path(job.out)
        out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        facts: dict[str, Any] = {"job": asdict(job), "versions": versions}
        try:
            made = quantize(job)
            facts |= {**asdict(made.spent), "stored": dict(made.stored), "settings": dict(made.settings)}
            save_file({name: tensor.clone() for name, tensor in made.weights.items()}, out / "model.safetensors")
        except Exception as error:  # of a foreign library: the others' jobs go on
            lines = str(error).strip().splitlines() or [""]
            facts["failed"] = f"{type(error).__name__}: {lines[0]}"[:300]
            traceback.print_exc()
        (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
