"""Write models of real shapes with random weights: what speed and memory depend on, without a download.

Each folder is what a Hugging Face folder would be: `config.json` in the Hub's own style, safetensors shards with an
index, `generation_config.json` and a working byte-level BPE tokenizer (8,000 tokens trained on the standard library;
the rest of the vocabulary has made-up names: the model produces them, no text does). One shard holds one block, so the
writer needs the memory of the largest tensor, not of the model.

    python benchmarks/shapes.py qwen2.5-0.5b FOLDER
    python benchmarks/shapes.py llama-3.2-1b FOLDER --layers 8
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
TOKENIZER_VOCABULARY = 8000
FORMAT = 2  # of a folder: an older one is written again
STANDARD_DEVIATION = 0.02  # the initializer_range of both families


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the Llama family, named as in `docs/design.md`: D, L, H, K, E, V."""

    name: str
    model_type: str
    architecture: str
    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    rope_theta: float
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    rope_scaling: dict[str, float | str] | None = field(default=None, hash=False)

    @property
    def parameters(self) -> int:
        """Number of weights, the tied embedding once."""
        return sum(torch.Size(size).numel() for _, tensors in shards(self) for size in tensors.values())


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="smollm2-135m",
            model_type="llama",
            architecture="LlamaForCausalLM",
            width=576,
            feed_forward=1536,
            layers=30,
            heads=9,
            kv_heads=3,
            head_width=64,
            vocabulary=49152,
            context=8192,
            rope_theta=1e5,
        ),
        Shape(
            name="qwen2.5-0.5b",
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            width=896,
            feed_forward=4864,
            layers=24,
            heads=14,
            kv_heads=2,
            head_width=64,
            vocabulary=151936,
            context=32768,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            qkv_bias=True,
        ),
        Shape(
            name="llama-3.2-1b",
            model_type="llama",
            architecture="LlamaForCausalLM",
            width=2048,
            feed_forward=8192,
            layers=16,
            heads=32,
            kv_heads=8,
            head_width=64,
            vocabulary=128256,
            context=131072,
            rope_theta=5e5,
            rope_scaling=LLAMA3_ROPE,
        ),
        Shape(
            name="llama-3.2-3b",
            model_type="llama",
            architecture="LlamaForCausalLM",
            width=3072,
            feed_forward=8192,
            layers=28,
            heads=24,
            kv_heads=8,
            head_width=128,
            vocabulary=128256,
            context=131072,
            rope_theta=5e5,
            rope_scaling=LLAMA3_ROPE,
        ),
    )
}


def config(shape: Shape) -> dict[str, Any]:
    """Return the `config.json` of a shape."""
    return {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        **({"rope_scaling": shape.rope_scaling} if shape.rope_scaling else {}),
        "hidden_act": "silu",
        "initializer_range": STANDARD_DEVIATION,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def shards(shape: Shape) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Yield (shard name, {tensor name: size}): the embedding, then one shard per block, then the last norm."""
    D, E = shape.width, shape.head_width
    query, key_value = shape.heads * E, shape.kv_heads * E
    yield "embedding", {"model.embed_tokens.weight": (shape.vocabulary, D)}
    for layer in range(shape.layers):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (query, D),
            "self_attn.k_proj.weight": (key_value, D),
            "self_attn.v_proj.weight": (key_value, D),
            "self_attn.o_proj.weight": (D, query),
            "post_attention_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (shape.feed_forward, D),
            "mlp.up_proj.weight": (shape.feed_forward, D),
            "mlp.down_proj.weight": (D, shape.feed_forward),
        }
        if shape.qkv_bias:
            block |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", query), ("k", key_value), ("v", key_value))}
        yield f"block-{layer:03d}", {f"model.layers.{layer}.{name}": size for name, size in block.items()}
    yield "norm", {"model.norm.weight": (D,)}


def write_shape(shape: Shape, folder: Path, seed: int = 0) -> None:
    """Write a model of this shape with random bf16 weights; a folder that is already complete is left as it is."""
    described = {"shape": asdict(shape), "seed": seed, "format": FORMAT}
    done = folder / "shape.json"
    if done.exists() and json.loads(done.read_text()) == json.loads(json.dumps(described)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(seed)
    names: dict[str, str] = {}
    total_bytes = 0
    for shard, sizes in shards(shape):
        tensors = {name: _random_tensor(name, size, generator) for name, size in sizes.items()}
        file = f"model-{shard}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total_bytes += sum(t.nbytes for t in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": names})
    _write_json(folder / "config.json", config(shape))
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    _write_tokenizer(folder, shape.vocabulary)
    _write_json(done, described)


def _random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(std=STANDARD_DEVIATION, generator=generator)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:150]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sources], trainer)
    described = json.loads(tokenizer.to_str())
    described["model"]["vocab"] |= {f"[{token}]": token for token in range(tokenizer.get_vocab_size(), vocabulary)}
    _write_json(folder / "tokenizer.json", described)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END},
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Write one shape from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="another depth than the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers:
        shape = replace(shape, layers=options.layers)
    write_shape(shape, options.folder, options.seed)
    print(f"{options.folder}: {shape.name}, {shape.layers} layers, {shape.parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
