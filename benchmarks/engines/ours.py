"""Our artifact on our runtime, greedy by numpy's argmax."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

from engines.protocol import Answer, serve
from runtime.session import DecoderSession


class Ours:
    """One session; a new prompt starts over in the same cache."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        self._session = DecoderSession(model / "model.onnx", capacity=context, threads=threads)

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": version("onnxruntime")}

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        start = time.perf_counter()
        logits = self._session.run(prompt, past=0, rows=[len(prompt) - 1])
        tokens = [int(logits[0].argmax())]
        first = time.perf_counter()
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            tokens.append(int(self._session.step(tokens[-1], position).argmax()))
        end = time.perf_counter()
        return Answer(first - start, end - first, tokens)


if __name__ == "__main__":
    serve(Ours)
