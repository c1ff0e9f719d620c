"""Ask a graph and its reference the same, and say how far apart their numbers are.

Errors are the largest absolute difference over the range (largest minus least) of the reference's numbers. int8
activations are switched off on both sides: their rounding would hide an error of the graph behind its own noise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from passes._graph import GRAPH
from passes._kind import kind_of
from passes._quantized import QuantizedLinear
from passes._walk import walk
from passes.base import Context, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._skeleton import Skeleton

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Array = NDArray[Any]
SPLITS = (9, 5, 1, 1, 4, 1)
"""Prefill, chunk, decode, decode, chunk, decode."""


def range_error(got: Array, want: Array) -> float:
    """Return max |got - want| over the range of `want`; infinity where shapes differ or a number is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all() or not np.isfinite(want).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(float(np.ptp(want)), 1e-30))


@dataclass(frozen=True)
class Probe:
    """Random inputs, and how a graph and a torch module answer them.

    Attributes:
        ids: a decoder's one sequence; empty for an encoder.
        splits: lengths of the steps in which a graph runs that sequence; torch runs it in one pass.
        feed: an encoder's right-padded batch; empty for a decoder.
    """

    ids: tuple[int, ...]
    splits: tuple[int, ...]
    feed: Mapping[str, Array]

    @classmethod
    def random(cls, config: Mapping[str, Any], seed: int, splits: tuple[int, ...] = SPLITS) -> Probe:
        """Draw inputs for a model of this `config.json`; id 0, often padding, is left out."""
        rng = np.random.default_rng(seed)
        vocabulary = int(config["vocab_size"])
        if kind_of(config) == "decoder":
            return cls(tuple(rng.integers(1, vocabulary, sum(splits)).tolist()), splits, {})
        lengths, width = np.array([11, 7, 1]), 11
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        types = ((np.arange(width) >= lengths[:, None] // 2) & (mask == 1)).astype(np.int64)
        ids = rng.integers(1, vocabulary, mask.shape)
        return cls((), (), {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})

    def graph(self, folder: Path, threads: int) -> Array:
        """Return the answer of the graph of an onnx stage."""
        runner = GraphRunner(folder, threads)
        return runner.decode(self.ids, self.splits) if self.ids else self._real_tokens(runner.encode(self.feed))

    def torch(self, module: PreTrainedModel) -> Array:
        """Return the answer of a torch module."""
        for child in module.modules():
            if isinstance(child, QuantizedLinear):
                child.exact_activations = True
        if self.ids:
            logits: Array = module(input_ids=torch.tensor([self.ids]), use_cache=False).logits[0].numpy()
            return logits
        tensors = {name: torch.tensor(value) for name, value in self.feed.items()}
        if getattr(module.config, "type_vocab_size", 0) < 2:
            tensors.pop("token_type_ids")
        out = module(**tensors)
        return self._real_tokens((out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy())

    def walked(self, skeleton: Skeleton) -> Array:
        """Return the answer of a torch stage, one block of its weights in memory at a time."""
        return next(walk(skeleton, [self.torch]))[1]

    def _real_tokens(self, out: Array) -> Array:
        """Return the numbers of real tokens alone: what stands at padding means nothing."""
        return out if out.ndim == 2 else out[self.feed["attention_mask"].astype(bool)]


def graph_error(before: Model, after: Model, ctx: Context) -> float:
    """Return the error of one onnx stage against another."""
    probe = Probe.random(before.config, ctx.seed)
    want = probe.graph(before.folder, ctx.threads)
    return range_error(probe.graph(after.folder, ctx.threads), want)


class GraphRunner:
    """A session on the graph of an onnx stage, with int8 activations switched off."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self.session = ort.InferenceSession(_exact_graph(folder), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}

    def decode(self, ids: Sequence[int], splits: Sequence[int]) -> Array:
        """Return the logits [T, V] of all positions of one sequence, run in steps of the given lengths."""
        past = {
            name: np.zeros((1, value.shape[1], len(ids), value.shape[3]), np.float32)
            for name, value in self.inputs.items()
            if name.startswith("past.")
        }
        out, start = [], 0
        for length in splits:
            end = start + length
            feed = {
                "input_ids": np.array([ids[start:end]], np.int64),
                "seqlens_k": np.array([end - 1], np.int32),
                "total_sequence_length": np.array([end], np.int32),
                "logits_positions": np.arange(length, dtype=np.int64),
                **past,
            }
            logits, *present = self.session.run(None, {k: v for k, v in feed.items() if k in self.inputs})
            past = dict(zip(past, present, strict=True))
            out.append(logits)
            start = end
        return np.concatenate(out)

    def encode(self, feed: Mapping[str, Array]) -> Array:
        """Return the first output for named inputs; those the graph lacks are left out."""
        result: Array = self.session.run(None, {k: v for k, v in feed.items() if k in self.inputs})[0]
        return result


def _exact_graph(folder: Path) -> bytes:
    """Return the stage's graph, such that no MatMulNBits rounds its activations."""
    model = ir.load(folder / GRAPH)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph
