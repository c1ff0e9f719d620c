"""Learn whether to round up or down, and the range of each group, block after block.

Effect: weights become low-bit numbers such that each block puts out what it would in the float model.
Source: Cheng et al. 2023, arXiv:2309.05516, section 3: W / s + V is rounded, V in [-0.5, 0.5] and the ends of the range
    shrunk by alpha and beta, all moved by the sign of their gradient (the rounding passes it straight through), in
    steps that fall linearly to zero from 1 / their number; the best step is kept. We differ: ranges begin where the
    search by mean squares of inputs leaves them; the loss of a step is told beside that of the beginning on the same
    texts, so that easy texts do not choose the best; texts of one length are learned from together.
Changes: `weight` of nn.Linear inside the blocks; `embedding` and `lm_head` by option.   Keeps: biases, norms, shapes.
Cost: for each block `steps` passes forward and backward over `batch` texts, and four forward over all; memory of a
    block in float32 eight times, and of the texts' hidden states three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from passes._quantizer import CalibratedQuantizer
from passes.base import Context, Model, PassResult

if TYPE_CHECKING:
    import torch

    from passes._blockwise import CalibratedBlock
    from passes._formats import Scales, WeightFormat
    from passes._quantized import QuantizedLayer

Loss = Callable[[Sequence[int], Mapping[str, "torch.Tensor"]], "torch.Tensor"]
"""Of what a block puts out on some of its batches with some weights, by layer."""

LARGEST_OFFSET = 0.5
"""Of V: a value may become the number beside the nearest one."""
SMALLEST_SHARE = 0.1
"""Of its range that a group keeps: none would leave no scale."""


@dataclass(frozen=True, kw_only=True)
class QuantizeAutoround(CalibratedQuantizer):
    """Learn whether to round up or down, and the range of each group, block after block."""

    steps: int = field(default=200, metadata={"help": "of learning, for each block", "ge": 1})
    batch: int = field(default=4, metadata={"help": "texts that a step is taken on, or a few more", "ge": 1})
    precision: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={"help": "of matrix products while learning; bfloat16 is faster where the processor has it"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Walk over the blocks, each on what those before it make of the texts, as quantized and as they were."""
        from passes._blockwise import run_calibrated

        texts = ctx.calibration[self.calibration]
        tokens = self.batch * self.context
        return self.noted(run_calibrated(self, self.quantize_block, texts, model, ctx, originals_of=tokens))

    def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Learn the rounding of all layers of the block together; round to nearest what is no better for it."""
        import torch

        from passes._formats import round_to_nearest, rounded
        from passes._quantized import QuantizedLayer

        squares = block.squares()
        roundings = {
            name: Rounding(block.weight(name), spec.weight_format, squares.get(name))
            for name, spec in block.specs.items()
        }
        loss = _loss_of(block, self.precision)
        generator = torch.Generator().manual_seed(ctx.seed)
        draws = _draws([args[0].shape[0] for args, _ in block.batches], self.batch, generator)
        learned = learn(roundings, loss, len(block.batches), draws, self.steps)
        forms = {name: (block.weight(name), spec.weight_format) for name, spec in block.specs.items()}
        nearest = {name: rounded(weight, form) for name, (weight, form) in forms.items()}
        if learned < sum(float(loss([batch], nearest)) for batch in range(len(block.batches))):
            stored = {name: each.stored() for name, each in roundings.items()}
        else:
            stored = {name: round_to_nearest(weight, form) for name, (weight, form) in forms.items()}
        return {name: QuantizedLayer(block.specs[name], each) for name, each in stored.items()}


class Rounding:
    """How the weight of one layer is rounded, with what is learned of it.

    Attributes:
        offset: V, float32 [N, G, B], in numbers of the grid.
        low, high: alpha and beta, float32 [N, G, 1]: shares of a group's least and greatest value.
    """

    def __init__(self, weight: torch.Tensor, form: WeightFormat, importance: torch.Tensor | None) -> None:
        """Begin with the nearest numbers in the range that loses least, by `importance` [M] of the input features."""
        import torch

        from passes._formats import search_clip

        self.form, self._features = form.for_weight(weight), weight.shape[1]
        self._groups = self.form.grouped(weight)
        self._least = self._groups.amin(-1, keepdim=True).clamp(max=0)
        self._greatest = self._groups.amax(-1, keepdim=True).clamp(min=0)
        share = search_clip(weight, form, importance).scale / self.form.fit(self._groups).scale
        self._limit = share.clamp(min=1)
        self.offset = torch.zeros_like(self._groups, requires_grad=True)
        self.low, self.high = (share.clone().requires_grad_() for _ in range(2))

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Return what is learned."""
        return self.offset, self.low, self.high

    def weight(self) -> torch.Tensor:
        """Return the rounded weight [N, M]; its gradient passes the rounding, but not the ends of the grid."""
        import torch

        scales = self._scales()
        steps = self._groups / scales.scale + self.offset
        with torch.no_grad():
            first, last = (self._numbers(end * scales.scale, scales) for end in (-1e30, 1e30))
            numbers = self._numbers(steps * scales.scale, scales)
        steps = steps.clamp(torch.minimum(first, last), torch.maximum(first, last))
        straight = steps + (numbers - steps).detach()
        return (straight * scales.scale).flatten(1)[:, : self._features]

    def move(self, gradients: Sequence[torch.Tensor | None], rate: float) -> None:
        """Take a step of length `rate` against the signs of the gradients."""
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient.sign_(), alpha=rate)
        self.offset.clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)
        for share in (self.low, self.high):
            share.clamp_(min=SMALLEST_SHARE).copy_(share.minimum(self._limit))

    def stored(self) -> dict[str, torch.Tensor]:
        """Return what is stored of the rounded weight."""
        scales = self._scales()
        steps = self._groups / scales.scale + self.offset
        return self.form.store(self.form.round(steps * scales.scale, scales), scales)

    def _scales(self) -> Scales:
        """Return the scales of the range that is left; those that are stored, with the gradient of the range."""
        import torch

        from passes._formats import Scales

        least, greatest = self._least * self.low, self._greatest * self.high
        with torch.no_grad():
            scale, zero = self.form.fit(torch.cat([least, greatest], -1))
        is_centred = getattr(self.form, "symmetric", True)
        reach = (torch.maximum(greatest, -least) if is_centred else greatest - least).clamp(min=1e-30)
        return Scales(scale * (reach / reach.detach()), zero)

    def _numbers(self, values: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Return the numbers of the grid nearest to `values`, as multiples of the scale."""
        return self.form.value(self.form.round(values, scales), scales) / scales.scale


def learn(roundings: Mapping[str, Rounding], loss: Loss, batches: int, draws: Iterator[list[int]], steps: int) -> float:
    """Move roundings by so many steps to where the loss is least, leave them at the best or the last; return that loss.

    A step's loss is compared with that of the beginning on the same batches, the two with each other on all.
    """
    import torch

    parameters = [parameter for each in roundings.values() for parameter in each.parameters()]

    def on(drawn: Sequence[int]) -> torch.Tensor:
        return loss(drawn, {name: each.weight() for name, each in roundings.items()})

    def whole() -> list[float]:
        return [float(on([batch])) for batch in range(batches)]

    with torch.no_grad():
        before, least = whole(), 1.0
        best = [parameter.clone() for parameter in parameters]
        for step in range(steps):
            drawn = next(draws)
            with torch.enable_grad():
                now = on(drawn)
                gradients = torch.autograd.grad(now, parameters, allow_unused=True)
            share = float(now) / max(sum(before[batch] for batch in drawn), 1e-30)
            if share < least:
                least = share
                torch._foreach_copy_(best, parameters)
            rate = (1 - step / steps) / steps
            for place, each in enumerate(roundings.values()):
                each.move(gradients[3 * place : 3 * place + 3], rate)
        last, ended = [parameter.clone() for parameter in parameters], sum(whole())
        torch._foreach_copy_(parameters, best)
        reached = sum(whole())
        if reached <= ended:
            return reached
        torch._foreach_copy_(parameters, last)
        return ended


def _draws(sizes: Sequence[int], texts: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield, for ever, batches that have so many texts together; each comes once before any comes again."""
    import torch

    drawn: list[int] = []
    while True:
        for batch in torch.randperm(len(sizes), generator=generator).tolist():
            drawn.append(batch)
            if sum(sizes[each] for each in drawn) >= min(texts, sum(sizes)):
                yield drawn
                drawn = []


def _loss_of(block: CalibratedBlock, precision: str) -> Loss:
    """Return the squared error of what the block puts out, as a function of batches and weights."""
    import torch
    from torch.func import functional_call

    targets = [target.clone() for target in block.targets()]
    whole = torch.nn.Module()
    whole.add_module("block", block.module)
    whole.forward = block.module.forward  # not the block itself, on the way into which texts stop

    def loss(batches: Sequence[int], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        named = {f"block{name.removeprefix(block.name)}.weight": weight for name, weight in weights.items()}
        total = torch.zeros(())
        for batch in batches:
            args, options = block.batches[batch]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                out: Any = functional_call(whole, named, args, dict(options))
            out = out if isinstance(out, torch.Tensor) else out[0]
            total = total + (out.float() - targets[batch]).square().sum()
        return total

    return loss
