"""Round weights one input feature after the other, those to come making up for the error of those before.

Effect: Linear weights become packed numbers of a low-bit format such that outputs on calibration texts move least.
Source: Frantar et al. 2022, arXiv:2210.17323, section 3, in the equivalent form of Chee et al. 2023, arXiv:2307.13304,
    section 3: with H = X^T X = U D U^T, U upper triangular with ones on its diagonal, feature k becomes the number
    nearest to W_k + sum over i < k of (W_i - Q_i) U_ik. We differ: one Cholesky factor and no inverse; features in the
    order of falling H_kk, but groups stay what they are and no index is stored: their scales are found before, in the
    range that loses least with squared errors weighted by sqrt(H_kk D_kk), and twice more for what was to be rounded
    when its turn came, of which each output feature keeps the best; damping is a share of each H_kk, not of their
    mean, so that scaling a channel and its weights changes nothing.
Changes: `weight` of nn.Linear inside the blocks; `embedding` and `lm_head` by option.   Keeps: biases, norms, shapes.
Cost: two forward passes over the calibration texts and X^T X of each linear layer's input, one block in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from passes._quantizer import CalibratedQuantizer
from passes.base import Context, Estimate, Model, PassError

if TYPE_CHECKING:
    import torch

    from passes._blockwise import CalibratedBlock
    from passes._formats import Scales, WeightFormat
    from passes._quantized import QuantizedLayer

FEATURES = 128
"""That are rounded one by one before all those to come are corrected at once."""
REFITS = 2
"""Times that scales are found again, for the weights as they were when their turn came (docs/log.md, 2026-11-29)."""
FACTOR_BYTES = 24
"""For each number of X^T X: two of 8 bytes and two of 4 at once."""


@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(CalibratedQuantizer):
    """Round weights one input feature after the other, those to come making up for the error of those before."""

    damping: float = field(
        default=0.01, metadata={"help": "share of its mean square that noise adds to each input feature", "ge": 0}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping >= 0:
            raise ValueError(f"damping: got {self.damping}, expected 0 or more")

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers; a wide layer's factor, in float64, is what takes most memory."""
        from passes._skeleton import Skeleton

        estimate = super().estimate(model, ctx)
        skeleton = Skeleton(model)
        chosen = [
            skeleton.module.get_parameter(f"{name}.weight")
            for block in skeleton.blocks[:1]
            for name in self.chosen(block, skeleton.module)
        ]
        widest = max((weight.shape[1] for weight in chosen), default=0)
        return replace(estimate, peak_bytes=estimate.peak_bytes + FACTOR_BYTES * widest**2)

    def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Round the layers of one block; one that no token reaches is rounded to nearest."""
        from passes._gram import gram_matrices
        from passes._quantized import QuantizedLayer

        readers = block.readers()
        grams = gram_matrices(block, [names[0] for names in readers])
        layers = {}
        for names in readers:
            gram = grams.pop(names[0], None)
            if gram is not None and not gram.diagonal().isfinite().all():
                raise PassError(f"{self.name()}: {names[0]}: its input holds NaN or infinity; it cannot be calibrated")
            for name in names:
                weight, spec = block.weight(name), block.specs[name]
                form = spec.weight_format.for_weight(weight)
                if gram is None:
                    stored = self.rounded(weight, form)
                else:
                    stored = form.store(*solved(weight, gram, form, self.damping))
                layers[name] = QuantizedLayer(spec, stored)
        return layers


def solved(weight: torch.Tensor, gram: torch.Tensor, form: WeightFormat, damping: float) -> tuple[torch.Tensor, Scales]:
    """Return codes [N, G, B] and scales [N, G, 1] of a weight [N, M] whose input has the Gram matrix `gram` [M, M].

    Each output feature keeps the best of its roundings: in scales found for its weights, then in scales found for what
    these had become when their turn came.
    """
    import torch

    from passes._formats import Scales, search_clip

    groups = form.grouped(weight)
    missing = groups.shape[1] * groups.shape[2] - len(gram)
    gram = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    order = gram.diagonal().argsort(descending=True, stable=True)
    place = order.argsort()
    feedback, cost = unit_factor(gram, order, damping)
    importance = (gram.diagonal() * cost[place]).sqrt()
    in_turn = groups.flatten(1).T[order].contiguous()
    scales = search_clip(groups.flatten(1), form, importance)
    codes, lost, corrected = rounded_in_turn(in_turn, feedback, cost, form, scales, order)
    for _ in range(REFITS):
        again = search_clip(corrected[place].T, form, importance)
        others, loses, corrected = rounded_in_turn(in_turn, feedback, cost, form, again, order)
        better = loses < lost
        codes, lost = torch.where(better, others, codes), torch.minimum(loses, lost)
        scales = Scales(*(torch.where(better[:, None, None], *each) for each in zip(again, scales, strict=True)))
    return codes[place].T.contiguous().view(groups.shape), scales


def unit_factor(gram: torch.Tensor, order: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U [M, M] and the diagonal of D [M] of `gram` = U D U^T, after noise on each feature, in float32.

    U is upper triangular with ones on its diagonal. Both are in `order`, an int64 permutation of the features.

    Raises:
        PassError: without noise, `gram` has no such factor.
    """
    import torch

    reverse = order.flip(0)  # the Cholesky factor of a matrix upside down is an upper one of the matrix
    damped = gram[reverse][:, reverse].double()
    square = damped.diagonal()
    square.copy_(torch.where(square > 0, square * (1 + damping), 1.0))  # a feature that is always zero corrects none
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise PassError(f"quantize_gptq: damping: got {damping}, with which X^T X has no Cholesky factor; give 0.01")
    roots = lower.diagonal().clone()
    return lower.div_(roots).float().flip(0, 1), roots.square().float().flip(0)


def rounded_in_turn(
    weight: torch.Tensor,
    feedback: torch.Tensor,
    cost: torch.Tensor,
    form: WeightFormat,
    scales: Scales,
    order: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight [M, N], its input features in `order`, each with the errors of those before added to it.

    `feedback` is U [M, M], `cost` the diagonal of D [M], both in that order; `scales` are [N, G, 1].

    Returns:
        Codes [M, N], the loss of each output feature [N], and what was rounded [M, N], all in that order.
    """
    import torch

    from passes._formats import Scales

    scale, zero = (each[..., 0].T.contiguous() for each in scales)  # [G, N]
    groups = order // (len(order) // len(scale))
    codes, error, corrected = (torch.empty_like(weight) for _ in range(3))
    for start in range(0, len(weight), FEATURES):
        end = min(start + FEATURES, len(weight))
        before = torch.addmm(weight[start:end], feedback[:start, start:end].T, error[:start])
        inner = feedback[start:end, start:end].T.contiguous()
        for row, group in enumerate(groups[start:end].tolist()):
            own, now = Scales(scale[group], zero[group]), start + row
            torch.addmv(before[row], error[start:now].T, inner[row, :row], out=corrected[now])
            codes[now] = form.round(corrected[now], own)
            error[now] = weight[now] - form.value(codes[now], own)
    lost = (corrected - weight + error).square_().mul_(cost[:, None]).sum(0)
    return codes, lost, corrected
