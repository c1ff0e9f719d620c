"""llama.cpp's own quantizer: Q4_0 and Q4_K_M, without an importance matrix; embedding and head in float16."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import torch
from engines.gguf_file import write_f16

from quantizers.protocol import Job, Made, Stopwatch, Unfit, block_linears, serve

FILES = {"Q4_0": 2, "Q4_K_M": 15}


def quantize(job: Job) -> Made:
    """Write float16, let llama.cpp quantize it, read it back."""
    if job.method not in FILES or job.kind != "decoder":
        raise Unfit(f"no {job.method} for a {job.kind}")
    watch = Stopwatch()
    model = job.load()
    config = model.config
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "f16.gguf", Path(folder) / "small.gguf"
        write_f16(Path(job.source), whole)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = FILES[job.method], job.threads
        parameters.output_tensor_type = parameters.token_embedding_type = int(gguf.GGMLQuantizationType.F16)
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(small).encode(), ctypes.byref(parameters)):
            raise Unfit("llama_model_quantize failed")
        spent = watch.spent()
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(small).tensors}
        stored, kinds = {}, set()
        for layer in block_linears(model):
            tensor = tensors[names.get_name(f"{layer}.weight", try_suffixes=(".weight",))]
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            if layer.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
                values = halves(values, heads)
            weights[f"{layer}.weight"] = values.contiguous()
            stored[f"{layer}.weight"] = int(tensor.n_bytes)
            kinds.add(tensor.tensor_type.name)
    return Made(weights, stored, spent, {"types": ", ".join(sorted(kinds))})


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows [H * E, M] from pairs, as llama.cpp rotates them, to halves, as Hugging Face does."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    serve(quantize, ("gguf", "llama-cpp-python", "torch"))
