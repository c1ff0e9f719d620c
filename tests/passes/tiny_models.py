"""Models of a few thousand parameters, made from a configuration and a seed; passes run on them once per session."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from passes._graph import load_graph
from passes._override import Override
from passes._skeleton import read_config
from passes.base import TORCH, Context, Estimate, Model, Pass, PassResult
from passes.export_onnx import ExportOnnx
from passes.quantize_rtn import QuantizeRtn

DECODER = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
CONFIGURATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "llama-deep": ("LlamaForCausalLM", {**DECODER, "num_hidden_layers": 4}),
    "llama-untied": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": False}),
    "llama-narrow": (
        "LlamaForCausalLM",
        {**DECODER, "tie_word_embeddings": False, "hidden_size": 40, "num_attention_heads": 2},
    ),
    "llama-odd-heads": ("LlamaForCausalLM", {**DECODER, "head_dim": 24}),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": False, "use_sliding_window": False}),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 6}),
    "mistral-at-rest": ("MistralForCausalLM", {**DECODER, "sliding_window": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **DECODER,
            "head_dim": 16,
            "initializer_range": 0.3,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0},
    ),
    "phi": ("PhiForCausalLM", {**DECODER, "num_key_value_heads": 4}),
    "bert": ("BertForSequenceClassification", ENCODER),
    "bert-embedder": ("BertModel", ENCODER),
    "bert-masked": ("BertForMaskedLM", ENCODER),
    "albert": (
        "AlbertForSequenceClassification",
        {**ENCODER, "embedding_size": 16, "num_hidden_layers": 3, "initializer_range": 0.3},
    ),
    "bert-ranker": ("BertForSequenceClassification", {**ENCODER, "num_labels": 1, "initializer_range": 0.3}),
    "bert-sharp": ("BertForSequenceClassification", {**ENCODER, "initializer_range": 0.3}),
    "modernbert-sharp": (
        "ModernBertForSequenceClassification",
        {
            **ENCODER,
            "initializer_range": 0.3,
            "local_attention": 8,
            "num_hidden_layers": 4,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 0),
        },
    ),
    "modernbert-deep": (
        "ModernBertForSequenceClassification",
        {
            **ENCODER,
            "local_attention": 8,
            "num_hidden_layers": 6,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 0),
        },
    ),
    "mpnet-sharp": (
        "MPNetForSequenceClassification",
        {**ENCODER, "max_position_embeddings": 40, "initializer_range": 0.3},
    ),
}
"""At their usual initialisation tiny models hardly attend: a wrong mask or scale moves no number. The sharp ones do."""

EXPORT = ExportOnnx()
CALIBRATION = "texts"
TEXTS = [tuple((7 * text + 3 * place * place) % 255 + 1 for place in range(8 + text % 3)) for text in range(12)]
"""Token ids of the entry of `data` that calibrated passes name; three lengths."""
TABLES_IN_INT8 = QuantizeRtn(format="int4", group_size=32, embedding="int8", lm_head="int8")
MIXED = QuantizeRtn(
    format="int4",
    group_size=32,
    symmetric=False,
    embedding="int8",
    lm_head="int4",
    exclude=("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"),
)
"""Zero points, and in layer 1 projections of different formats."""

MANY_BITS = QuantizeRtn(
    format="int4",
    embedding="int8",
    lm_head="int8",
    overrides=(
        Override(layers=("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"), format="int8"),
        Override(layers="model.layers.1.self_attn.k_proj", format="float"),
        Override(layers="model.layers.1.self_attn.*", format="int2"),
    ),
)
"""Layer 0 has its queries and keys in 4 bits, its values in 8; layer 1 keys in float, queries and values in 2."""


def tiny_module(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a model with the family's own initialisation, biases and norms moved off it unless it is "at rest"."""
    architecture, settings = CONFIGURATIONS[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(seed)
    module: PreTrainedModel = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 and not name.endswith("at-rest"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def save_model(module: PreTrainedModel, folder: Path, **options: Any) -> Model:
    """Write a module as its users find it on the Hub; return it at stage torch."""
    module.save_pretrained(folder, **options)
    return Model(TORCH, folder, folder, read_config(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """Return relative name -> sha256 of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def op_counts(model: Model) -> Counter[str]:
    """Return how many nodes of each op type the graph of an onnx stage has."""
    return Counter(node.op_type for node in load_graph(model.folder).graph)


@dataclass
class Workshop:
    """Makes models and runs passes on them; what was made once is made no second time."""

    folder: Path
    made: dict[Any, Any] = field(default_factory=dict)

    def model(self, name: str) -> Model:
        """Return one of `CONFIGURATIONS` at stage torch, in float32."""
        return self.once(name, lambda folder: save_model(tiny_module(name), folder))

    def with_outliers(self, name: str, times: int) -> Model:
        """Return a Llama whose function is kept, two channels of every norm so many times larger."""

        def make(folder: Path) -> Model:
            module = tiny_module(name)
            with torch.no_grad():
                for layer in module.model.layers:
                    for norm, readers in (
                        (layer.input_layernorm, [getattr(layer.self_attn, f"{x}_proj") for x in "qkv"]),
                        (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
                    ):
                        norm.weight[[3, 40]] *= times
                        for reader in readers:
                            reader.weight[:, [3, 40]] /= times
            return save_model(module, folder)

        made: Model = self.once(("outliers", name, times), make)
        return made

    def run(self, name: str, *steps: Pass) -> PassResult:
        """Return what the last of `steps` makes of a model; `requires` and `ensures` are not asked."""
        result = PassResult(self.model(name), {})
        for count, step in enumerate(steps):
            before = result.model
            result = self.once(
                (name, steps[: count + 1]), lambda folder, s=step, b=before: s.run(b, self.context(folder, b))
            )
        return result

    def estimate(self, name: str, *steps: Pass) -> list[Estimate]:
        """Return what each of `steps` would do to a model, each told of what those before it would leave."""
        model, found = self.model(name), []
        for count, step in enumerate(steps):
            found.append(
                self.once(
                    ("estimate", name, steps[: count + 1]),
                    lambda folder, s=step, m=model: s.estimate(m, self.context(folder, m)),
                )
            )
            model = found[-1].model
        return found

    def context(self, folder: Path, source: Model) -> Context:
        """Return a context that works in `folder`."""
        return Context(workdir=folder, source=source, calibration={CALIBRATION: TEXTS})

    def once(self, key: Any, make: Callable[[Path], Any]) -> Any:
        """Return what `make` made in a folder of its own the first time `key` was asked for."""
        if key not in self.made:
            self.made[key] = make(Path(tempfile.mkdtemp(dir=self.folder)))
        return self.made[key]
