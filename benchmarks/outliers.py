"""A model with outliers that computes what it did: some channels of each norm loud, and their readers' weights small.

What large models grow by themselves, a small one is given: rounding has to cope with inputs a hundred times as large as
their neighbours, and with weights a hundred times as small.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@torch.no_grad()
def add_outliers(model: nn.Module, share: float, factor: float, seed: int) -> int:
    """Multiply a share of each norm's gains by `factor` and divide what is read of them; return how many per norm.

    Channels are drawn for each norm anew. For models built as Llama is.
    """
    random, count = torch.Generator().manual_seed(seed), 0
    for block in model.get_submodule("model.layers").children():
        for name, readers in READERS.items():
            gains = block.get_submodule(name).weight
            count = max(1, round(share * len(gains)))
            chosen = torch.randperm(len(gains), generator=random)[:count]
            gains[chosen] *= factor
            for reader in readers:
                block.get_submodule(reader).weight[:, chosen] /= factor
    return count


def write_with_outliers(source: Path, out: Path, share: float = 0.01, factor: float = 100.0, seed: int = 0) -> None:
    """Write a copy of a Llama in float32: in float16 the small weights would lose digits."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    add_outliers(model, share, factor, seed)
    model.save_pretrained(out)
    for path in source.glob("*token*.json"):
        shutil.copyfile(path, out / path.name)
