"""Round weights one input feature after the other, those to come making up for the error of those before.

Effect: Linear weights become packed numbers of a low-bit format such that outputs on calibration texts move least.
Source: Frantar et al. 2022, arXiv:2210.17323, section 3, in the equivalent form of Chee et al. 2023, arXiv:2307.13304,
    section 3: with H = X^T X = U D U^T, U upper triangular with ones on its diagonal, feature k becomes the number
    nearest to W_k + sum over i < k of (W_i - Q_i) U_ik. We differ: one Cholesky factor and no inverse; features in the
    order of falling H_kk, but the scales of all groups are found before, in the range that loses least when squared
    errors are weighted by H_kk, so that a group stays what it is and no index is stored; damping is a share of each
    H_kk, not of their mean, so that scaling a channel and its weights changes nothing.
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
                form = spec.weight_format
                stored = (
                    self.rounded(weight, form)
                    if gram is None
                    else form.store(*solved(weight, gram, form, self.damping))
                )
                layers[name] = QuantizedLayer(spec, stored)
        return layers


def solved(weight: torch.Tensor, gram: torch.Tensor, form: WeightFormat, damping: float) -> tuple[torch.Tensor, Scales]:
    """Return codes [N, G, B] and scales [N, G, 1] of a weight [N, M] whose input has the Gram matrix `gram` [M, M]."""
    import torch

    from passes._formats import Scales, search_clip

    groups = form.grouped(weight)
    missing = groups.shape[1] * groups.shape[2] - len(gram)
    gram = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    importance = gram.diagonal()
    scales = search_clip(groups.flatten(1), form, importance)
    order = importance.argsort(descending=True, stable=True)
    of_groups = Scales(*(each[..., 0].T.contiguous() for each in scales))  # [G, N]
    feedback = unit_factor(gram, order, damping)
    codes = torch.empty(order.shape[0], len(weight))
    codes[order] = rounded_in_turn(
        groups.flatten(1).T[order].contiguous(), feedback, form, of_groups, order // groups.shape[2]
    )
    return codes.T.reshape(groups.shape), scales


def unit_factor(gram: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Return U [M, M] of `gram` = U D U^T, upper triangular with ones on its diagonal, after noise on each feature.

    Rows and columns of U are in `order`, an int64 permutation of the features.

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
    upper: torch.Tensor = lower.div_(lower.diagonal().clone()).float().flip(0, 1)
    return upper


def rounded_in_turn(
    weight: torch.Tensor, feedback: torch.Tensor, form: WeightFormat, scales: Scales, groups: torch.Tensor
) -> torch.Tensor:
    """Return codes [M, N] of a weight [M, N] by input feature, each rounded with the errors of those before added.

    `feedback` is U [M, M], `scales` are [G, N], and `groups` [M] says which of them a feature has.
    """
    import torch

    from passes._formats import Scales

    codes, error = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, len(weight), FEATURES):
        end = min(start + FEATURES, len(weight))
        corrected = torch.addmm(weight[start:end], feedback[:start, start:end].T, error[:start])
        inner = feedback[start:end, start:end].T.contiguous()
        for place, group in enumerate(groups[start:end].tolist()):
            own, now = Scales(scales.scale[group], scales.zero[group]), start + place
            value = torch.addmv(corrected[place], error[start:now].T, inner[place, :place])
            codes[now] = form.round(value, own)
            error[now] = weight[now] - form.value(codes[now], own)
    return codes
