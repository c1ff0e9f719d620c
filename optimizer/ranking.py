"""Rank the layers of a model by what a pass does to each: for a rung that keeps the worst, and for a person."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.errors import CommandError
from optimizer.evaluate.calibration import require_unseen
from optimizer.evaluate.data import read_rows
from optimizer.evaluate.items import Item, make_items, shuffled
from optimizer.exams import Exams
from optimizer.maker import Maker
from optimizer.reader import one_of, suggest
from optimizer.recipe import Keep, Recipe
from optimizer.sensitivity import UNITS, Sensitivity, sensitivity
from passes.base import BlockPass, Model

MOST_DOCUMENTS, MOST_TEXTS = 32, 256
"""Texts that are measured with where nothing else is asked for: of a decoder, and of others, whose texts are short."""
CONTEXT = 512
"""Tokens of a text that no pass and no evaluation says how to read."""


@dataclass(frozen=True)
class RankingTexts:
    """Texts to measure with, and in words which they are."""

    items: Sequence[Item]
    words: str


def rank(maker: Maker, index: int, before: Model, key: str, texts: RankingTexts) -> Sensitivity:
    """Return what a pass of the recipe does to each layer of the model `key` names.

    Raises:
        PassError: the pass refused the model, or quantizes none of its layers.
    """
    step, start = maker.recipe.passes[index], time.perf_counter()
    after, entry = maker.make(step, index, before, key, step.name())
    with maker.told.progress(f"{step.name()}: damage of single layers") as progress:
        layers = sensitivity(
            before, after, texts.items, store=maker.store, key=entry.key, threads=maker.threads, progress=progress
        )
    return Sensitivity(
        name=maker.recipe.name,
        step=step.name(),
        place=index,
        texts=texts.words,
        items=len(texts.items),
        tokens=sum(len(item.ids) for item in texts.items),
        unit=UNITS[maker.reader.kind],
        seconds=time.perf_counter() - start,
        layers=layers,
    )


def choosing_texts(
    maker: Maker, exams: Exams, index: int, calibration: str | None, most: int | None = None
) -> RankingTexts | None:
    """Return texts that no verdict rests on, None where there are none.

    They are those of the entry of `data` that `calibration` names, else the items that choose, else texts that the pass
    itself calibrates with; `most` at most.
    """
    most = most or _usual(maker)
    if calibration is not None:
        rows = shuffled(read_rows(maker.recipe.data[calibration]))
        items = make_items(rows, maker.reader, CONTEXT, bos=True, limit=most)
        require_unseen(f"passes.{index}.otherwise: data.{calibration}", items, maker.items, maker.reader)
        return RankingTexts(items, f"{len(items)} of {len(rows)} texts of data.{calibration}")
    if exams.last is not None:
        return _items_of(exams, most, " that choose")
    for name, texts in maker.shown(maker.recipe.passes[index], index).items():
        some = [Item(ids, str(number)) for number, ids in enumerate(texts[:most])]
        return RankingTexts(some, f"{len(some)} of {len(texts)} texts of data.{name}")
    return None


def shown_texts(maker: Maker, exams: Exams, index: int, most: int | None = None) -> RankingTexts:
    """Return the texts that a rung of the pass would choose with, else items of the first evaluation.

    Raises:
        CommandError: there are neither.
    """
    rungs = maker.recipe.fallback(index).otherwise
    named = next((rung.calibration for rung in rungs if isinstance(rung, Keep) and rung.calibration), None)
    chosen = choosing_texts(maker, exams, index, named, most)
    if chosen is None and not exams.search.parts:
        raise CommandError("got no texts to measure with, expected `evaluate`, or a pass with `calibration`")
    return chosen or _items_of(exams, most or _usual(maker), "")


def quantizing_pass(recipe: Recipe, name: str | None = None) -> int:
    """Return the place of the first pass that quantizes layer by layer, or of the named one.

    Raises:
        CommandError: there is none.
    """
    from optimizer.catalogue import installed

    places = [place for place, each in enumerate(recipe.passes) if isinstance(each, BlockPass) and each.is_layerwise]
    names = [recipe.passes[place].name() for place in places]
    if not places:
        kinds = installed().passes.items()
        known = [each for each, kind in kinds if issubclass(kind, BlockPass) and kind.is_layerwise]
        got = ", ".join(each.name() for each in recipe.passes)
        raise CommandError(f"passes: none quantizes layers, got {got}, expected {one_of(known)} among them")
    if name is not None and name not in names:
        raise CommandError(f"--pass: no quantizing pass {name!r} in this recipe{suggest(name, names)}")
    return places[0 if name is None else names.index(name)]


def _items_of(exams: Exams, most: int, which: str) -> RankingTexts:
    """Return items of the first evaluation, those whose group's hash is least."""
    name, part = next(iter(exams.search.parts.items()))
    some = sorted(part.items, key=lambda item: hashlib.sha256(f"ranking {item.group}".encode()).digest())[:most]
    return RankingTexts(some, f"{len(some)} of {len(part.items)} items{which} of evaluate.{name}")


def _usual(maker: Maker) -> int:
    return MOST_DOCUMENTS if maker.reader.kind == "decoder" else MOST_TEXTS
