"""OpenVINO: a folder of `optimum-cli export openvino`, its stateful model driven by a plain loop."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino as ov

from engines.protocol import Answer, serve


class OpenVino:
    """One infer request; its state, the key/value cache, is reset before each prompt."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        core = ov.Core()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = core.compile_model(core.read_model(model / "openvino_model.xml"), "CPU", settings)
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()

    def versions(self) -> dict[str, str]:
        return {"openvino": version("openvino")}

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        self._request.reset_state()
        start = time.perf_counter()
        tokens = [self._step(prompt, 0)]
        first = time.perf_counter()
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            tokens.append(self._step(tokens[-1:], position))
        end = time.perf_counter()
        return Answer(first - start, end - first, tokens)

    def _step(self, tokens: list[int], position: int) -> int:
        end = position + len(tokens)
        feed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(position, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: x for name, x in feed.items() if name in self._inputs}, share_inputs=True)
        return int(self._request.get_tensor("logits").data[0, -1].argmax())


if __name__ == "__main__":
    serve(OpenVino)
