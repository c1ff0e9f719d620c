"""Who turns items into logits: one interface, whatever the stage of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.greedy import Answer, Ends, cache_bytes_per_token, decode, decoding, walks
from optimizer.evaluate.items import Item
from runtime.batching import equal_length_batches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes._skeleton import Skeleton
    from passes.base import Model
    from runtime.session import DecoderSession

SLICE_ELEMENTS = 1 << 24
"""Most logits in one slice of `RuntimeScorer.logits`: 64 MiB of float32."""
TOKENS_PER_BATCH = 4096
TOKENS_PER_WALK = 32768
"""Tokens whose hidden states wait between blocks: 256 MiB at a width of 2048."""


class Scorer(Protocol):
    """Answers items with one model.

    Attributes:
        kind: "decoder" (has `logits` and `generate`) or "classifier" (has `classify`).
    """

    @property
    def kind(self) -> str:
        """Return what the model is."""

    def logits(self, items: Sequence[Item]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Yield (item index, first position, logits [R, V] of the R positions from there on).

        Items come in any order; the positions of one item ascend, from its `first` on, and are complete. A slice is
        valid until the next one is asked for.
        """

    def classify(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Return the logits of all items [n, labels], in their order."""

    def generate(self, items: Sequence[Item], max_tokens: int, ends: Ends) -> Iterator[tuple[int, Answer]]:
        """Yield (item index, answer) to each item, decoded greedily, in any order."""


def batches(items: Sequence[Item], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield lists of item indices; the items of a list have exactly equal length, so that nothing is ever padded.

    Each item is yielded once, short ones first; a list has at most `tokens_per_batch` tokens, or a single item.
    """
    return equal_length_batches([len(item.ids) for item in items], tokens_per_batch)


class TorchScorer:
    """Scores a model at stage torch, one block of weights in memory at a time."""

    def __init__(self, model: Model, kind: str, threads: int | None = None) -> None:
        """Remember what to walk through.

        Args:
            model: at stage torch.
            kind: "decoder" or "classifier".
            threads: threads torch may use; None leaves its setting alone.
        """
        self.model, self.kind, self.threads = model, kind, threads

    def logits(self, items: Sequence[Item]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Run items of equal length together; the blocks are read once per TOKENS_PER_WALK tokens."""
        distinct, owners = _distinct(items)
        for indices, logits in self._walk(distinct, use_cache=False):
            for row, index in enumerate(indices):
                for owner in owners[index]:
                    yield owner, items[owner].first, logits[row, items[owner].first :]

    def classify(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run items of equal length together."""
        answers: dict[int, NDArray[np.float32]] = {}
        for indices, logits in self._walk(items):
            answers.update(zip(indices, logits, strict=True))
        return np.stack([answers[index] for index in range(len(items))])

    def generate(self, items: Sequence[Item], max_tokens: int, ends: Ends) -> Iterator[tuple[int, Answer]]:
        """Let prompts of equal length go on together; a token costs one reading of the blocks for all of a walk."""
        import torch

        from passes._walk import walk

        skeleton = self._skeleton()
        per_token = cache_bytes_per_token(skeleton.module.config)
        lengths = [len(item.ids) + max_tokens for item in items]
        for together in walks(list(batches(items, TOKENS_PER_BATCH)), lengths, per_token):
            ids = [torch.tensor([items[index].ids for index in batch]) for batch in together]
            for number, answers in walk(skeleton, [decoding(x, max_tokens, ends) for x in ids]):
                yield from zip(together[number], answers, strict=True)

    def _walk(self, items: Sequence[Item], **options: Any) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield item indices and their logits [B, ...] of every batch."""
        import torch

        from passes._walk import walk

        skeleton = self._skeleton()
        most = max(1, SLICE_ELEMENTS // skeleton.module.config.vocab_size)
        for indices in _walks(list(batches(items, min(TOKENS_PER_BATCH, most))), items):
            ids = [torch.tensor([items[index].ids for index in batch]) for batch in indices]
            for number, logits in walk(skeleton, [_forward(x, options) for x in ids]):
                yield indices[number], logits

    def _skeleton(self) -> Skeleton:
        import torch

        from passes._skeleton import Skeleton

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Skeleton(self.model)


class RuntimeScorer:
    """Scores with the runtime, as the model will be served: an artifact's graph, or that of a pass's output."""

    def __init__(self, graph: Path, kind: str, threads: int | None = None) -> None:
        """Remember what to open; the graph is loaded by each call and freed at its end.

        Args:
            graph: path of the .onnx file.
            kind: "decoder" or "classifier".
            threads: threads per operator; None takes the runtime's own default.
        """
        self.graph, self.kind, self.threads = graph, kind, threads

    def logits(self, items: Sequence[Item]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Run each item by itself, in chunks whose logits fit SLICE_ELEMENTS."""
        from runtime.session import DecoderSession

        session = DecoderSession(self.graph, capacity=max(len(item.ids) for item in items), threads=self.threads)
        distinct, owners = _distinct(items)
        for item, indices in zip(distinct, owners, strict=True):
            for first, rows in _in_chunks(session, item):
                yield from ((index, first, rows) for index in indices)

    def generate(self, items: Sequence[Item], max_tokens: int, ends: Ends) -> Iterator[tuple[int, Answer]]:
        """Answer one prompt after another."""
        from runtime.session import DecoderSession

        capacity = max(len(item.ids) for item in items) + max_tokens
        session = DecoderSession(self.graph, capacity=capacity, threads=self.threads)
        for index, item in enumerate(items):
            yield index, decode(session, item.ids, max_tokens, ends)

    def classify(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run items of equal length together."""
        from runtime.session import EncoderSession

        session = EncoderSession(self.graph, threads=self.threads)
        answers: dict[int, NDArray[np.float32]] = {}
        for indices in batches(items, TOKENS_PER_BATCH):
            answers.update(zip(indices, session.run([items[index].ids for index in indices]), strict=True))
        return np.stack([answers[index] for index in range(len(items))])


def _walks(groups: list[list[int]], items: Sequence[Item]) -> Iterator[list[list[int]]]:
    """Yield batches that walk together: as many as have TOKENS_PER_WALK tokens, one at least."""
    together: list[list[int]] = []
    tokens = 0
    for batch in groups:
        size = len(batch) * len(items[batch[0]].ids)
        if together and tokens + size > TOKENS_PER_WALK:
            yield together
            together, tokens = [], 0
        together.append(batch)
        tokens += size
    if together:
        yield together


def _forward(ids: torch.Tensor, options: Mapping[str, Any]) -> Callable[[PreTrainedModel], NDArray[np.float32]]:
    """Return a forward pass that ends in logits as an array: [B, T, V] or [B, labels]."""

    def forward(module: PreTrainedModel) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = module(input_ids=ids, **options).logits.numpy()
        return logits

    return forward


def _distinct(items: Sequence[Item]) -> tuple[list[Item], list[list[int]]]:
    """Return the items that differ in ids or first position, and for each the indices of all that are equal to it.

    Questions whose choices have one token each ask several things of the same logits.
    """
    owners: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, item in enumerate(items):
        owners.setdefault((item.ids, item.first), []).append(index)
    return [items[indices[0]] for indices in owners.values()], list(owners.values())


def _in_chunks(session: DecoderSession, item: Item) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (position, logits from there on), from the item's first wanted position on.

    Chunks are nearly equal: one of a single token would run as a decode step. A chunk before that position computes
    one row of logits, which is the least.
    """
    ids, most = item.ids, max(4, SLICE_ELEMENTS // session.vocabulary)
    bounds = np.linspace(0, len(ids), -(-len(ids) // most) + 1).astype(int).tolist()
    for start, end in pairwise(bounds):
        first = min(max(item.first, start), end - 1)
        rows = session.run(ids[start:end], past=start, rows=np.arange(first - start, end - start))
        if end > item.first:
            yield first, rows
