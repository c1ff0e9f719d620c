"""neural-compressor: RTN with a search of the range, GPTQ, AWQ, HQQ, TEQ, from its torch side."""

from __future__ import annotations

from typing import Any

import torch
from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, HQQConfig, RTNConfig, convert, prepare

from quantizers.protocol import Job, Made, Stopwatch, Unfit, block_linears, effective_weights, serve


def config(job: Job) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of a method, and what of it was chosen."""
    common = {"bits": job.bits, "use_sym": job.symmetric, "group_size": job.group}
    if not job.format.startswith("int"):
        raise Unfit(f"its fp4 has float32 scales: no {job.format}")
    if job.method in ("rtn", "rtn mse"):
        chosen = {"use_mse_search": job.method == "rtn mse"}
        return RTNConfig(**common, **chosen, use_layer_wise=False), chosen
    if job.method == "gptq":
        chosen = {"act_order": True, "static_groups": False, "percdamp": 0.01}
        return GPTQConfig(**common, **chosen, true_sequential=True), chosen
    if job.method == "awq":
        chosen = {"use_auto_scale": True, "use_auto_clip": True, "folding": True}
        return AWQConfig(**common, **chosen), chosen
    if job.method == "hqq":
        return HQQConfig(bits=job.bits, group_size=job.group, quant_zero=False), {"quant_zero": False}
    raise Unfit(f"no method {job.method}")


def quantize(job: Job) -> Made:
    """Prepare, show the texts, convert."""
    if job.kind != "decoder" and job.method not in ("rtn", "rtn mse", "hqq"):
        raise Unfit(f"{job.method} is for decoders")
    asked, chosen = config(job)
    watch = Stopwatch()
    model, source = job.load(), job.load()
    asked.set_local("lm_head", type(asked)(dtype="fp32"))
    example = torch.tensor(job.texts()[:1])
    model = prepare(model, asked, example_inputs=example)
    if job.method in ("gptq", "awq"):
        with torch.no_grad():
            for ids in job.texts():
                try:
                    model(input_ids=torch.tensor([ids]))
                except ValueError:  # how GPTQ's observer stops the model after it has seen the first block's input
                    continue
    model = convert(model)
    spent = watch.spent()
    weights = effective_weights(model, source)
    return Made(weights, sizes(job, model, source), spent, chosen)


def sizes(job: Job, model: torch.nn.Module, source: torch.nn.Module) -> dict[str, int]:
    """Return bytes of the packed modules' own buffers; all else in float16."""
    layers = block_linears(source)
    found = {}
    for name, tensor in source.state_dict().items():
        if name.removesuffix(".weight") not in layers:
            found[name] = 2 * tensor.numel()
    for name in layers:
        for leaf, tensor in model.get_submodule(name).state_dict().items():
            if isinstance(tensor, torch.Tensor) and leaf not in ("bias", "weight"):
                found[f"{name}.{leaf}"] = tensor.numel() * tensor.element_size()
    return found


if __name__ == "__main__":
    serve(quantize, ("neural-compressor-pt", "torch", "transformers"))
