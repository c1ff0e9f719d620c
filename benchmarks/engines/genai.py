"""onnxruntime-genai: a folder made by its own builder, driven by its own generator loop."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from engines.protocol import Answer, serve


class Genai:
    """One model; a generator, and so a key/value cache, per request, as its users drive it."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        config = og.Config(str(model))
        if threads:
            session_options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._model = og.Model(config)
        self._context = context

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        length = len(prompt) + new_tokens
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, min_length=length, max_length=self._context)
        generator = og.Generator(self._model, parameters)
        start = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        end = time.perf_counter()
        return Answer(first - start, end - first, generator.get_sequence(0)[len(prompt) :].tolist())


if __name__ == "__main__":
    serve(Genai)
