"""torchao: round to nearest, and HQQ's search, to int4; MXFP4 and NVFP4 as its own tensors round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType

from quantizers.protocol import Job, Made, Stopwatch, Unfit, block_linears, serve

INTEGERS = {"int4": torch.int4, "int2": torch.int2}
HQQ = "hqq_scale_only"


def as_integers(model: nn.Module, job: Job) -> dict[str, Any]:
    """Replace the weights of the blocks by quantized tensors; return what was chosen."""
    settings: dict[str, Any] = {"mapping": "symmetric" if job.symmetric else "asymmetric"}
    if job.method == "hqq":
        settings["intx_choose_qparams_algorithm"] = HQQ
    config = IntxWeightOnlyConfig(
        weight_dtype=INTEGERS[job.format],
        granularity=PerGroup(job.group),
        mapping_type=MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
        **({"intx_choose_qparams_algorithm": HQQ} if job.method == "hqq" else {}),
    )
    names = block_linears(model).keys()
    quantize_(model, config, filter_fn=lambda _, name: name in names)
    return settings


def as_floats(weight: torch.Tensor, job: Job) -> torch.Tensor:
    """Return a weight as MXFP4 or NVFP4 has it."""
    if job.format == "mxfp4":
        return MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, job.group).dequantize(torch.float32)
    scale = per_tensor_amax_to_scale(weight.abs().max())
    return NVFP4Tensor.to_nvfp4(weight, block_size=job.group, per_tensor_scale=scale).dequantize(torch.float32)


def sizes(weights: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Linear], job: Job) -> dict[str, int]:
    """Return bytes as packed: torchao keeps unpacked integers on a CPU. Scales of float16, bytes in fp4."""
    found = {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            found[name] = 2 * tensor.numel()
            continue
        groups = tensor.numel() // job.group
        found[name] = tensor.numel() * job.bits // 8 + groups * (2 if job.format.startswith("int") else 1)
        found[name] += 4 * (job.format == "nvfp4") + (0 if job.symmetric else groups * job.bits // 8)
    return found


@torch.no_grad()
def quantize(job: Job) -> Made:
    """Quantize all weights of the blocks."""
    if job.method not in ("rtn", "hqq") or (job.method == "hqq" and not job.format.startswith("int")):
        raise Unfit(f"no {job.method} to {job.format}")
    watch = Stopwatch()
    model = job.load()
    layers = block_linears(model)
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    if job.format.startswith("int"):
        settings = as_integers(model, job)
        weights |= {f"{name}.weight": layer.weight.dequantize().float() for name, layer in layers.items()}
    else:
        settings = {}
        weights |= {f"{name}.weight": as_floats(layer.weight, job) for name, layer in layers.items()}
    return Made(weights, sizes(weights, layers, job), watch.spent(), settings | {"bytes": "counted as packed"})


if __name__ == "__main__":
    serve(quantize, ("torchao", "torch", "transformers"))
