"""Linear layers alone: which a pass made, and their graphs."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from tiny_models import MIXED, TABLES_IN_INT8, Workshop, op_counts

from passes._formats import ChannelFormat, IntegerFormat
from passes._layers import Linear, quantized_linears, write_linears
from passes._quantized import LayerSpec
from passes.base import ONNX, Model
from passes.quantize_rtn import QuantizeRtn

INT4 = LayerSpec(IntegerFormat(4, 32), "int8")


def test_shape_that_most_weights_are_in_stands_for_a_kind_of_layer(workshop: Workshop) -> None:
    before = workshop.model("llama")
    (told,) = workshop.estimate("llama", QuantizeRtn())
    up = Linear(96, 64, INT4)  # and gate, twice each; q and o have less
    assert quantized_linears(before, told.model) == [up]
    (told,) = workshop.estimate("llama", TABLES_IN_INT8)
    head = Linear(256, 64, LayerSpec(IntegerFormat(8, 32), "int8"))  # not the embedding it is tied to
    assert quantized_linears(before, told.model) == [up, head]


def test_layers_that_were_quantized_before_are_not_of_this_pass(workshop: Workshop) -> None:
    (told,) = workshop.estimate("llama", MIXED)
    assert quantized_linears(told.model, told.model) == []


def test_each_layer_becomes_the_graph_that_lowering_makes_of_it(tmp_path: Path) -> None:
    specs = {
        None: {"MatMul": 1},
        INT4: {"MatMulNBits": 1},
        LayerSpec(IntegerFormat(2, 32, symmetric=False), "float"): {"MatMulNBits": 1},
        LayerSpec(ChannelFormat(), "row"): {
            **dict.fromkeys(("Abs", "ReduceMax", "Clip", "Div", "Mul"), 1),
            **dict.fromkeys(("QuantizeLinear", "MatMulIntegerToFloat"), 1),
        },
        LayerSpec(ChannelFormat(), "static"): dict.fromkeys(("QuantizeLinear", "MatMulIntegerToFloat"), 1),
    }
    folders = write_linears([Linear(48, 64, spec) for spec in specs], tmp_path)
    for folder, wanted in zip(folders, specs.values(), strict=True):
        assert op_counts(Model(ONNX, folder, folder, {})) == wanted
        session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        (x,) = session.get_inputs()
        for rows in (1, 7):
            (y,) = session.run(None, {x.name: np.ones((1, rows, 64), np.float32)})
            assert y.shape == (1, rows, 48)
            assert np.isfinite(y).all()
            assert np.ptp(y) > 0
