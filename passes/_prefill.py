"""The graph of prompts: the low-bit weights of a graph as 8-bit ones, made of them while the graph is loaded.

The weights lie on disk once. What makes 8 bits of them are ordinary nodes over constants, which onnxruntime computes
once, when it loads the graph: no other code is needed, and any onnxruntime can do it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import TensorProto
from onnx_ir.tape import Tape

from passes._files import atomic_write
from passes._formats import IntegerFormat, unpack
from passes._graph import DATA, GRAPH, MICROSOFT, PREFILL, initializer
from passes._match import new_constant, substitute
from passes._quantized import SMALLEST_RANGE
from passes.base import Progress

LARGEST = 127
CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
"""What DequantizeLinear calls integers of so many bits; it knows no 2, and such layers stay as they are."""
Quantized = tuple[ir.Value, ir.Value]
"""Integers uint8 [..., M] of an activation, and the range of each of its rows, float32 [..., 1]."""


def write_prefill(before: Path, after: Path, progress: Progress) -> int:
    """Write an onnx stage that has a graph of prompts beside the other; return how many products it changes.

    Nothing is written where there are none.
    """
    model = ir.load(before / GRAPH)
    nodes = list(_products(model.graph))
    seen: dict[ir.Value, Quantized] = {}
    for done, node in enumerate(nodes):
        _Product(model, node).replace(seen)
        progress(done + 1, len(nodes), "products")
    if nodes:
        for name in (DATA, GRAPH):
            shutil.copyfile(before / name, after / name)
        atomic_write(after / PREFILL, ir.to_proto(model).SerializeToString(deterministic=True))
    return len(nodes)


def _products(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the MatMulNBits over constants that see every position: not the head's, whose rows are few."""
    behind = {value for value in graph.inputs if value.name == "logits_positions"}
    for node in graph:
        if any(value in behind for value in node.inputs):
            behind.update(node.outputs)
        elif node.op_type == "MatMulNBits" and node.attributes.get_int("bits") in CODES:
            weight = node.inputs[1]
            if weight is not None and weight.const_value is not None:  # else it is made at load, of 4-bit floats
                yield node


