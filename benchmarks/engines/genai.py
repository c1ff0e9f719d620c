"""onnxruntime-genai: a folder made by its own builder, driven by its own generator loop."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from engines.protocol import Facts, Limits, serve

READ_AGAIN_TOKENS = 256  # so long a prompt at most; after a longer one the few tokens that were added matter less
READ_OFTEN_TOKENS = 2048  # a batch of a longer prompt takes minutes to read


class Genai:
    """One model; a generator, and so a cache, per request, as its users drive it.

    It cannot copy a sequence: the prompt is read again, so many times in one batch. Nor can a batch go back: a short
    prompt is read once more, after a long one the batch goes on.
    """

    def __init__(self, model: Path, limits: Limits) -> None:
        self._model = open_model(model, limits.threads)
        self._context = limits.context
        self._generator: og.Generator | None = None
        self._prompt: list[int] = []
        self._sequences = 0

    def facts(self) -> Facts:
        libraries = {"onnxruntime-genai": version("onnxruntime-genai"), "genai's onnxruntime": version("onnxruntime")}
        return Facts(libraries, "float32", 32, "-")

    def read(self, prompt: list[int]) -> None:
        self._prompt = prompt
        self._read(1)

    def hold(self, sequences: int) -> bool:
        if sequences > 1 and len(self._prompt) > READ_OFTEN_TOKENS:
            return False
        if sequences != self._sequences or (sequences > 1 and len(self._prompt) <= READ_AGAIN_TOKENS):
            self._read(sequences)
        elif sequences == 1:
            self._generator.rewind_to(len(self._prompt) - 1)
            self._append(self._prompt[-1:])
        return True

    def decode(self, tokens: int) -> list[list[int]]:
        for _ in range(tokens):
            self._generator.generate_next_token()
        return [self._generator.get_sequence(row)[-tokens:].tolist() for row in range(self._sequences)]

    def _read(self, sequences: int) -> None:
        self._generator = None  # gives its cache back before the next one takes its own
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            do_sample=False, min_length=self._context, max_length=self._context, batch_size=sequences
        )
        self._generator = og.Generator(self._model, parameters)
        self._sequences = sequences
        self._append(self._prompt)

    def _append(self, tokens: list[int]) -> None:
        self._generator.append_tokens(np.array([tokens] * self._sequences, np.int32))
        self._generator.generate_next_token()


def open_model(folder: Path, threads: int) -> og.Model:
    """Load a model with so many threads: by itself genai 0.18 takes one of two cores."""
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return og.Model(config)


if __name__ == "__main__":
    serve(Genai)
