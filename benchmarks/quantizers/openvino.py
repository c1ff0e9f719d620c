"""OpenVINO's int4 as nncf compresses it: round to nearest, with scale estimation, GPTQ. Its AWQ changes activations."""

from __future__ import annotations

import tempfile
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

from quantizers.protocol import Job, Made, Stopwatch, Unfit, block_linears, serve

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "scale estimation": {"scale_estimation": True},
    "gptq": {"gptq": True},
}


def mode_of(job: Job) -> Any:
    """Return nncf's name of the format."""
    if job.format == "int4":
        return nncf.CompressWeightsMode.INT4_SYM if job.symmetric else nncf.CompressWeightsMode.INT4_ASYM
    found = getattr(nncf.CompressWeightsMode, job.format.upper(), None)
    if found is None:
        raise Unfit(f"nncf has no {job.format}")
    return found


def quantize(job: Job) -> Made:
    """Convert, compress all layers of the blocks, compute what each product's weight is worth."""
    if job.method not in METHODS or job.kind != "decoder":
        raise Unfit(f"no {job.method} for a {job.kind}")
    watch = Stopwatch()
    mode, model = mode_of(job), job.load()
    texts = [np.array([ids]) for ids in job.texts()]
    with tempfile.TemporaryDirectory() as folder:
        main_export(job.source, folder, task="text-generation", ov_config=OVConfig(dtype="fp32"))
        graph = ov.Core().read_model(f"{folder}/openvino_model.xml", config={"ENABLE_MMAP": False})
    given = {} if job.method == "rtn" else {"dataset": nncf.Dataset([fed(graph, ids) for ids in texts])}
    settings = METHODS[job.method]
    small = nncf.compress_weights(
        graph,
        mode=mode,
        ratio=1.0,
        group_size=job.group,
        all_layers=False,
        ignored_scope=nncf.IgnoredScope(patterns=[".*lm_head.*", ".*embed_tokens.*"]),
        subset_size=len(texts),
        **settings,
        **given,
    )
    spent = watch.spent()
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    stored: dict[str, int] = {}
    layers = block_linears(model)
    for node in small.get_ops():
        layer = node.get_friendly_name().removeprefix("__module.").split("/")[0]
        if node.get_type_name() == "MatMul" and layer in layers:
            weights[f"{layer}.weight"] = computed(node.input_value(1))
            stored[f"{layer}.weight"] = constants(node.input_value(1).get_node())
    if stored.keys() != {f"{layer}.weight" for layer in layers}:
        raise Unfit(f"found {len(stored)} of {len(layers)} products in the graph")
    return Made(weights, stored, spent, {"mode": str(mode), **settings})


def fed(graph: ov.Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return what an exported decoder reads of one text."""
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return {value.any_name: known[value.any_name] for value in graph.inputs}


def computed(output: Any) -> torch.Tensor:
    """Return the float32 that a constant subgraph stands for."""
    result = ov.opset13.convert(output, "f32")
    compiled = ov.compile_model(ov.Model([result], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([])[0].copy())


def constants(node: Any) -> int:
    """Return the bytes of the constants below a node."""
    if node.get_type_name() == "Constant":
        return int(node.get_byte_size())
    return sum(constants(value.get_node()) for value in node.input_values())


if __name__ == "__main__":
    serve(quantize, ("openvino", "nncf", "torch", "transformers"))
