"""Scale the inputs that matter most up in the weights, then round to nearest.

Effect: input channel j of a linear layer is divided by s_j, its weights multiplied by it and rounded to nearest, in the
    range of each group that loses least; the division is folded into the norm or linear layer before.
Source: Lin et al. 2023, arXiv:2306.00978, section 3.2: s = x^a with the a of least output error, on a grid. We differ:
    x is the root mean square of a channel; s = x^a / w^(1 - a), w the mean of |W| over its group's largest, is tried
    too (as the authors' later code does); the error is that of the readers' outputs, from X^T X, on what blocks that
    are quantized already make of the texts; pairs are found by trying them (passes/_pairs.py), so that value and
    output, up and down projections are among them; the range is searched by mean squares of inputs.
Changes: `weight` of nn.Linear inside the blocks; norms and biases of the layers before them; `embedding` and `lm_head`
    by option.   Keeps: the function of the float model but for the rounding, shapes.
Cost: two forward passes over the calibration texts, and about twenty of one batch; memory of a block in float32, of M^2
    for each input of a linear layer, and of what the texts' hidden states take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes._quantizer import CalibratedQuantizer
from passes.base import Context

if TYPE_CHECKING:
    import torch

    from passes._blockwise import CalibratedBlock
    from passes._formats import WeightFormat
    from passes._pairs import Pair
    from passes._quantized import QuantizedLayer

STEPS = 20
"""Of the exponent, from 0 to 1."""
SMALLEST = 1e-4
"""Of a channel's magnitude over the mean one: what is hardly used keeps its scale within bounds."""


@dataclass(frozen=True, kw_only=True)
class QuantizeAwq(CalibratedQuantizer):
    """Scale the inputs that matter most up in the weights, then round to nearest."""

    is_layerwise: ClassVar[bool] = False

    def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer | torch.Tensor]:
        """Fold scales into the block's pairs one after the other, then clip and round its layers."""
        from passes._formats import round_to_nearest, search_clip
        from passes._gram import gram_matrices
        from passes._pairs import fold
        from passes._quantized import QuantizedLayer

        together = block.readers()
        grams = gram_matrices(block, [names[0] for names in together])
        grams = {name: grams[names[0]] for names in together if names[0] in grams for name in names}
        new: dict[str, torch.Tensor] = {}
        rows: dict[str, torch.Tensor] = {}
        columns: dict[str, torch.Tensor] = {}
        for pair in _usable(block, grams):
            readers = [
                Reader(new.get(f"{name}.weight", block.weight(name)), grams[name], block.specs[name].weight_format)
                for name in pair.readers
            ]
            scales = search_scales(readers, pair.channels, _width(block, pair))
            fold(pair, scales, block.layer, new)
            rows[pair.source] = 1 / scales
            columns |= dict.fromkeys(pair.readers, scales[pair.channels])
        layers: dict[str, QuantizedLayer | torch.Tensor] = {}
        for name, spec in block.specs.items():
            weight = new.pop(f"{name}.weight", block.weight(name))
            importance = _importance(grams.get(name), columns.get(name))
            clipped = search_clip(weight, spec.weight_format, importance)
            stored = round_to_nearest(weight, spec.weight_format, clipped)
            layers[name] = QuantizedLayer(spec, stored, rows.get(name), columns.get(name))
        return layers | new


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads scaled channels.

    Attributes:
        weight: float32 [N, M].
        gram: float32 [M, M], X^T X of its input.
        form: of the numbers that the weight becomes.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    form: WeightFormat

    def error(self, factors: torch.Tensor) -> float:
        """Return the squared error of the output when column j is rounded at `factors` [M] times its size."""
        from passes._formats import rounded
        from passes._gram import output_error

        restored = rounded(self.weight * factors, self.form).div_(factors)
        return output_error(restored.sub_(self.weight), self.gram)


def search_scales(readers: Sequence[Reader], channels: torch.Tensor, width: int) -> torch.Tensor:
    """Return the scales [width] of a source's channels by which its readers' outputs lose least.

    `channels` [M] says which channel each input feature of the readers is. Ones are returned where no scales are better
    than none.
    """
    import torch

    best = torch.ones(width)
    least = sum(reader.error(best[channels]) for reader in readers)
    for scales in _candidates(readers, channels, width):
        error = sum(reader.error(scales[channels]) for reader in readers)
        if error < least:
            best, least = scales, error
    return best


def _candidates(readers: Sequence[Reader], channels: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Yield scales whose least and largest are each other's inverse."""
    inputs = _by_channel([reader.gram.diagonal() for reader in readers], channels, width).sqrt()
    weights = _by_channel([_shares(reader.weight, reader.form) for reader in readers], channels, width)
    inputs, weights = ((each / each.mean()).clamp(min=SMALLEST) for each in (inputs, weights))
    for step in range(STEPS + 1):
        alpha = step / STEPS
        for scales in (inputs**alpha, inputs**alpha / weights ** (1 - alpha)):
            yield scales / (scales.max() * scales.min()).sqrt()


def _by_channel(values: Sequence[torch.Tensor], channels: torch.Tensor, width: int) -> torch.Tensor:
    """Return the mean of the values, each [M], that are of one channel [width]; 1 where there is none."""
    import torch

    mean = torch.stack(list(values)).mean(0)
    return torch.ones(width).scatter_reduce(0, channels, mean, "mean", include_self=False)


def _shares(weight: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Return how large the weights of an input feature are beside the largest of their groups, mean of a column [M]."""
    groups = form.grouped(weight).abs()
    largest = groups.amax(-1, keepdim=True)
    return (groups / largest.clamp(min=1e-30)).flatten(1)[:, : weight.shape[1]].mean(0)


def _usable(block: CalibratedBlock, grams: Mapping[str, torch.Tensor]) -> list[Pair]:
    """Return the block's pairs all of whose linear layers are quantized, and read by tokens."""
    from passes._pairs import pairs_of_block

    args, options = block.batches[0]
    found = pairs_of_block(block.name, block.module, args, options).pairs
    taken = block.specs.keys()
    return [
        pair
        for pair in found
        if all(name in grams for name in pair.readers) and (pair.gain_offset is not None or pair.source in taken)
    ]


def _width(block: CalibratedBlock, pair: Pair) -> int:
    from passes._pairs import output_width

    return output_width(block.layer(pair.source))


def _importance(gram: torch.Tensor | None, factors: torch.Tensor | None) -> torch.Tensor | None:
    """Return the sum of squares of each input feature [M], once it is divided by its factors."""
    if gram is None or factors is None:
        return None if gram is None else gram.diagonal()
    return gram.diagonal() / factors.square()
