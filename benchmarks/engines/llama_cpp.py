"""llama.cpp through llama-cpp-python's low-level interface, greedy by numpy's argmax."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import llama_cpp as lib
import numpy as np

from engines.protocol import Facts, Limits, serve

BATCH, CHUNK = 2048, 512  # tokens that are given and computed at once: llama.cpp's defaults
FLASH = {"flash": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, "plain": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED}


class LlamaCpp:
    """One context with a stream, a cache of its own, for each sequence; cleared before each prompt.

    Its setting is the kind of attention: `flash` or `plain`.
    """

    def __init__(self, model: Path, limits: Limits) -> None:
        (attention,) = limits.settings
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = limits.context * limits.sequences
        parameters.n_seq_max = limits.sequences
        parameters.kv_unified = False
        parameters.n_batch, parameters.n_ubatch = BATCH, CHUNK
        parameters.n_threads = parameters.n_threads_batch = limits.threads
        parameters.flash_attn_type = FLASH[attention]
        self._settings = f"{attention} attention, n_batch {BATCH}, n_ubatch {CHUNK}"
        self._context = lib.llama_init_from_model(self._model, parameters)
        self._memory = lib.llama_get_memory(self._context)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(BATCH, 0, 1)
        self._sequences, self._length, self._first = 1, 0, 0

    def facts(self) -> Facts:
        features = lib.llama_print_system_info().decode()
        libraries = {"llama-cpp-python": version("llama-cpp-python"), "llama.cpp built with": features.strip()}
        return Facts(libraries, "float16", 16, self._settings)

    def read(self, prompt: list[int]) -> None:
        lib.llama_memory_clear(self._memory, True)
        for start in range(0, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            self._run([(token, start + i, 0) for i, token in enumerate(part)], wanted=1)
        self._sequences, self._length, self._first = 1, len(prompt), self._best(1)[0]

    def hold(self, sequences: int) -> bool:
        for sequence in range(self._sequences, sequences):
            lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        for sequence in range(sequences):
            lib.llama_memory_seq_rm(self._memory, sequence, self._length, -1)
        self._sequences = sequences
        return True

    def decode(self, tokens: int) -> list[list[int]]:
        last, answers = [self._first] * self._sequences, []
        for position in range(self._length, self._length + tokens):
            self._run([(token, position, row) for row, token in enumerate(last)], wanted=self._sequences)
            last = self._best(self._sequences)
            answers.append(last)
        return [list(row) for row in zip(*answers, strict=True)]

    def _run(self, entries: Sequence[tuple[int, int, int]], wanted: int) -> None:
        """Run (token, position, sequence); logits of the last `wanted` of them."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = int(i >= len(entries) - wanted)
        code = lib.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode: failed with code {code} at position {entries[0][1]}")

    def _best(self, rows: int) -> list[int]:
        logits = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(rows, self._vocabulary)).argmax(-1).tolist()


if __name__ == "__main__":
    serve(LlamaCpp)
