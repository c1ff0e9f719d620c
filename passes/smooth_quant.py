"""Move the range of activations into the weights that read them, so that both suit 8 bits.

Effect: input channel j of a linear layer is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and its weights
    multiplied by it; the division is folded into the norm or linear layer before. The model computes what it did.
Source: Xiao et al. 2022, arXiv:2211.10438, equation 4. We differ: pairs are found by trying them (passes/_pairs.py), so
    value and output, up and down projections are among them; readers of one layer share its scales.
Changes: weights and biases of the layers in pairs, which become float32.   Keeps: the function, to 1e-5 of its range.
Cost: two forward passes over the calibration texts, one block in memory; a dozen runs of each block on one short text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from passes.base import TORCH, Context, Estimate, Model, Pass, PassError, PassResult, Stage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes._pairs import Found, Pair
    from passes._skeleton import Skeleton

TOLERANCE = 1e-5
"""Error of the answers over their range: the same products in float32, scaled (1e-6)."""
SMALLEST = 1e-5
"""Of a range, against nothing: a channel that is never used keeps its scale within bounds."""


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Pass):
    """Move the range of activations into the weights that read them, so that both suit 8 bits."""

    reads: ClassVar[Stage] = TORCH
    writes: ClassVar[Stage] = TORCH

    calibration: str = field(metadata={"help": "entry of `data` with texts that show the range", "names": "data"})
    alpha: float = field(default=0.5, metadata={"help": "how much of the range to move", "ge": 0, "le": 1})
    samples: int = field(default=128, metadata={"help": "most calibration texts", "ge": 1})
    context: int = field(default=512, metadata={"help": "tokens of a calibration text that are read", "ge": 2})
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "layers left alone, as glob patterns on names, such as '*.down_proj'"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: got {self.alpha}, expected 0 to 1")
        for name, least in (("samples", 1), ("context", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")

    def requires(self, model: Model) -> None:
        """Refuse patterns that name nothing, and models that are quantized already."""
        from passes._select import require_patterns_match
        from passes._skeleton import Skeleton

        skeleton = Skeleton(model)
        if skeleton.specs:
            raise PassError(f"{self.name()}: the model is quantized already; put {self.name()} before it")
        require_patterns_match(self.name(), self.exclude, skeleton.module)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count the linear layers inside the blocks, most of which have a pair; their tensors become float32."""
        from passes._outline import outline_float32, parameters_of, torch_bytes, walking_bytes
        from passes._pairs import is_linear
        from passes._skeleton import Skeleton, inside

        skeleton = Skeleton(model)
        linears = [
            name
            for name, module in skeleton.module.named_modules()
            if is_linear(module) and any(inside(name, block) for block in skeleton.blocks)
        ]
        after = outline_float32(model, ctx)
        return Estimate(
            matches=len(linears),
            bytes=torch_bytes(after),
            parameters=parameters_of(skeleton.module),
            peak_bytes=walking_bytes(after),
            model=after,
        )

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Find pairs and scales, then fold these in, part by part."""
        from passes._calibrate import few_texts_note
        from passes._pairs import find_pairs
        from passes._skeleton import Skeleton
        from passes._walk import run_blocks

        texts = ctx.calibration[self.calibration]
        skeleton = Skeleton(model)
        found = find_pairs(skeleton, texts[0])
        pairs = self._chosen(found)
        refused = [f"{layer}: {reason}" for layer, reason in found.refusals.items()]
        first = f"first refusal: {refused[0]}" if refused else "all are excluded"
        if not pairs:
            raise PassError(f"{self.name()}: matched none of {len(skeleton.blocks)} blocks; {first}")
        largest = _largest(skeleton, sorted({reader for pair in pairs for reader in pair.readers}), texts)
        result = run_blocks(partial(_fold, pairs, largest, self.alpha), model, ctx)
        readers = sum(len(pair.readers) for pair in pairs)
        changes = {"pairs_folded": len(pairs), "layers_smoothed": readers, "layers_left": len(refused)}
        notes = [first if refused else "", few_texts_note(texts)]
        return replace(result, changes=changes, note="; ".join(filter(None, notes)))

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that the answers are kept, and that no channel stands out of its layer's input as far as before."""
        from passes._pairs import find_pairs
        from passes._parity import Probe, range_error
        from passes._skeleton import Skeleton

        one, other = Skeleton(before), Skeleton(after)
        probe = Probe.random(before.config, ctx.seed)
        error = range_error(probe.walked(other), probe.walked(one))
        if not error <= TOLERANCE:
            raise PassError(f"{self.name()}: answers moved by {error:.1e} of their range, expected {TOLERANCE:.0e}")
        texts = ctx.calibration[self.calibration]
        readers = sorted({reader for pair in self._chosen(find_pairs(one, texts[0])) for reader in pair.readers})
        was, now = (_peak(_largest(skeleton, readers, texts)) for skeleton in (one, other))
        if not now <= was:
            raise PassError(
                f"{self.name()}: the largest channel is {now:.2f} times the mean one, {was:.2f} before; raise alpha"
            )

    def _chosen(self, found: Found) -> list[Pair]:
        """Return the pairs none of whose layers is excluded."""
        return [
            pair
            for pair in found.pairs
            if not any(fnmatchcase(n, pattern) for n in (pair.source, *pair.readers) for pattern in self.exclude)
        ]


def _largest(skeleton: Skeleton, layers: Sequence[str], texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return layer name -> largest magnitude of each feature of its input [M], over all tokens of all texts."""
    import torch

    from passes._calibrate import watch

    largest: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        peak = x.abs().flatten(0, -2).amax(0)
        largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

    watch(skeleton, layers, texts, see)
    return largest


def _peak(largest: Mapping[str, torch.Tensor]) -> float:
    """Return how far the largest channel stands out of a layer's input, over the mean one; mean of all layers."""
    return sum(float(each.max() / each.mean().clamp(min=SMALLEST)) for each in largest.values()) / len(largest)


def _fold(
    pairs: Sequence[Pair],
    largest: Mapping[str, torch.Tensor],
    alpha: float,
    part: str,
    module: PreTrainedModel,
    ctx: Context,
) -> dict[str, torch.Tensor]:
    """Return tensor name -> new values of the layers of one part; a layer may read one pair and be another's source."""
    from passes._pairs import fold, input_axis, output_width
    from passes._skeleton import inside

    new: dict[str, torch.Tensor] = {}
    for pair in (pair for pair in pairs if inside(pair.source, part)):
        columns = []
        for name in pair.readers:
            tensor = f"{name}.weight"
            weight = new[tensor] if tensor in new else module.get_parameter(tensor).float()
            columns.append(weight.abs().amax(1 - input_axis(module.get_submodule(name))))
        width = output_width(module.get_submodule(pair.source))
        scales = _scales(pair, [largest[name] for name in pair.readers], columns, width, alpha)
        fold(pair, scales, module.get_submodule, new)
    return new


def _scales(
    pair: Pair, inputs: Sequence[torch.Tensor], columns: Sequence[torch.Tensor], width: int, alpha: float
) -> torch.Tensor:
    """Return s [width] of the source, from largest magnitudes of its readers' inputs and weight columns, [M] each."""
    import torch

    def largest(each: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.stack(list(each)).amax(0)
        return torch.zeros(width).scatter_reduce(0, pair.channels, whole, "amax").clamp(min=SMALLEST)

    return largest(inputs) ** alpha / largest(columns) ** (1 - alpha)
