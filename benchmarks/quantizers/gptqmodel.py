"""GPTQModel: GPTQ with a search of the range and activation order kept within groups, AWQ, RTN."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import AWQConfig, GPTQConfig

from quantizers.protocol import Job, Made, Stopwatch, Unfit, effective_weights, serve, stored_bytes

SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"act_group_aware": True, "mse": 2.4, "damp_percent": 0.01},
    "awq": {},
}


def quantize(job: Job) -> Made:
    """Quantize block after block and load what was saved."""
    if job.method not in SETTINGS or not job.format.startswith("int") or job.kind != "decoder":
        raise Unfit(f"no {job.method} to {job.format} for a {job.kind}")
    settings = SETTINGS[job.method]
    kind = AWQConfig if job.method == "awq" else GPTQConfig
    config = kind(
        bits=job.bits,
        group_size=job.group,
        sym=job.symmetric,
        device="cpu",
        offload_to_disk=False,
        **settings,
    )
    watch = Stopwatch()
    model = GPTQModel.load(job.source, config, dtype=torch.float32)
    texts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.texts()]
    model.quantize(texts, batch_size=8, backend=BACKEND.TORCH)
    spent = watch.spent()
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        sizes = stored_bytes(Path(folder))
        loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        weights = effective_weights(loaded.model, job.load(), torch.float16)  # its torch kernel has no float32
    return Made(weights, sizes, spent, settings)


if __name__ == "__main__":
    serve(quantize, ("gptqmodel", "torch", "transformers"))
