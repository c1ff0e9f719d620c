"""Small whole projects, as a user has them: a model of a few thousand parameters, its tokenizer, data and a recipe."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
LABELS = ("calm", "angry", "glad")
DECODER_RECIPE = """\
name: tiny
model: model
target: {device: cpu, threads: 1}
data:
  texts: {json: texts.jsonl}
evaluate:
  perplexity: {task: perplexity, data: texts, context: 32}
  agreement: {task: agreement, data: texts, context: 32}
gate:
  perplexity: {max_increase: 5%}
  agreement: {max_kl: 0.5}
  size: {max_ratio: 1.2}
passes:
  - quantize_rtn: {format: int8}
  - export_onnx
  - fuse_norm
"""
CLASSIFIER_RECIPE = """\
name: tiny-classifier
model: model
target: {device: cpu, threads: 1}
data:
  test: {csv: test.csv, text: text, label: mood}
evaluate:
  accuracy: {task: classification, data: test, context: 32}
  agreement: {task: agreement, data: test, context: 32}
gate:
  accuracy: {max_drop: 5pt}
  agreement: {max_flips: 10%}
passes:
  - quantize_rtn: {format: int8}
  - export_onnx
"""
EMBEDDER_RECIPE = """\
name: tiny-embedder
model: model
target: {device: cpu, threads: 1}
data:
  pairs: {json: pairs.jsonl, text: one, pair: two, score: gold}
  texts: {json: texts.jsonl}
evaluate:
  people: {task: similarity, data: pairs, context: 32}
  source: {task: similarity, data: texts, context: 32}
gate:
  people: {max_drop: 10pt}
  source: {max_drop: 5pt}
passes:
  - quantize_rtn: {format: int8}
  - export_onnx
"""


@dataclass(frozen=True)
class Project:
    """A recipe, and a store and an output of its own.

    Attributes:
        recipe: in a folder with what it names.
        store: of the passes.
        output: where the artifact goes.
    """

    recipe: Path
    store: Path
    output: Path

    @property
    def folder(self) -> Path:
        return self.recipe.parent

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def command(self, *arguments: object) -> list[str]:
        """Return the command line that runs the recipe."""
        return optimize(self.recipe, "--output", self.output, *arguments)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of the command: this store, one thread, no width (the test runner may set one)."""
        inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        return {**inherited, "OPTIMIZE_STORE": str(self.store), "OMP_NUM_THREADS": "1", **more}

    def run(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the recipe in a process of its own."""
        return call(self.command(*arguments), env=self.environment(), **options)

    def copy(self, folder: Path, with_store: bool = True) -> Project:
        """Copy recipe, model and data, and the store if asked, below `folder`; the output is a place of its own."""
        shutil.copytree(self.folder, folder / "project")
        if with_store:
            shutil.copytree(self.store, folder / "store")
        return Project(folder / "project" / self.recipe.name, folder / "store", folder / "out")


def optimize(*arguments: object) -> list[str]:
    """Return a command line of `optimize`."""
    return [sys.executable, "-m", "optimizer.cli", *map(str, arguments)]


def call(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it said."""
    options.setdefault("cwd", ROOT)
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def documents(count: int, seed: int = 0) -> list[str]:
    """Return texts of 10 to 30 words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(10, 30))) for _ in range(count)]


def write_decoder_project(folder: Path, items: int = 40) -> None:
    """Write a llama of two layers, texts and a recipe into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder / "model", documents(200, seed=1))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_texts(folder / "texts.jsonl", documents(items))
    (folder / "recipe.yaml").write_text(DECODER_RECIPE, encoding="utf-8")


def write_classifier_project(folder: Path, items: int = 200) -> None:
    """Write a BERT classifier of two layers, a CSV of its own answers as labels (one in ten wrong) and a recipe."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder / "model", documents(200, seed=1))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    module = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # default weights give one class for every text
    module.save_pretrained(folder / "model")
    texts, labels = _clear_cases(module, folder / "model", documents(3 * items), items)
    labels[::10] = [(label + 1) % len(LABELS) for label in labels[::10]]
    with (folder / "test.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "mood"), *zip(texts, (LABELS[label] for label in labels), strict=True)])
    (folder / "recipe.yaml").write_text(CLASSIFIER_RECIPE, encoding="utf-8")


def write_embedder_project(folder: Path, items: int = 520) -> None:
    """Write a BERT of two layers with sentence-transformers files, scored pairs, texts and a recipe."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder / "model", documents(200, seed=1))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder / "model")
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (folder / "model" / "1_Pooling").mkdir()
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 24},
    }
    for name, content in files.items():
        (folder / "model" / name).write_text(json.dumps(content), encoding="utf-8")
    write_texts(folder / "texts.jsonl", documents(2 * items))
    _write_pairs(folder / "pairs.jsonl", items)
    (folder / "recipe.yaml").write_text(EMBEDDER_RECIPE, encoding="utf-8")


def _write_pairs(path: Path, items: int) -> None:
    """Write pairs of texts that share some of their words; the score is how many."""
    chance, rows = random.Random(2), []
    for _ in range(items):
        words = chance.choices(WORDS, k=20)
        kept = chance.randint(0, 20)
        rows.append(
            {"one": " ".join(words), "two": " ".join(words[:kept] + chance.choices(WORDS, k=20 - kept)), "gold": kept}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _clear_cases(module: Any, folder: Path, texts: Sequence[str], count: int) -> tuple[list[str], list[int]]:
    """Return the texts whose best class leads by most, and that class: rounding weights must not change it."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        rows = [module(input_ids=torch.tensor([tokenizer.encode(text).ids[:32]])).logits[0] for text in texts]
    best = [row.topk(2) for row in rows]
    leads = [float(values[0] - values[1]) for values, _ in best]
    chosen = sorted(sorted(range(len(texts)), key=lambda index: -leads[index])[:count])
    return [texts[index] for index in chosen], [int(best[index].indices[0]) for index in chosen]


def write_tokenizer(folder: Path, texts: Sequence[str]) -> int:
    """Train a byte-level tokenizer on texts, write it as a model has it, and return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<end>"], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write texts as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def altered(artifact: Path, folder: Path, noise: float = 0.0) -> Path:
    """Copy an artifact with noise on its float weights, in units of each tensor's deviation; 0 changes no answer."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    from runtime.artifact import verify, write_manifest

    manifest = verify(artifact)
    shutil.copytree(artifact, folder)
    model = onnx.load(folder / "model.onnx")
    model.doc_string = f"noise {noise}"
    numbers = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1 and noise:
            values = values + (noise * values.std() * numbers.normal(size=values.shape)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    write_manifest(folder, manifest)
    return folder
