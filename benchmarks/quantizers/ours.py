"""Ours: one pass of the product, on the texts that the others see; weights alone, activations in float."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from passes._skeleton import Skeleton, read_config
from passes.base import TORCH, Context, Model, Pass
from quantizers.protocol import Job, Made, Stopwatch, Unfit, serve, stored_bytes

PASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("quantize_rtn", {}),
    "rtn mse": ("quantize_rtn", {"clip": "mse"}),
    "rtn importance": ("quantize_rtn", {"clip": "importance"}),
    "gptq": ("quantize_gptq", {}),
    "awq": ("quantize_awq", {}),
    "autoround": ("quantize_autoround", {}),
}
"""Method -> pass and its fields beside format, group and texts; all else as the pass has it by default."""


def build(job: Job) -> tuple[Pass, dict[str, Any]]:
    """Return the pass, and the fields that were set."""
    if job.method not in PASSES:
        raise Unfit(f"no method {job.method}")
    name, chosen = PASSES[job.method]
    try:
        module = importlib.import_module(f"passes.{name}")
    except ModuleNotFoundError as error:
        raise Unfit(f"no pass {name}") from error
    kind = getattr(module, "".join(word.title() for word in name.split("_")))
    known = {each.name for each in fields(kind)}
    options: dict[str, Any] = {"format": job.format, "activations": "float", **chosen}
    if job.format.startswith("int"):
        options |= {"group_size": job.group, "symmetric": job.symmetric}
    if "calibration" in known and job.method not in ("rtn", "rtn mse"):
        options |= {"calibration": "texts", "samples": 1 << 20, "context": 1 << 20}
    absent = options.keys() - known
    if absent:
        raise Unfit(f"{name} has no {', '.join(sorted(absent))}")
    return kind(**options), options


def quantize(job: Job) -> Made:
    """Run the pass with all its checks."""
    step, options = build(job)
    folder = Path(job.source)
    source = Model(TORCH, folder, folder, read_config(folder))
    with tempfile.TemporaryDirectory() as work:
        texts = [tuple(ids) for ids in job.texts()]
        context = Context(Path(work), source, threads=job.threads, seed=job.seed, calibration={"texts": texts})
        watch = Stopwatch()
        step.requires(source)
        result = step.run(source, context)
        step.ensures(source, result.model, context)
        spent = watch.spent()
        skeleton = Skeleton(result.model)
        weights = {}
        for tensor in Skeleton(source).module.state_dict():
            layer = tensor.rpartition(".")[0]
            if tensor.endswith(".weight") and layer in skeleton.specs:
                spec = skeleton.specs[layer]
                names = spec.format.shapes(1, 1)
                stored = {n: skeleton.entries[skeleton.stored_name(f"{layer}.{n}")].read() for n in names}
                features = skeleton.module.get_submodule(layer).features
                weights[tensor] = spec.format.load(stored, features).contiguous()
            else:
                weights[tensor] = skeleton.read(tensor)
        return Made(weights, stored_bytes(Path(work)), spent, {**options, "note": result.note})


if __name__ == "__main__":
    serve(quantize, ("torch", "transformers"))
