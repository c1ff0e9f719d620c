"""llama.cpp through llama-cpp-python's low-level interface, greedy by numpy's argmax."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import llama_cpp as lib
import numpy as np

from engines.protocol import Answer, serve


class LlamaCpp:
    """One context, cleared before each request."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, parameters)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(context, 0, 1)

    def versions(self) -> dict[str, str]:
        features = lib.llama_print_system_info().decode()
        return {"llama-cpp-python": version("llama-cpp-python"), "llama.cpp built with": features.strip()}

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        start = time.perf_counter()
        tokens = [self._step(prompt, 0)]
        first = time.perf_counter()
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            tokens.append(self._step(tokens[-1:], position))
        end = time.perf_counter()
        return Answer(first - start, end - first, tokens)

    def _step(self, tokens: list[int], position: int) -> int:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(i == len(tokens) - 1)
        code = lib.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode: failed with code {code} at position {position}")
        return int(np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(self._vocabulary,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
