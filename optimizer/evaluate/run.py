"""Evaluate a model on every task: each distinct set of items passes through the model once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.distributions import blocks
from optimizer.evaluate.items import Item, items_hash
from optimizer.evaluate.result import TaskResult
from optimizer.evaluate.scorers import Scorer
from optimizer.evaluate.task import Inquiry, Phase, Task, Watcher, phase_of
from optimizer.evaluate.text_reader import TextReader
from passes.base import Progress, no_progress


def evaluate(
    tasks: Mapping[str, Task],
    items: Mapping[str, list[Item]],
    scorer: Scorer,
    source: Mapping[str, TaskResult] | None = None,
    progress: Progress = no_progress,
    reader: TextReader | None = None,
) -> dict[str, TaskResult]:
    """Return the result of each task, by its name.

    Args:
        tasks: what to evaluate.
        items: of each task; tasks whose items are equal share one pass through the model for each phase.
        scorer: the model.
        source: the results of the source on the same tasks and items; None when the source itself is evaluated.
        progress: told how many tokens (of an encoder: texts; of prompts: answers) are done.
        reader: how the model reads text; tasks that generate text need it.

    Raises:
        ValueError: `source` was scored on other items.
        RuntimeError: the scorer left out or repeated positions.
    """
    tallies = {
        name: task.tally(items[name], scorer.kind, source[name] if source else None) for name, task in tasks.items()
    }
    for tally in tallies.values():
        if isinstance(tally, Inquiry):
            tally.ask(scorer, reader, progress)
    watching = {name: tally for name, tally in tallies.items() if not isinstance(tally, Inquiry)}
    passes = _passes(tasks, items, watching)
    total = sum(sum(_positions(items[names[0]], scorer.kind)) for names in passes)
    done = 0
    for names in passes:
        phase = phase_of(tasks[names[0]])
        for count in show(items[names[0]], scorer, [watching[name] for name in names], phase):
            done += count
            progress(done, total, "token" if scorer.kind == "decoder" else "text")
    return {name: tally.result() for name, tally in tallies.items()}


def _passes(tasks: Mapping[str, Task], items: Mapping[str, list[Item]], names: Iterable[str]) -> list[list[str]]:
    """Group task names by equal items and phase."""
    shared: dict[tuple[str, Phase], list[str]] = {}
    for name in names:
        shared.setdefault((items_hash(items[name], 0), phase_of(tasks[name])), []).append(name)
    return list(shared.values())


def _positions(items: Sequence[Item], kind: str) -> list[int]:
    """Return how many rows each item has: logits per token, a vector per text of an embedder, or one row of logits."""
    if kind == "decoder":
        return [len(item.ids) - item.first for item in items]
    return [len(item.texts) if kind == "embedder" else 1 for item in items]


def show(items: Sequence[Item], scorer: Scorer, watchers: Sequence[Watcher], phase: Phase = "prefill") -> Iterator[int]:
    """Pass items through the model once, show every watcher their logits, yield how many rows each step had."""
    starts = [item.first if scorer.kind == "decoder" else 0 for item in items]
    expected, seen = (
        [start + count for start, count in zip(starts, _positions(items, scorer.kind), strict=True)],
        starts,
    )
    for index, first, logits in _answers(items, scorer, phase):
        if first != seen[index]:
            raise RuntimeError(f"scorer: item {index}: got position {first}, expected {seen[index]}")
        for rows in blocks(index, first, logits):
            for watcher in watchers:
                watcher.add(rows)
        seen[index] += len(logits)
        yield len(logits)
    if seen != expected:
        index = next(index for index, count in enumerate(seen) if count != expected[index])
        raise RuntimeError(f"scorer: item {index}: got {seen[index]} positions, expected {expected[index]}")


def _answers(items: Sequence[Item], scorer: Scorer, phase: Phase) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Yield (item index, first row, rows): logits of a decoder or [1, labels], an embedder's vectors [texts, width]."""
    if scorer.kind == "decoder":
        return scorer.logits(items, phase)
    return _vectors(items, scorer) if scorer.kind == "embedder" else _one_by_one(items, scorer)


def _one_by_one(items: Sequence[Item], scorer: Scorer) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Classify all items and hand out each one's logits [1, labels] as a decoder's only position."""
    logits = scorer.classify(items)
    yield from ((index, 0, logits[index : index + 1]) for index in range(len(logits)))


def _vectors(items: Sequence[Item], scorer: Scorer) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Embed every distinct text once and hand out each item's vectors [texts, width]."""
    distinct = {
        text: number for number, text in enumerate(dict.fromkeys(text for item in items for text in item.texts))
    }
    vectors = scorer.embed([Item(text, "") for text in distinct])
    yield from ((index, 0, vectors[[distinct[text] for text in item.texts]]) for index, item in enumerate(items))
