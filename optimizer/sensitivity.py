"""Which layers a quantizing pass hurts most, and the same pass with those in another format.

The damage of a layer is how far the model's answers move when that layer alone is changed: for decoders the mean
KL(source || changed) in nats per token, for classifiers per text (a lower bound of it: `evaluate/agreement.py`); for
embedders and rerankers the squared change of vectors or scores over their squares. Every layer is really changed and
the rest of the model run; nothing is extrapolated.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from optimizer.evaluate.agreement import CandidateTally, SourceTally
from optimizer.evaluate.distributions import blocks
from optimizer.evaluate.items import Item, items_hash
from optimizer.fingerprint import fingerprint, source_fingerprint
from optimizer.lock import machine, versions
from optimizer.record import sayable
from optimizer.statistics.clusters import sum_by_group
from optimizer.statistics.ratio import document_deviation
from optimizer.store import Entry, Store
from passes._override import LayerFormat, Override
from passes.base import BlockPass, Model, Pass, PassError, Progress, no_progress

if TYPE_CHECKING:
    from passes._sensitivity import Variant
    from passes._skeleton import Skeleton

Array = NDArray[np.float64]
FORMAT = 1
RESULT = "damage.npz"
UNITS = {
    "decoder": "KL, nats per token",
    "classifier": "KL, nats per text",
    "embedder": "squared change of vectors over their squares",
    "reranker": "squared change of scores over their squares",
}
PASSES = 64
"""Most forward passes in one walk; each is a thread, whose matrix products keep some 5 MB for themselves."""
PROBE_TOKENS = 8
LEVEL = 0.95
MOST_NAMED = 8
"""Most layers that are named one by one where some are kept."""


@dataclass(frozen=True)
class LayerDamage:
    """What changing one layer alone does to the model's answers.

    Attributes:
        layers: its name; tied layers, which hold one tensor, are changed together and have several.
        format: what it becomes.
        damage: mean over all tokens (decoder), texts (classifier) or squares (embedder, reranker); NaN where an answer
            was no number.
        standard_error: of `damage`, whole documents being the units; NaN for a single one.
        low, high: one-sided 95 % bounds of `damage`, by Student's t; NaN for a single document.
        saved_bytes: how much less the layer takes.
    """

    layers: tuple[str, ...]
    format: str
    damage: float
    standard_error: float
    low: float
    high: float
    saved_bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """What a pass does to each layer alone.

    Attributes:
        name: of the recipe.
        step: the pass.
        place: of the pass in the chain, from 0.
        texts: in words, what the damage was measured with.
        items: how many texts that is.
        tokens: how many tokens.
        unit: what `damage` counts.
        seconds: the measurement took, or finding it in the store.
        layers: worst first.
    """

    name: str
    step: str
    place: int
    texts: str
    items: int
    tokens: int
    unit: str
    seconds: float
    layers: tuple[LayerDamage, ...]

    def share(self, layer: LayerDamage) -> float:
        """Return a layer's share of the sum of all damages; NaN where it has no number."""
        total = sum(each.damage for each in self.layers if math.isfinite(each.damage))
        return layer.damage / total if total > 0 else math.nan

    def worst(self, count: int, format: str) -> list[str]:
        """Return the names of the layers with most damage, so many that are not in a format already.

        Raises:
            PassError: all of them are.
        """
        others = [layer for layer in self.layers if layer.format != format]
        if not others:
            raise PassError(f"{self.step}: keep: every layer is {format} already; name another format")
        return [name for layer in others[:count] for name in layer.layers]

    def to_json(self) -> str:
        """Return all of it, and each layer's share, as one JSON document; numbers that JSON cannot say are null."""
        layers = [{**asdict(layer), "share": self.share(layer)} for layer in self.layers]
        return json.dumps(sayable({"format": FORMAT, **asdict(self), "layers": layers}), indent=1)


