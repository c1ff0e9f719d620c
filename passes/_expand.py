"""Small floats as what onnxruntime's kernels on CPU read, made where the graph is loaded.

Twice an E2M1 number is an integer, so 128 and twice the number with half the scale are the same weight to MatMulNBits,
exactly: eight bits in memory, four on disk. For E4M3 there is no such integer: those weights become float32.
A graph holds the packed bytes and these few nodes, which onnxruntime folds into constants before it packs weights for
its kernels. Whatever else reads the graph finds all it needs in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from onnx import TensorProto

from passes._float_formats import E2M1, E4M3, Fp4, Mxfp4, Nvfp4

BITS = 8
_BYTES = torch.arange(256)
_TWICE = (2 * E2M1.table() + 128).to(torch.uint8)
_PAIRS = torch.stack([_TWICE[_BYTES & 15], _TWICE[_BYTES >> 4]], -1)
"""Byte -> the integers of the two numbers that it holds, [256, 2]."""
_HALF_SCALES: dict[str, torch.Tensor] = {form.name: form.scale_table() / 2 for form in (Nvfp4(), Mxfp4())}
"""Byte -> half of the scale that it stands for, [256]."""
_E4M3 = E4M3.table()


def integers(form: Fp4, stored: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the integers uint8 [N, G, B] and the scales float32 [N, G] of a weight; 128 stands for zero."""
    rows, groups, _ = stored["qweight"].shape
    weight = _looked_up(_PAIRS, stored["qweight"]).reshape(rows, groups, form.block)
    scales = _looked_up(_HALF_SCALES[form.name], stored["scales"])
    return weight, scales * stored["tensor_scale"] if "tensor_scale" in stored else scales


def floats(stored: Mapping[str, torch.Tensor], features: int) -> torch.Tensor:
    """Return the weight float32 [N, M] that E4M3 numbers and their scales stand for."""
    weight = _looked_up(_E4M3, stored["qweight"]) * stored["scales"][..., None]
    return weight.flatten(1)[:, :features]


def _looked_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    if not torch.onnx.is_in_onnx_export():
        return table[codes.int()]
    shape = (*codes.shape, *table.shape[1:])
    places = torch.onnx.ops.symbolic(
        "Cast", [codes], {"to": TensorProto.INT32}, dtype=torch.int32, shape=codes.shape, version=13
    )
    return torch.onnx.ops.symbolic("Gather", [table, places], {"axis": 0}, dtype=table.dtype, shape=shape, version=13)
