"""Our artifact on our runtime, greedy by numpy's argmax."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from engines.protocol import Facts, Limits, serve
from runtime.pace import prefill_chunks
from runtime.session import DecoderSession


class Ours:
    """One session with a slot for each sequence; prompts are read in the chunks that the engine reads them in."""

    def __init__(self, model: Path, limits: Limits) -> None:
        self._session = DecoderSession(
            model / "model.onnx", capacity=limits.context, threads=limits.threads, slots=limits.sequences
        )
        self._sequences = 1
        self._length, self._first = 0, 0

    def facts(self) -> Facts:
        return Facts({"onnxruntime": version("onnxruntime")}, "float32", 32, "-")

    def read(self, prompt: list[int]) -> None:
        self._sequences, past = 1, 0
        for tokens in prefill_chunks(len(prompt)):
            logits = self._session.run(prompt[past : past + tokens], past=past, rows=[tokens - 1])
            past += tokens
        self._length, self._first = past, int(logits[0].argmax())

    def hold(self, sequences: int) -> bool:
        for side in self._session.cache.view(0, sequences).values():
            side[self._sequences :, :, : self._length] = side[:1, :, : self._length]
        self._sequences = sequences
        return True

    def decode(self, tokens: int) -> list[list[int]]:
        last, answers = [self._first] * self._sequences, []
        for past in range(self._length, self._length + tokens):
            last = self._session.decode(last, [past] * self._sequences).argmax(-1).tolist()
            answers.append(last)
        return [list(row) for row in zip(*answers, strict=True)]


if __name__ == "__main__":
    serve(Ours)
