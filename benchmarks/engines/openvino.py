"""OpenVINO: a folder of `optimum-cli export openvino`, its stateful model driven by a plain loop."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from engines.protocol import Facts, Limits, serve


class OpenVino:
    """One infer request, whose state is the cache: reset before each prompt, cut off after it before each decode."""

    def __init__(self, model: Path, limits: Limits) -> None:
        core = ov.Core()
        graph = core.read_model(model / "openvino_model.xml")
        _last_logits_only(graph)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": limits.threads}
        compiled = core.compile_model(graph, "CPU", settings)
        self._cache = str(compiled.get_property("KV_CACHE_PRECISION").get_type_name())
        self._group = compiled.get_property("KEY_CACHE_GROUP_SIZE")
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()
        self._sequences, self._length, self._first = 1, 0, 0

    def facts(self) -> Facts:
        bits = {"u8": 8, "f16": 16, "bf16": 16, "f32": 32}[self._cache]
        return Facts({"openvino": version("openvino")}, self._cache, bits, "logits of the last token alone")

    def read(self, prompt: list[int]) -> None:
        self._request.reset_state()
        self._sequences, self._length = 1, len(prompt)
        self._first = self._step(np.array([prompt]), 0)[0]

    def hold(self, sequences: int) -> bool:
        for state in self._request.query_state():
            kept = state.state.data[:1, :, : self._length]  # [B, K, T, E]
            state.state = ov.Tensor(np.repeat(kept, sequences, axis=0))
        self._sequences = sequences
        return True

    def decode(self, tokens: int) -> list[list[int]]:
        last, answers = [self._first] * self._sequences, []
        for past in range(self._length, self._length + tokens):
            last = self._step(np.array(last)[:, None], past)
            answers.append(last)
        return [list(row) for row in zip(*answers, strict=True)]

    def _step(self, tokens: np.ndarray, past: int) -> list[int]:
        rows, width = tokens.shape
        feed = {
            "input_ids": tokens.astype(np.int64),
            "attention_mask": np.ones((rows, past + width), np.int64),
            "position_ids": np.tile(np.arange(past, past + width), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self._request.infer({name: x for name, x in feed.items() if name in self._inputs}, share_inputs=True)
        return self._request.get_tensor("logits").data[:, -1].argmax(-1).tolist()


def _last_logits_only(graph: ov.Model) -> None:
    """Have the head see the last position alone, as OpenVINO's own pipeline does."""
    head = graph.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last = ops.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    head.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()


if __name__ == "__main__":
    serve(OpenVino)
