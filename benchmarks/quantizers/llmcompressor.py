"""llm-compressor: RTN, GPTQ, AWQ; integers with an observer that searches the range, NVFP4, MXFP4."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier

from quantizers.protocol import Job, Made, Stopwatch, Unfit, effective_weights, serve, stored_bytes

# A machine without an accelerator has nothing to pin memory for; 0.14's AWQ asks for it all the same, and fails.
if not torch.accelerator.is_available():
    torch.Tensor.pin_memory = lambda self, *_: self

PRESETS = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}


def scheme(job: Job) -> QuantizationScheme:
    """Return weights alone in the job's format."""
    if job.format in PRESETS:
        return preset_name_to_scheme(PRESETS[job.format], ["Linear"])
    observer = "minmax" if job.method == "rtn" else "mse"
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=job.symmetric,
        strategy="group",
        group_size=job.group,
        observer=observer,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def recipe(job: Job) -> list[Any]:
    """Return the modifiers of a method."""
    common = {"config_groups": {"all": scheme(job)}, "ignore": ["lm_head", "re:.*classifier", "re:.*pooler.*"]}
    if job.method in ("rtn", "rtn mse"):
        return [QuantizationModifier(**common)]
    if job.method == "gptq":
        return [GPTQModifier(**common, actorder="static", dampening_frac=0.01)]
    if job.method == "awq":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**common)]
    raise Unfit(f"no method {job.method}")


def quantize(job: Job) -> Made:
    """Quantize in one shot, block after block."""
    watch = Stopwatch()
    model, source = job.load(), job.load()
    texts = job.texts()
    steps = recipe(job)
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts])
    needs_data = job.method not in ("rtn", "rtn mse")
    options: dict[str, Any] = {"pipeline": "sequential"} if needs_data else {"pipeline": "datafree"}
    if needs_data:
        options |= {"dataset": data, "num_calibration_samples": len(texts), "max_seq_length": max(map(len, texts))}
        options |= {"shuffle_calibration_samples": False}
    oneshot(model=model, recipe=steps, **options)
    spent = watch.spent()
    weights = effective_weights(model, source)
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.float16).save_pretrained(folder, save_compressed=True)
        sizes = stored_bytes(Path(folder))
    settings = {"observer": "minmax" if job.method == "rtn" else "mse"} if job.format not in PRESETS else {}
    settings |= {"gptq": {"actorder": "static", "damping": 0.01}, "awq": {"duo_scaling": "both"}}.get(job.method, {})
    return Made(weights, sizes, spent, settings)


if __name__ == "__main__":
    serve(quantize, ("llmcompressor", "compressed-tensors", "torch", "transformers"))
