"""AutoRound: SignSGD on rounding and range, 200 iterations, its default."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from transformers import AutoTokenizer

from quantizers.protocol import Job, Made, Stopwatch, Unfit, effective_weights, serve, stored_bytes

BATCH = 4
ITERATIONS = {"autoround": 200, "rtn": 0}
TYPES = {"nvfp4": "nv_fp", "mxfp4": "mx_fp"}


def quantize(job: Job) -> Made:
    """Quantize block after block; weights alone."""
    if job.method not in ITERATIONS or job.kind != "decoder":
        raise Unfit(f"no method {job.method} for a {job.kind}")
    watch = Stopwatch()
    model, source, texts = job.load(), job.load(), torch.tensor(job.texts())
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts.split(BATCH)]
    scheme = QuantizationScheme(
        bits=job.bits,
        group_size=job.group,
        sym=job.symmetric,
        data_type=TYPES.get(job.format, "int"),
        act_bits=16,
    )
    settings: dict[str, Any] = {"iters": ITERATIONS[job.method], "batch_size": BATCH}
    if job.format == "int2":
        settings["enable_alg_ext"] = True  # what its authors advise for two bits
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.source),
        scheme=scheme,
        dataset=batches,
        seqlen=texts.shape[1],
        nsamples=len(texts),
        seed=job.seed,
        device_map="cpu",
        amp=False,
        low_cpu_mem_usage=False,
        **settings,
    )
    tuned, _ = tuner.quantize()
    spent = watch.spent()
    weights = effective_weights(tuned, source)
    with tempfile.TemporaryDirectory() as folder:
        tuner.save_quantized(folder, format="auto_round" if job.format.startswith("int") else "llm_compressor")
        sizes = stored_bytes(Path(folder))
    return Made(weights, sizes, spent, settings)


if __name__ == "__main__":
    serve(quantize, ("auto-round", "torch", "transformers"))
