"""Write a Llama or Qwen2 folder as GGUF f16 and let llama.cpp quantize it to Q4_0.

    python -m engines.gguf_file SHAPE_FOLDER OUT.gguf --head q8_0|q4_0

Beside the file stands `OUT.gguf.json` with what llama.cpp really wrote, read back from the file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors import safe_open

Q4_0_FILE = 2  # LLAMA_FTYPE_MOSTLY_Q4_0
F16_FILE = 1  # LLAMA_FTYPE_MOSTLY_F16


def write_f16(source: Path, out: Path) -> None:
    """Write the folder's weights as f16, one dimension as f32, under GGUF's names."""
    config = json.loads((source / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(out, architecture)
    _write_sizes(writer, config)
    _write_vocabulary(writer, json.loads((source / "tokenizer.json").read_text()), config["vocab_size"])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    for name, tensor in _tensors(source):
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = _interleave_rotary(tensor, heads)
        array = tensor.float().numpy()
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            array if array.ndim == 1 else array.astype(np.float16),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, head: str) -> None:
    """Quantize to Q4_0 as llama.cpp does; the tied embedding and head in the format `head`."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = Q4_0_FILE
    parameters.nthread = 2
    parameters.output_tensor_type = parameters.token_embedding_type = int(gguf.GGMLQuantizationType[head.upper()])
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"{source}: llama_model_quantize failed with code {code}")


def describe(path: Path) -> dict[str, str | int]:
    """Return the formats of the body and of the tied head, and the bytes of all tensors: each pass reads them."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    body = sorted({kind for name, kind in types.items() if name.startswith("blk.") and kind != "F32"})
    step_bytes = sum(int(tensor.n_bytes) for tensor in tensors.values())
    return {"body": ", ".join(body), "head": types["token_embd.weight"], "step_bytes": step_bytes}


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(F16_FILE)


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], vocabulary: int) -> None:
    tokens = [""] * vocabulary
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i] = token
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * vocabulary)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _tensors(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.offset_keys():
                yield name, shard.get_tensor(name)


def _interleave_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows [H * E, M] from halves, as Hugging Face rotates them, to pairs, as llama.cpp does."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    """Write one file from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head", choices=("q8_0", "q4_0"), default="q8_0")
    options = parser.parse_args()
    f16 = options.out.with_suffix(".f16.gguf")
    write_f16(options.source, f16)
    quantize(f16, options.out, options.head)
    f16.unlink()
    options.out.with_name(options.out.name + ".json").write_text(json.dumps(describe(options.out)) + "\n")


if __name__ == "__main__":
    main()
