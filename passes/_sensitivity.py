"""Run a model with one of its layers changed, for every layer, without running again what comes before the layer.

All variants move in lockstep with the source through one walk: a block is loaded once for all. A variant joins where
its layer begins: it runs the model's own code from the start, but each block on its way returns what it returned to the
source. So nothing is assumed of what a family hands from block to block; `replays` tries whether that is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from passes._skeleton import Skeleton, inside
from passes._walk import Traveller

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")
Forward = Callable[["PreTrainedModel"], Result]
STATE_BYTES = 1 << 28
"""Hidden states that wait between blocks."""
STATES_PER_PASS = 3
"""Of each token, in a forward pass that waits: what went into the first block, what goes into the next, and a mask."""
REPLAY_TOLERANCE = 1e-5
"""Difference of answers over their range, of the same numbers multiplied again."""


@dataclass(frozen=True)
class Variant:
    """The source with some layers as another model has them.

    Attributes:
        layers: module names; several where they hold one tensor.
        begins: the block before which it is still the source; "" for the start.
    """

    layers: tuple[str, ...]
    begins: str = ""


def variants_of(before: Skeleton, after: Skeleton) -> list[Variant]:
    """Return one variant for each tensor that is quantized in `after` and not in `before`, in the model's order."""
    families: dict[str, list[str]] = {}
    for name, _ in before.module.named_modules():
        if name in after.specs and name not in before.specs:
            families.setdefault(before.stored_name(f"{name}.weight"), []).append(name)
    return [
        Variant(tuple(names), next((block for block in before.blocks if inside(names[0], block)), ""))
        for names in families.values()
    ]


def saved_bytes(before: Skeleton, after: Skeleton, variant: Variant) -> int:
    """Return how much less a variant's layers take than the source's."""
    return _stored_bytes(before, variant.layers) - _stored_bytes(after, variant.layers)


def walk_variants(
    before: Skeleton, after: Skeleton, variants: Sequence[Variant], forwards: Sequence[Forward[Result]]
) -> Iterator[tuple[int | None, int, Result]]:
    """Run every function of `forwards` on the source and on each variant; yield (variant, index, result) as they end.

    The variant is None for the source, whose result of an index comes before those of the variants. In memory are one
    block, the tensors outside the blocks, the changed layers of both, and the states between blocks: for each token of
    `forwards` one of each block and variant.
    """
    sources = [
        _Runner(Traveller(before.module, forward, keeps=True), None, index) for index, forward in enumerate(forwards)
    ]
    runners = list(sources)
    outside = [layer for variant in variants if not variant.begins for layer in variant.layers]

    def join(block: str) -> list[_Runner]:
        """Return runners for the variants that begin at a block, as far as they have not begun."""
        begun = {runner.variant for runner in runners}
        return [
            _Runner(Traveller(before.module, forwards[each.index], each.traveller.outputs or ()), number, each.index)
            for number, variant in enumerate(variants)
            if variant.begins == block and number not in begun
            for each in sources
        ]

    def advance(runner: _Runner) -> Iterator[tuple[int | None, int, Result]]:
        layers = () if runner.variant is None else variants[runner.variant].layers
        with _swapped(before, after, layers):
            runner.traveller.advance()
        if runner.traveller.before is None:
            yield runner.variant, runner.index, runner.traveller.take_result()

    try:
        with _stopping(before), before.loaded(*before.outside()), after.loaded(*outside):
            runners += join("")
            for runner in runners:
                yield from advance(runner)
            while (block := sources[0].traveller.before) is not None:
                joining = join(block)
                runners += joining
                for runner in joining:
                    yield from advance(runner)
                changed = [layer for each in variants for layer in each.layers if inside(layer, block)]
                with before.loaded(block), after.loaded(*changed):
                    for runner in (each for each in runners if each.traveller.before == block):
                        yield from advance(runner)
    finally:
        for runner in runners:
            runner.traveller.abandon()


def replays(skeleton: Skeleton, forward: Forward[Any]) -> bool:
    """Say whether a walk that begins at any block, with the source's outputs of the blocks before, ends as a whole one.

    `forward` returns an array; a short text will do.
    """
    variants = [Variant((), block) for block in skeleton.blocks]
    (_, _, expected), *others = walk_variants(skeleton, skeleton, variants, [forward])
    limit = REPLAY_TOLERANCE * float(expected.max() - expected.min())
    return all(float(abs(answer - expected).max()) <= limit for _, _, answer in others)


@dataclass(frozen=True)
class _Runner:
    """One forward pass: of which variant, None for the source, and on which of the inputs."""

    traveller: Traveller[Any]
    variant: int | None
    index: int


@contextmanager
def _stopping(skeleton: Skeleton) -> Iterator[None]:
    """Let every block hand out what was recorded, else stop before it runs, and record what it returns."""
    blocks = {name: skeleton.module.get_submodule(name) for name in skeleton.blocks}

    def stopping(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            return Traveller.current().through(name, lambda: forward(*arguments, **named))

        return run

    for name, block in blocks.items():
        block.forward = stopping(name, block.forward)
    try:
        yield
    finally:
        for block in blocks.values():
            del block.forward  # the class's own shows again


@contextmanager
def _swapped(before: Skeleton, after: Skeleton, layers: Sequence[str]) -> Iterator[None]:
    """Have some layers of the source as `after` has them."""
    originals = {name: before.module.get_submodule(name) for name in layers}
    for name in originals:
        before.module.set_submodule(name, after.module.get_submodule(name))
    try:
        yield
    finally:
        for name, layer in originals.items():
            before.module.set_submodule(name, layer)


def _stored_bytes(skeleton: Skeleton, layers: Sequence[str]) -> int:
    stored = {stored for layer in layers for stored in skeleton.tensors(layer).values()}
    return sum(skeleton.entries[name].nbytes for name in stored)