class _Product:
    """One MatMulNBits with a weight [N, M], and the nodes that take its place."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.node, self.tape = model, node, Tape()
        keys = ("N", "K", "bits", "block_size")
        self.rows, self.features, self.bits, self.block = (node.attributes.get_int(key) for key in keys)
        self.groups = -(-self.features // self.block)
        self.x, self.codes, self.scales, self.zeros, _, self.bias = (*node.inputs, *[None] * 6)[:6]

    def replace(self, seen: dict[ir.Value, Quantized]) -> None:
        """Put an INT8 product in its place; `seen` are activations that have been quantized before."""
        assert self.x is not None
        if self.x not in seen:
            seen[self.x] = self._quantize(self.x)
        integers, ranges = seen[self.x]
        weight, scales = self._integer_weight()
        factors = [integers, weight, self._step(), scales, self._middle()]
        out = self._op("Mul", self.tape.op("MatMulIntegerToFloat", factors, domain=MICROSOFT), ranges)
        if self.bias is not None:
            out = self._op("Add", out, self.bias)
        self.model.graph.insert_before(self.node, self.tape.nodes)
        substitute(self.node.outputs[0], out)
        self.model.graph.remove(self.node, safe=True)
        for value in (self.codes, self.scales, self.zeros):
            if value is not None and not value.uses():
                del self.model.graph.initializers[str(value.name)]

    def _quantize(self, x: ir.Value) -> Quantized:
        """Round x / r to integers, r the largest magnitude of each row, as `passes._quantized.IntegerLinear` does."""
        largest = self._op("ReduceMax", self._op("Abs", x), self._integers(-1), keepdims=1)
        ranges = self._op("Max", largest, self._constant("least", np.float32(SMALLEST_RANGE)))
        return self._op("QuantizeLinear", self._op("Div", x, ranges), self._step(), self._middle()), ranges

    def _integer_weight(self) -> Quantized:
        """Return the weight int8 [M, N] and its scales float32 [N]: the largest of each output feature is 127.

        What is computed on the way, onnxruntime keeps until all is computed: so it is float16, whose rounding is a
        sixteenth of an integer's at most.
        """
        assert self.codes is not None
        scales = _added(self.model, ir.tensor(self._largest() / LARGEST, name=f"{self.codes.name}.prefill_scales"))
        steps = self._view(self.scales, ir.DataType.FLOAT, self.groups)
        ratios = self._op("Div", steps, self._op("Unsqueeze", scales, self._integers(1)))
        half = self._op("Cast", ratios, to=ir.DataType.FLOAT16)
        codes = self._view(self.codes, CODES[self.bits], self.groups * self.block)
        whole = self._op("DequantizeLinear", codes, half, self._zero_points(), axis=1, block_size=self.block)
        one, zero = self._constant("one", np.float16(1)), self._constant("zero", np.int8(0))
        integers = self._op("Transpose", self._op("QuantizeLinear", whole, one, zero), perm=[1, 0])
        if self.groups * self.block != self.features:
            integers = self._op("Slice", integers, self._integers(0), self._integers(self.features), self._integers(0))
        return integers, scales

    def _zero_points(self) -> ir.Value:
        """Return the zero points [N, G] of the blocks; those of a symmetric format are shared by products."""
        if self.zeros is None:
            middle = 1 << (self.bits - 1)
            name, codes = f"prefill.{self.rows}x{self.groups}x{middle}", np.full((self.rows, self.groups), middle)
        else:
            assert self.zeros.const_value is not None
            packed = torch.from_numpy(self.zeros.const_value.numpy().copy()).reshape(self.rows, -1)
            name, codes = f"{self.zeros.name}.prefill", unpack(packed, self.bits)[:, : self.groups].numpy()
        kind = CODES[self.bits]
        return _added(self.model, ir.Tensor(codes.astype(kind.numpy()), kind, name=name))

    def _view(self, value: ir.Value | None, kind: ir.DataType, width: int) -> ir.Value:
        """Return the bytes of a constant as numbers of another kind [N, width], on disk where they are."""
        assert value is not None and value.const_value is not None
        name, tensor, shape = f"{value.name}.prefill", value.const_value, ir.Shape((self.rows, width))
        if not isinstance(tensor, ir.ExternalTensor):
            proto = TensorProto(name=name, data_type=kind, dims=(self.rows, width), raw_data=tensor.tobytes())
            return _added(self.model, ir.from_proto(proto))
        place = (tensor.location, tensor.offset, tensor.length)
        return _added(self.model, ir.ExternalTensor(*place, kind, shape=shape, name=name, base_dir=tensor.base_dir))

    def _largest(self) -> Any:
        """Return the largest magnitude of each output feature, float32 [N]; 1 where all are zero."""
        given = {"qweight": self.codes, "scales": self.scales, "zero_points": self.zeros}
        shapes = {"qweight": (self.rows, self.groups, -1), "scales": (self.rows, -1), "zero_points": (self.rows, -1)}
        stored = {
            name: torch.from_numpy(value.const_value.numpy().copy()).reshape(shapes[name])
            for name, value in given.items()
            if value is not None and value.const_value is not None
        }
        form = IntegerFormat(self.bits, self.block, self.zeros is None)  # type: ignore[arg-type]
        largest = form.load(stored, self.features).abs().amax(1)
        return torch.where(largest == 0, 1.0, largest).numpy()

    def _op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes)

    def _step(self) -> ir.Value:
        return self._constant("step", np.float32(1 / LARGEST))

    def _middle(self) -> ir.Value:
        return self._constant("middle", np.uint8(128))

    def _integers(self, *values: int) -> ir.Value:
        return self._constant("x".join(map(str, values)), np.array(values))

    def _constant(self, name: str, value: Any) -> ir.Value:
        """Return a constant that products share."""
        return new_constant(self.model, f"prefill.{name}", np.asarray(value))


def _added(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """Return the initializer of a tensor, added unless the graph has one of its name."""
    assert tensor.name is not None
    return model.graph.initializers.setdefault(tensor.name, initializer(tensor))
