"""onnxruntime's matmul_nbits quantizer: round to nearest, and HQQ; what MatMulNBits makes of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from quantizers.protocol import Job, Made, Stopwatch, Unfit, block_linears, serve


def graph_of(weights: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
    """Return a graph of products that have nothing to do with each other, one for each weight [N, M]."""
    nodes, inputs, outputs, values = [], [], [], []
    for name, weight in weights.items():
        rows, features = weight.shape
        values.append(numpy_helper.from_array(weight.t().contiguous().numpy(), f"{name}.weight"))
        nodes.append(helper.make_node("MatMul", [f"{name}.x", f"{name}.weight"], [f"{name}.y"], name=name))
        inputs.append(helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, ["T", features]))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["T", rows]))
    graph = helper.make_graph(nodes, "linears", inputs, outputs, values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def quantize(job: Job) -> Made:
    """Quantize all linear layers of the blocks; the head is none of them."""
    if not job.format.startswith("int"):
        raise Unfit(f"no {job.format}")
    watch = Stopwatch()
    model = job.load()
    layers = {name: layer.weight.detach() for name, layer in block_linears(model).items()}
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    if job.method == "hqq":
        if job.symmetric:
            raise Unfit("its HQQ has zero points")
        config = HQQWeightOnlyQuantConfig(block_size=job.group, bits=job.bits)
    elif job.method == "rtn":
        config = DefaultWeightOnlyQuantConfig(block_size=job.group, is_symmetric=job.symmetric, bits=job.bits)
    else:
        raise Unfit(f"no method {job.method}")
    quantizer = MatMulNBitsQuantizer(graph_of(layers), algo_config=config)
    quantizer.process()
    spent = watch.spent()
    made = quantizer.model.model
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(made.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    units = {f"{name}.x": np.eye(layer.shape[1], dtype=np.float32) for name, layer in layers.items()}
    answers = session.run([f"{name}.y" for name in layers], units)
    weights |= {f"{name}.weight": torch.from_numpy(y.T.copy()) for name, y in zip(layers, answers, strict=True)}
    stored = {each.name: numpy_helper.to_array(each).nbytes for each in made.graph.initializer}
    return Made(weights, stored, spent, {"operators": ", ".join(sorted({node.op_type for node in made.graph.node}))})


if __name__ == "__main__":
    serve(quantize, ("onnxruntime", "onnx", "torch"))
