"""Spread a budget of bytes over layers: what each format does to each layer alone, and the choice that does least.

Damages of single layers add up (docs/measured.md), so the least sum under the budget is looked for: a multiple-choice
knapsack, solved exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes._batches import equal_lengths
from passes._kind import kind_of
from passes._pairs import replaced
from passes._sensitivity import Variant, variants_of, walk_variants
from passes._skeleton import Skeleton, inside
from passes._walk import TOKENS_PER_BATCH, walk_over
from passes.base import PassError

if TYPE_CHECKING:
    from passes._formats import WeightFormat

Round = Callable[[torch.Tensor, "WeightFormat"], dict[str, torch.Tensor]]
Damages = dict[str, list[float]]
"""Layer -> what each format does to it, in the formats' order."""
ANSWER_BYTES = 1 << 28
"""Of the source's answers that wait for those of the variants."""
PASSES = 48
"""Most forward passes in one walk; each is a thread."""


def least_damage(damages: Damages, sizes: Mapping[str, Sequence[int]], budget: int) -> dict[str, int]:
    """Return layer -> place of its format, such that the sizes sum to at most `budget` and the damages to the least.

    Raises:
        PassError: the smallest formats of all layers do not fit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag

    least = sum(min(each) for each in sizes.values())
    if least > budget:
        raise PassError(f"a budget of {budget} bytes, but the smallest formats take {least}")
    cost = np.array([damages[layer] for layer in sizes], float).ravel()
    cost /= max(float(cost.mean()), 1e-300)  # tolerances of the solver are absolute
    unit = gcd(*(size for each in sizes.values() for size in each))
    takes = np.array(list(sizes.values())) // unit
    one_each = LinearConstraint(block_diag([np.ones((1, takes.shape[1]))] * len(takes)), 1, 1)
    fits = LinearConstraint(takes.reshape(1, -1), ub=budget // unit)
    found = milp(
        cost, integrality=np.ones_like(cost), bounds=Bounds(0, 1), constraints=[one_each, fits],
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    assert found.x is not None, found.message
    return dict(zip(sizes, found.x.reshape(takes.shape).argmax(1).tolist(), strict=True))


def block_damages(
    skeleton: Skeleton,
    texts: Sequence[Sequence[int]],
    layers: Sequence[str],
    forms: Sequence[WeightFormat],
    rounded: Round,
) -> Damages:
    """Return the squared change of the output of a layer's block, over its squares, when that layer alone is rounded.

    One walk over the texts, in memory one block and the layers of one block in every format.
    """
    changed = {layer: [0.0] * len(forms) for layer in layers}
    squares = dict.fromkeys(skeleton.blocks, 0.0)
    stored: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def enter(name: str) -> Callable[..., None]:
        own = [layer for layer in layers if inside(layer, name)]

        def hook(block: nn.Module, args: Any, options: Any, out: Any) -> None:
            for layer, place in [key for key in stored if not inside(key[0], name)]:
                del stored[layer, place]
            whole = _first(out)
            squares[name] += float(whole.double().square().sum())
            for layer in own:
                module = skeleton.module.get_submodule(layer)
                weight = module.get_parameter("weight")
                for place, form in enumerate(forms):
                    if (layer, place) not in stored:
                        stored[layer, place] = rounded(weight, form)
                    with replaced(module, {"weight": form.load(stored[layer, place], weight.shape[1])}):
                        got = _first(block.forward(*args, **options))
                    changed[layer][place] += float((got - whole).double().square().sum())

        return hook

    with ExitStack() as hooks:
        for name in skeleton.blocks:
            block = skeleton.module.get_submodule(name)
            hooks.enter_context(block.register_forward_hook(enter(name), with_kwargs=True))
        walk_over(skeleton, texts)
    home = {layer: next(block for block in skeleton.blocks if inside(layer, block)) for layer in layers}
    return {layer: [value / squares[home[layer]] for value in values] for layer, values in changed.items()}


def answer_damages(before: Skeleton, after: Skeleton, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return layer -> mean change of the model's answers when it alone is as in `after`.

    The change is KL(source || changed) in nats for a decoder's tokens and a classifier's texts, else squares over
    squares. Every layer is really changed and the rest of the model run.
    """
    is_class = kind_of(before.config) in ("decoder", "classifier")
    options = {"use_cache": False} if kind_of(before.config) == "decoder" else {}
    variants = variants_of(before, after)
    total, units = [0.0] * len(variants), 0.0
    lengths = [len(ids) for ids in texts]
    most = max(1, min(TOKENS_PER_BATCH, ANSWER_BYTES // (4 * before.module.config.get_text_config().vocab_size)))
    for batch in equal_lengths(lengths, most):
        ids = torch.tensor([texts[index] for index in batch])
        for some in _chunks(range(len(variants))):
            for place, want, got in _answers(before, after, [variants[each] for each in some], ids, options):
                total[some[place]] += _divergence(want, got) if is_class else float((got - want).square().sum())
                if some[place] == 0:
                    units += want[..., 0].numel() if is_class else float(want.square().sum())
    return {layer: value / units for each, value in zip(variants, total, strict=True) for layer in each.layers}


def _answers(
    before: Skeleton, after: Skeleton, variants: Sequence[Variant], ids: torch.Tensor, options: Mapping[str, Any]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield place of a variant, the source's answer and the variant's."""
    want = torch.empty(0)
    for variant, _, answer in walk_variants(
        before, after, variants, [lambda module: _first(module(input_ids=ids, **options)).float()]
    ):
        if variant is None:
            want = answer
        else:
            yield variant, want, answer


def _divergence(want: torch.Tensor, got: torch.Tensor) -> float:
    """Return KL(want || got) of logits [..., V], summed, in nats."""
    p, q = (each.log_softmax(-1) for each in (want, got))
    return float((p.exp() * (p - q)).sum(dtype=torch.float64))


def _chunks(places: range) -> Iterator[range]:
    yield from (places[start : start + PASSES] for start in range(0, len(places), PASSES))


def _first(out: Any) -> torch.Tensor:
    """Return what a module returns, or the first of it."""
    first: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return first
