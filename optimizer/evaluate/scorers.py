"""Who turns items into logits: one interface, whatever the stage of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.greedy import Answer, Ends, cache_bytes_per_token, decode, decoding, walks
from optimizer.evaluate.items import Item
from passes._batches import walk_groups
from runtime.batching import equal_length_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimizer.evaluate.task import Phase
    from passes._pooling import Pooling
    from passes._skeleton import Skeleton
    from passes.base import Model
    from runtime.session import DecoderSession

    Forward = Callable[[PreTrainedModel], NDArray[np.float32]]

SLICE_ELEMENTS = 1 << 24
"""Most logits in one slice of `RuntimeScorer.logits`: 64 MiB of float32."""
TOKENS_PER_BATCH = 4096


class Scorer(Protocol):
    """Answers items with one model.

    Attributes:
        kind: "decoder" (has `logits` and `generate`), "classifier" or "reranker" (have `classify`), or "embedder" (has
            `embed`).
    """

    @property
    def kind(self) -> str:
        """Return what the model is."""

    def logits(self, items: Sequence[Item], phase: Phase = "prefill") -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Yield (item index, first position, logits [R, V] of the R positions from there on).

        Items come in any order; the positions of one item ascend, from its `first` on, and are complete. A slice is
        valid until the next one is asked for. In phase "decode" every token is run by itself, as generated ones are.
        """

    def classify(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Return the logits of all items [n, labels], in their order."""

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Return the vectors of all items [n, width], in their order."""

    def generate(self, items: Sequence[Item], max_tokens: int, ends: Ends) -> Iterator[tuple[int, Answer]]:
        """Yield (item index, answer) to each item, decoded greedily, in any order."""


def batches(items: Sequence[Item], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield lists of item indices; the items of a list have exactly equal length, so that nothing is ever padded.

    Each item is yielded once, short ones first; a list has at most `tokens_per_batch` tokens, or a single item.
    """
    return equal_length_batches([len(item.ids) for item in items], tokens_per_batch)


class TorchScorer:
    """Scores a model at stage torch, one block of weights in memory at a time."""

    def __init__(
        self, model: Model, kind: str, threads: int | None = None, tokens_per_batch: int = TOKENS_PER_BATCH
    ) -> None:
        """Remember what to walk through.

        Args:
            model: at stage torch.
            kind: as in `Scorer`.
            threads: threads torch may use; None leaves its setting alone.
            tokens_per_batch: most tokens that run together; 1 runs each item by itself.
        """
        self.model, self.kind, self.threads, self.tokens_per_batch = model, kind, threads, tokens_per_batch

    def logits(self, items: Sequence[Item], phase: Phase = "prefill") -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Run items of equal length together, whatever the phase: to torch both are one function, but for rounding.

        The blocks are read once per TOKENS_PER_WALK tokens.
        """
        distinct, owners = _distinct(items)
        for indices, logits in self._walk(distinct):
            for row, index in enumerate(indices):
                for owner in owners[index]:
                    yield owner, items[owner].first, logits[row, items[owner].first :]

    def classify(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run items of equal length together."""
        return _in_order(len(items), self._walk(items))

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run items of equal length together, and pool as the graph will."""
        return _in_order(len(items), self._walk(items))

    def generate(self, items: Sequence[Item], max_tokens: int, ends: Ends) -> Iterator[tuple[int, Answer]]:
        """Let prompts of equal length go on together; a token costs one reading of the blocks for all of a walk."""
        import torch

        from passes._walk import walk

        skeleton = self._skeleton()
        per_token = cache_bytes_per_token(skeleton.module.config)
        lengths = [len(item.ids) + max_tokens for item in items]
        for together in walks(list(batches(items, self.tokens_per_batch)), lengths, per_token):
            ids = [torch.tensor([items[index].ids for index in batch]) for batch in together]
            for number, answers in walk(skeleton, [decoding(x, max_tokens, ends) for x in ids]):
                yield from zip(together[number], answers, strict=True)

    def _walk(self, items: Sequence[Item]) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield item indices and the answers [B, ...] of every batch."""
        from passes._walk import walk

        skeleton = self._skeleton()
        most = min(self.tokens_per_batch, tokens_at_once(skeleton.module.config.vocab_size))
        for indices in walk_groups(batches(items, most), [len(item.ids) for item in items]):
            together = [[items[index] for index in batch] for batch in indices]
            for number, logits in walk(skeleton, [answering(batch, self.model, self.kind) for batch in together]):
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
            kind: as in `Scorer`.
            threads: threads per operator; None takes the runtime's own default.
        """
        self.graph, self.kind, self.threads = graph, kind, threads

    def logits(self, items: Sequence[Item], phase: Phase = "prefill") -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Run each item by itself, in chunks whose logits fit SLICE_ELEMENTS, or token by token."""
        from runtime.session import DecoderSession

        run = _in_chunks if phase == "prefill" else _token_by_token
        session = DecoderSession(self.graph, capacity=max(len(item.ids) for item in items), threads=self.threads)
        distinct, owners = _distinct(items)
        for item, indices in zip(distinct, owners, strict=True):
            for first, rows in run(session, item):
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
        return _in_order(len(items), self._encode(items))

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run items of equal length together."""
        return _in_order(len(items), self._encode(items))

    def _encode(self, items: Sequence[Item]) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        from runtime.session import EncoderSession

        session = EncoderSession(self.graph, threads=self.threads)
        for indices in batches(items, TOKENS_PER_BATCH):
            together = [items[index] for index in indices]
            yield indices, session.run([item.ids for item in together], [item.types for item in together])


def tokens_at_once(vocabulary: int) -> int:
    """Return how many tokens may run together for the sake of their logits."""
    return min(TOKENS_PER_BATCH, max(1, SLICE_ELEMENTS // vocabulary))


def answering(items: Sequence[Item], model: Model, kind: str) -> Forward:
    """Return a forward pass of items of equal length.

    It ends in logits [B, T, V] of a decoder, [B, labels] of a classifier or reranker, or an embedder's vectors [B, D].
    """
    from passes._pooling import pooling_of

    if kind == "decoder":
        return _decode(items)
    return _encode(items, pooling_of(model.assets, model.config) if kind == "embedder" else None)


def _in_order(count: int, answers: Iterable[tuple[Sequence[int], NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Return the answers of `count` items that came in batches, in the order of the items."""
    rows: dict[int, NDArray[np.float32]] = {}
    for indices, batch in answers:
        rows.update(zip(indices, batch, strict=True))
    return np.stack([rows[index] for index in range(count)])


def _decode(items: Sequence[Item]) -> Forward:
    """Return a forward pass of items of equal length that ends in logits [B, T, V]."""
    import torch

    ids = torch.tensor([item.ids for item in items])

    def forward(module: PreTrainedModel) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = module(input_ids=ids, use_cache=False).logits.numpy()
        return logits

    return forward


def _encode(items: Sequence[Item], pooling: Pooling | None = None) -> Forward:
    """Return a forward pass of items of equal length that ends in logits [B, labels] or vectors [B, width]."""
    import torch

    from passes._pooling import encode, has_token_types

    ids = torch.tensor([item.ids for item in items])
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(module: PreTrainedModel) -> NDArray[np.float32]:
        if items[0].types and has_token_types(module):
            feed["token_type_ids"] = torch.tensor([item.types for item in items])
        answer: NDArray[np.float32] = encode(module, feed, pooling).numpy()
        return answer

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
    for start, end in _chunks(session, item):
        first = min(max(item.first, start), end - 1)
        rows = session.run(item.ids[start:end], past=start, rows=np.arange(first - start, end - start))
        if end > item.first:
            yield first, rows


def _token_by_token(session: DecoderSession, item: Item) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the same, each token run as a decode step."""
    for start, end in _chunks(session, item):
        rows = np.empty((end - start, session.vocabulary), np.float32)
        for place in range(start, end):
            rows[place - start] = session.step(item.ids[place], past=place)
        first = max(item.first, start)
        if first < end:
            yield first, rows[first - start :]


def _chunks(session: DecoderSession, item: Item) -> Iterator[tuple[int, int]]:
    """Yield the bounds of pieces, nearly equal in length, whose logits fit SLICE_ELEMENTS."""
    most = max(4, SLICE_ELEMENTS // session.vocabulary)
    return pairwise(np.linspace(0, len(item.ids), -(-len(item.ids) // most) + 1).astype(int).tolist())
