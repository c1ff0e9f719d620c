"""A scorer that answers from given arrays, items and logits to feed it, and a tokenizer of seven words."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

from optimizer.evaluate.items import Item
from passes.base import TORCH, Model


class FakeScorer:
    """Answers item i with logits[i]: [tokens, V] of a decoder, [labels] of a classifier, [width] of an embedder.

    An embedder is asked for distinct texts, in the order in which they first appear. Counts its passes.
    """

    def __init__(self, logits, kind="decoder", rows=2):
        self.answers = [np.asarray(answer, np.float32) for answer in logits]
        self.kind, self.rows, self.passes = kind, rows, 0

    def logits(self, items, phase="prefill"):
        self.passes += 1
        for index in reversed(range(len(items))):
            for first in range(items[index].first, len(self.answers[index]), self.rows):
                yield index, first, self.answers[index][first : first + self.rows]

    def classify(self, items):
        self.passes += 1
        return np.stack(self.answers)

    def embed(self, items):
        assert len({item.ids for item in items}) == len(items) == len(self.answers)
        return self.classify(items)


def documents(*ids):
    return [Item(tuple(row), str(number)) for number, row in enumerate(ids)]


def labelled(*labels):
    return [Item((5, 6), str(number), label) for number, label in enumerate(labels)]


def one_hot(answers, width):
    return [[9.0 if index == answer else 0.0 for index in range(width)] for answer in answers]


def random_logits(items, vocabulary, seed):
    numbers = np.random.default_rng(seed)
    return [numbers.normal(size=(len(item.ids), vocabulary)).astype(np.float32) for item in items]


def write_tokenizer(folder: Path, *, template: bool = False, max_length: int | None = None) -> Path:
    words = ["<s>", "</s>", "a", "b", "c", "d", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    if max_length:
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_llama(folder: Path) -> Model:
    """Write a llama of two layers for `write_tokenizer`'s seven words, with weights far from uniform answers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
    )
    module = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    return Model(TORCH, folder, folder, json.loads((folder / "config.json").read_text()))


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