def sensitivity(
    before: Model,
    after: Model,
    items: Sequence[Item],
    *,
    store: Store,
    key: str,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> tuple[LayerDamage, ...]:
    """Return the damage of every layer that is quantized in `after` and not in `before`, the worst first.

    Answers from the store what it was asked before; goes on where a killed measurement of the same stood. In memory are
    one block and the states between blocks.

    Args:
        before: the model that the pass took, at stage torch.
        after: what the pass made of it.
        items: texts that the model answers.
        store: keeps the answers.
        key: names all that decided `after`.
        threads: threads torch may use; None leaves its setting alone.
        progress: told how many tokens, each counted once for every layer, are done.

    Raises:
        PassError: no layer is quantized in `after` that is not in `before`.
    """
    texts = _texts(items, after)
    asked = fingerprint(["sensitivity", _code(), key, items_hash(texts, 0), threads, versions(), machine()])
    return _damages(store.get_or_build(asked, lambda folder: _measure(folder, before, after, texts, threads, progress)))


def kept_formats(kind: type[Pass]) -> tuple[str, ...]:
    """Return the formats that a pass can give some of its layers, none where it cannot change one alone."""
    options = {option.name for option in fields(kind)}
    if issubclass(kind, BlockPass) and not kind.is_layerwise:
        return ()
    if "overrides" in options:
        return get_args(LayerFormat)
    return ("float",) if "exclude" in options else ()


def keep(step: Pass, layers: Sequence[str], format: str) -> Pass:
    """Return the same pass with the layers of these names in another format, whatever it said of them before.

    Raises:
        PassError: the pass cannot give a layer that format.
    """
    known = kept_formats(type(step))
    if format not in known:
        expected = f"one of {', '.join(known)}" if len(known) > 1 else " ".join(known) or "none: it treats all alike"
        raise PassError(f"{step.name()}: got the format {format!r} for layers to keep, expected {expected}")
    options: Any = step
    if not layers:
        return step
    if format == "float":
        return replace(options, exclude=(*options.exclude, *layers))  # type: ignore[no-any-return]
    override = Override(layers=tuple(layers), format=format)  # type: ignore[arg-type]
    return replace(options, overrides=(override, *options.overrides))  # type: ignore[no-any-return]


def kept_text(layers: Sequence[str], format: str) -> str:
    """Return in words which layers are kept in a format; of many the first few."""
    more = len(layers) - MOST_NAMED
    return f"kept in {format}: {', '.join(layers[:MOST_NAMED])}{f' and {more} more' if more > 0 else ''}"


def _texts(items: Sequence[Item], model: Model) -> list[Item]:
    """Return items that are one text each, all of whose positions are asked for."""
    from passes._kind import kind_of

    kind = kind_of(model.config)
    if kind == "embedder":
        owners = {text: item.group for item in reversed(items) for text in item.texts}
        return [Item(text, group) for text, group in reversed(owners.items())]
    return [Item(item.ids, item.group) for item in items] if kind == "decoder" else list(items)


def _code() -> str:
    """Return the hash of the code that decides a damage."""
    import passes
    from optimizer.examiner import scoring_code

    shared = source_fingerprint(Path(passes.__path__[0]) / "_sensitivity.py")
    return fingerprint([scoring_code(), shared, Path(__file__).read_text(encoding="utf-8")])


def _measure(
    folder: Path, before: Model, after: Model, texts: Sequence[Item], threads: int | None, progress: Progress
) -> Mapping[str, Any]:
    """Write `damage.npz`: of each layer [V] and text [n] the summed damage, and of each text its tokens or squares."""
    import torch

    from optimizer.costs import give_back_freed_memory
    from optimizer.evaluate.scorers import answering
    from passes._files import atomic_write
    from passes._kind import kind_of
    from passes._sensitivity import replays, saved_bytes, variants_of
    from passes._skeleton import Skeleton

    if threads is not None:
        torch.set_num_threads(threads)
    give_back_freed_memory()
    kind, source, changed = kind_of(before.config), Skeleton(before), Skeleton(after)
    variants = variants_of(source, changed)
    if not variants:
        raise PassError("damage of single layers: the pass quantizes none, so there is nothing to rank")
    layers = [
        {
            "layers": each.layers,
            "format": changed.specs[each.layers[0]].format.name,
            "saved_bytes": saved_bytes(source, changed, each),
        }
        for each in variants
    ]
    probe = min(texts, key=lambda text: len(text.ids))
    probe = replace(probe, ids=probe.ids[:PROBE_TOKENS]) if kind == "decoder" else probe
    if not replays(source, answering([probe], before, kind)):
        variants = [replace(each, begins="") for each in variants]
    damage, sizes = np.zeros((len(variants), len(texts))), np.zeros(len(texts))
    total, done = len(variants) * sum(len(text.ids) for text in texts), 0
    for number, (indices, some) in enumerate(_shares(source, len(variants), texts)):
        path = folder / f"share-{number}.npz"
        if not path.exists():
            asked = [[texts[index] for index in batch] for batch in indices]
            values, units = _share(source, changed, [variants[place] for place in some], asked, before, kind)
            atomic_write(path, _archive(values=values, units=units))
        flat = [index for batch in indices for index in batch]
        with np.load(path, allow_pickle=False) as archive:
            damage[np.ix_(some, flat)], sizes[flat] = archive["values"], archive["units"]
        done += len(some) * sum(len(texts[index].ids) for index in flat)
        progress(done, total, "token")
    atomic_write(folder / RESULT, _archive(damage=damage, sizes=sizes, groups=np.array([text.group for text in texts])))
    for path in folder.glob("share-*.npz"):
        path.unlink()
    return {"layers": layers}


def _damages(entry: Entry) -> tuple[LayerDamage, ...]:
    from scipy.special import stdtrit

    with np.load(entry.folder / RESULT, allow_pickle=False) as archive:
        damage, sizes, groups = archive["damage"], archive["sizes"], archive["groups"]
    units = sum_by_group(sizes, groups)
    far = float(stdtrit(len(units) - 1, LEVEL)) if len(units) > 1 else math.nan
    found = []
    for layer, values in zip(entry.meta["layers"], damage, strict=True):
        sums = sum_by_group(values, groups)
        error = document_deviation(sums, units) / math.sqrt(len(sums)) if len(sums) > 1 else math.nan
        mean = float(sums.sum() / units.sum())
        bounds = max(mean - far * error, 0.0), mean + far * error
        found.append(LayerDamage(tuple(layer["layers"]), layer["format"], mean, error, *bounds, layer["saved_bytes"]))
    return tuple(sorted(found, key=lambda each: -math.inf if math.isnan(each.damage) else -each.damage))


def _archive(**arrays: NDArray[Any]) -> bytes:
    """Return arrays as the bytes of an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _shares(source: Skeleton, variants: int, texts: Sequence[Item]) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Cut the work into walks whose states fit the memory: yield batches of indices of texts, and places of variants.

    As many variants go together as there is room for with one batch; only where all do, batches share a walk.
    """
    from optimizer.evaluate.scorers import batches, tokens_at_once
    from passes._sensitivity import STATE_BYTES, STATES_PER_PASS

    config = source.module.config.get_text_config()
    states = STATE_BYTES // (4 * config.hidden_size)
    recorded = len(source.blocks) + STATES_PER_PASS
    most = min(variants, PASSES - 1)
    tokens = max(1, states // (recorded + STATES_PER_PASS * most))
    lengths = [len(text.ids) for text in texts]
    group: list[list[int]] = []
    for batch in [*batches(texts, min(tokens, tokens_at_once(config.vocab_size))), []]:
        waiting = sum(lengths[index] for each in [*group, batch] for index in each)
        if group and (not batch or waiting > tokens or (len(group) + 1) * (variants + 1) > PASSES):
            together = sum(lengths[index] for each in group for index in each)
            count = min(most, max(1, (states // together - recorded) // STATES_PER_PASS))
            yield from ((group, [*range(first, min(first + count, variants))]) for first in range(0, variants, count))
            group = []
        group.append(batch)


def _share(
    source: Skeleton,
    changed: Skeleton,
    variants: Sequence[Variant],
    together: Sequence[Sequence[Item]],
    model: Model,
    kind: str,
) -> tuple[Array, Array]:
    """Return the damage that each variant does to each text [V, n], and the tokens or squares of each text [n]."""
    from optimizer.evaluate.scorers import answering
    from passes._sensitivity import walk_variants

    texts = [text for batch in together for text in batch]
    starts = np.cumsum([0, *map(len, together)])
    tally: _Tally = _Divergence(texts, kind) if kind in ("decoder", "classifier") else _SquaredChange(len(texts))
    forwards = [answering(batch, model, kind) for batch in together]
    for variant, number, answers in walk_variants(source, changed, variants, forwards):
        for row, answer in enumerate(answers):
            tally.add(variant, int(starts[number]) + row, np.atleast_2d(answer))
    values = [tally.damage(number) for number in range(len(variants))]
    return np.stack(values), tally.units()


class _Tally(Protocol):
    """Compares what variants answer with what the source answered; the source comes first."""

    def add(self, variant: int | None, index: int, answer: NDArray[np.float32]) -> None:
        """Take what the source (None) or a variant answers to one text: logits [R, V], or a vector or score [1, D]."""

    def damage(self, variant: int) -> Array:
        """Return the summed damage of each text [n]."""

    def units(self) -> Array:
        """Return what the damage of each text is a sum over [n]."""


class _Divergence:
    """KL(source || variant) of every position, in nats."""

    def __init__(self, texts: Sequence[Item], kind: str) -> None:
        self._texts, self._kind, self._name = texts, kind, items_hash(texts, 0)
        self._source = SourceTally(texts, self._name, kind)
        self._variants: dict[int, CandidateTally] = {}

    def add(self, variant: int | None, index: int, answer: NDArray[np.float32]) -> None:
        tally: SourceTally | CandidateTally = self._source
        if variant is not None:
            tally = self._candidate(variant)
        for rows in blocks(index, 0, answer):
            tally.add(rows)

    def damage(self, variant: int) -> Array:
        return np.asarray(self._candidate(variant).result().scores["kl"].values["kl"], np.float64)

    def units(self) -> Array:
        return np.asarray(self._source.result().scores["kl"].values["tokens"], np.float64)

    def _candidate(self, variant: int) -> CandidateTally:
        if variant not in self._variants:
            reference = self._source.result().reference
            self._variants[variant] = CandidateTally(self._texts, self._name, self._kind, reference)
        return self._variants[variant]


class _SquaredChange:
    """Squared length of the change of a vector; over the source's own squared lengths, the relative change."""

    def __init__(self, count: int) -> None:
        self._source: dict[int, Array] = {}
        self._damage: dict[int, Array] = {}
        self._count = count

    def add(self, variant: int | None, index: int, answer: NDArray[np.float32]) -> None:
        vector = answer.ravel().astype(np.float64)
        if variant is None:
            self._source[index] = vector
            return
        change = vector - self._source[index]
        self._damage.setdefault(variant, np.zeros(self._count))[index] = change @ change

    def damage(self, variant: int) -> Array:
        return self._damage[variant]

    def units(self) -> Array:
        return np.array([self._source[index] @ self._source[index] for index in range(self._count)])
