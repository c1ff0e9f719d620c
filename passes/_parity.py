"""Ask a graph and its reference the same, and say how far apart their numbers are.

Errors are the largest absolute difference over the range (largest minus least) of the reference's numbers. int8
activations are switched off on both sides: their rounding would hide an error of the graph behind its own noise.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from passes._exact import exact_graph
from passes._graph import GRAPH
from passes._kind import first_line, kind_of, vocabulary_size
from passes._kv_cache import Int8Cache
from passes._pooling import Pooling, encode, has_token_types, pooling_of
from passes._quantized import IntegerLinear, QuantizedLinear
from passes._walk import walk
from passes.base import Context, Model, PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._skeleton import Skeleton

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import onnxruntime as ort

Array = NDArray[Any]
SPLITS = (9, 5, 1, 1, 4, 1)
"""Prefill, chunk, decode, decode, chunk, decode."""
PART_BYTES = 1 << 27
"""Weights of a graph that a check has in memory at once; a single larger tensor still fits."""


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
        ragged: lengths of beginnings of that sequence that a graph runs as one right-padded batch, and then one token
            further, which shows a row that reads another row's positions, mask or cache.
        feed: an encoder's right-padded batch; empty for a decoder.
        rounds_cache: keep keys and values in int8 where the model does; else in float32 on both sides.
    """

    ids: tuple[int, ...]
    splits: tuple[int, ...]
    ragged: tuple[int, ...]
    feed: Mapping[str, Array]
    rounds_cache: bool = False

    @classmethod
    def random(cls, config: Mapping[str, Any], seed: int, splits: tuple[int, ...] = SPLITS) -> Probe:
        """Draw inputs for a model of this `config.json`; id 0, often padding, is left out."""
        rng = np.random.default_rng(seed)
        vocabulary = vocabulary_size(config)
        if kind_of(config) == "decoder":
            total = sum(splits)
            return cls(tuple(rng.integers(1, vocabulary, total).tolist()), splits, (total // 4, total - 1), {})
        lengths, width = np.array([23, 7, 1]), 23
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        types = ((np.arange(width) >= lengths[:, None] // 2) & (mask == 1)).astype(np.int64)
        ids = rng.integers(1, vocabulary, mask.shape)
        return cls((), (), (), {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})

    def graph(self, folder: Path, threads: int, name: str = GRAPH) -> Array:
        """Return the answer of a graph of an onnx stage."""
        runner = GraphRunner(folder, threads, name, rounds_cache=self.rounds_cache)
        if not self.ids:
            return self._real_tokens(runner.encode(self.feed))
        alone = runner.decode(self.ids, self.splits)
        return np.concatenate([alone, runner.decode_batch(self.ids, self.ragged)]) if runner.takes_batches else alone

    def error(self, got: Array, want: Array) -> float:
        """Return the error of a graph's answer over the range of torch's.

        A graph that takes one row at a time answers for that row alone.
        """
        return range_error(got, want[: len(self.ids)] if len(got) == len(self.ids) > 0 else want)

    def torch(self, module: PreTrainedModel, pooling: Pooling | None = None) -> Array:
        """Return the answer of a torch module, an embedder's pooled as `pooling` says."""
        for child in module.modules():
            if isinstance(child, QuantizedLinear | IntegerLinear):
                child.exact_activations = True
            if isinstance(child, Int8Cache):
                child.exact = not self.rounds_cache
        if self.ids:
            logits: Array = module(input_ids=torch.tensor([self.ids]), use_cache=False).logits[0].numpy()
            return logits[self._asked()]
        tensors = {name: torch.tensor(value) for name, value in self.feed.items()}
        if not has_token_types(module):
            tensors.pop("token_type_ids")
        return self._real_tokens(encode(module, tensors, pooling).numpy())

    def walked(self, skeleton: Skeleton) -> Array:
        """Return the answer of a torch stage, one block of its weights in memory at a time."""
        pooling = pooling_of(skeleton.assets, skeleton.config)
        return next(walk(skeleton, [lambda module: self.torch(module, pooling)]))[1]

    def _asked(self) -> list[int]:
        """Return the positions whose logits `graph` gives, in its order."""
        beginnings = [position for length in self.ragged for position in range(length)]
        return [*range(len(self.ids)), *beginnings, *self.ragged]

    def _real_tokens(self, out: Array) -> Array:
        """Return the numbers of real tokens alone: what stands at padding means nothing."""
        return out if out.ndim == 2 else out[self.feed["attention_mask"].astype(bool)]


def graph_error(before: Model, after: Model, ctx: Context) -> float:
    """Return the error of one onnx stage against another."""
    probe = Probe.random(before.config, ctx.seed)
    want = probe.graph(before.folder, ctx.threads)
    return range_error(probe.graph(after.folder, ctx.threads), want)


class GraphRunner:
    """Runs the graph of an onnx stage part by part, one part's weights in memory, int8 activations switched off."""

    def __init__(self, folder: Path, threads: int, name: str = GRAPH, *, rounds_cache: bool = False) -> None:
        self.folder, self.threads = folder, threads
        self.graph = exact_graph(folder, name, rounds_cache=rounds_cache)
        self.inputs = {value.name: value for value in self.graph.graph.input}
        rows = self.graph.graph.input[0].type.tensor_type.shape.dim[0]
        self.takes_batches = not rows.HasField("dim_value")

    def decode(self, ids: Sequence[int], splits: Sequence[int]) -> Array:
        """Return the logits [T, V] of all positions of one sequence, run in steps of the given lengths."""
        feeds: list[dict[str, Array]] = []
        start = 0
        for length in splits:
            end = start + length
            feeds.append(_step([ids[start:end]], [end], range(length)))
            start = end
        return np.concatenate(self._run(feeds, self._empty_past(1, len(ids))))

    def decode_batch(self, ids: Sequence[int], lengths: Sequence[int]) -> Array:
        """Return the logits of beginnings of `ids`, run as one batch, and of one more token of each, run as one step.

        Rows are those of the first beginning, of the second, ..., then one for each of the tokens that follow.
        """
        width = max(lengths)
        rows = [[*ids[:length], *[0] * (width - length)] for length in lengths]
        real = [row * width + position for row, length in enumerate(lengths) for position in range(length)]
        following = [[ids[length]] for length in lengths]
        steps = [
            _step(rows, lengths, real),
            _step(following, [length + 1 for length in lengths], range(len(lengths))),
        ]
        return np.concatenate(self._run(steps, self._empty_past(len(lengths), width + 1)))

    def _empty_past(self, rows: int, capacity: int) -> dict[str, Array]:
        past = {}
        for name, value in self.inputs.items():
            if name.startswith("past."):
                kind = value.type.tensor_type
                heads, width = (kind.shape.dim[axis].dim_value for axis in (1, 3))
                dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
                past[name] = np.zeros((rows, heads, capacity, width), dtype)
        return past

    def encode(self, feed: Mapping[str, Array]) -> Array:
        """Return the first output for named inputs; those the graph lacks are left out."""
        return self._run([dict(feed)], {})[0]

    def _run(self, steps: list[dict[str, Array]], past: dict[str, Array]) -> list[Array]:
        """Return the first output of every step; a step's past is the present of the step before.

        All steps go through one part of the graph before the next part is loaded: what a layer remembers, only that
        layer needs.
        """
        parts = _parts(self.graph)
        for number, nodes in enumerate(parts):
            later = {name for part in parts[number + 1 :] for node in part for name in node.input}
            kept = later | {value.name for value in self.graph.graph.output}
            part = _Part(self.graph, nodes, kept)
            session = part.session({**steps[0], **past}, self.folder, self.threads)
            for step in steps:
                feed = {name: step[name] if name in step else past[name] for name in part.inputs}
                out = dict(zip(part.outputs, _answers(session, part.outputs, feed), strict=True))
                past |= {name.replace("present.", "past."): out.pop(name) for name in list(out) if "present." in name}
                step |= out
                for name in step.keys() - kept:
                    del step[name]
            past = {name: value for name, value in past.items() if name in later}
        return [step[self.graph.graph.output[0].name] for step in steps]


def _answers(session: ort.InferenceSession, outputs: list[str], feed: Mapping[str, Array]) -> list[Array]:
    try:
        return list(session.run(outputs, feed))
    except Exception as error:  # onnxruntime's own classes share no base but Exception
        raise PassError(f"onnxruntime cannot run the graph: {first_line(error)}") from error


def _step(ids: Sequence[Sequence[int]], ends: Sequence[int], rows: Iterable[int]) -> dict[str, Array]:
    """Return the inputs of one run: ids [B, T], each row's length after it, flat positions whose logits are wanted."""
    return {
        "input_ids": np.array(ids, np.int64),
        "seqlens_k": np.array(ends, np.int32) - 1,
        "total_sequence_length": np.array([max(ends)], np.int32),
        "logits_positions": np.fromiter(rows, np.int64),
    }


class _Part:
    """Some consecutive nodes of a graph, as a graph of their own."""

    def __init__(self, model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], kept: Container[str]) -> None:
        self.model, self.nodes = model, nodes
        made = {name for node in nodes for name in node.output if name}
        used = dict.fromkeys(name for node in nodes for name in node.input if name)
        self.weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
        constants = {tensor.name for tensor in self.weights}
        self.inputs = [name for name in used if name not in made and name not in constants]
        self.outputs = [name for node in nodes for name in node.output if name in kept]

    def session(self, examples: Mapping[str, Array], folder: Path, threads: int) -> ort.InferenceSession:
        """Load it; the types of its inputs are those of `examples`."""
        from onnx import helper

        given = [(name, helper.np_dtype_to_tensor_dtype(examples[name].dtype)) for name in self.inputs]
        inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in given]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "part", inputs, outputs, self.weights)
        part = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            return ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes share no base but Exception
            raise PassError(f"onnxruntime refuses the graph: {first_line(error)}") from error


def _parts(model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """Cut the graph where its weights pass PART_BYTES."""
    sizes = {
        tensor.name: int(next((entry.value for entry in tensor.external_data if entry.key == "length"), "0"))
        for tensor in model.graph.initializer
    }
    parts: list[list[onnx.NodeProto]] = [[]]
    held = 0
    for node in model.graph.node:
        weight = sum(sizes.get(name, 0) for name in node.input)
        if held and held + weight > PART_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(node)
        held += weight
    return parts
