"""Run a graph beside its reference and say how far apart their numbers are.

Errors are the largest absolute difference over the range (largest minus least) of the reference's numbers. int8
activations are switched off on both sides: their rounding would hide an error of the graph behind its own noise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes._graph import GRAPH

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Array = NDArray[Any]


def range_error(got: Array, want: Array) -> float:
    """Return max |got - want| over the range of `want`; infinity where shapes differ or a number is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all() or not np.isfinite(want).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(float(np.ptp(want)), 1e-30))


class GraphRunner:
    """A session on the graph of an onnx stage, with int8 activations switched off."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        exact = _exact_graph(folder)
        try:
            self.session = ort.InferenceSession(str(exact), options, providers=["CPUExecutionProvider"])
        finally:
            if exact.name != GRAPH:
                exact.unlink()
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


def _exact_graph(folder: Path) -> Path:
    """Return the stage's graph, or a copy beside it in which no MatMulNBits rounds its activations."""
    model = ir.load(folder / GRAPH)
    rounding = [n for n in model.graph if n.op_type == "MatMulNBits" and n.attributes.get_int("accuracy_level", 0) == 4]
    if not rounding:
        return folder / GRAPH
    for node in rounding:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    path = folder / f".exact.{os.getpid()}.{GRAPH}"
    ir.save(model, path)
    return path
