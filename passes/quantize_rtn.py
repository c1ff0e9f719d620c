"""Round weights to the nearest number of a low-bit format.

Effect: Linear weights (and, if asked, embedding and head) become packed integers with one scale per group.
Source: round-to-nearest, the baseline of Frantar et al. 2022, arXiv:2210.17323, section 2. We differ: the symmetric
    form maps the value of largest magnitude to the most negative integer, so that all 2^bits values are used. `clip`
    looks for the range of each group that loses least: of the weights (mse), or of what they are multiplied by
    (importance), as the clip search of Lin et al. 2023, arXiv:2306.00978, section 4, does for whole outputs.
Changes: `weight` of nn.Linear inside the blocks; `embedding` and `lm_head` by option.   Keeps: biases, norms, shapes.
Cost: one read of the weights; memory of the largest block or embedding table in float32. `importance`: two forward
    passes over the calibration texts besides, one block in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from passes._quantizer import Quantizer, require_texts
from passes.base import Context, Estimate, Model, PassResult

if TYPE_CHECKING:
    import torch

    from passes._blockwise import CalibratedBlock
    from passes._formats import WeightFormat
    from passes._quantized import QuantizedLayer


@dataclass(frozen=True, kw_only=True)
class QuantizeRtn(Quantizer):
    """Round weights to the nearest number of a low-bit format."""

    clip: Literal["none", "mse", "importance"] = field(
        default="none",
        metadata={"help": "range of a group: whole, or the one that loses least, of weights or of what they multiply"},
    )
    calibration: str | None = field(
        default=None, metadata={"help": "entry of `data` with texts, for clip: importance", "names": "data"}
    )
    samples: int = field(default=128, metadata={"help": "most calibration texts", "ge": 1})
    context: int = field(default=512, metadata={"help": "tokens of a calibration text that are read", "ge": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_texts(self.samples, self.context)
        if self.clip == "importance" and self.calibration is None:
            raise ValueError("calibration: got none, expected an entry of `data`, for clip: importance")
        if self.clip != "importance" and self.calibration is not None:
            raise ValueError(
                f"calibration: got {self.calibration!r} for clip: {self.clip}, expected it with importance"
            )

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers."""
        from passes._blockwise import calibrated_bytes

        estimate = super().estimate(model, ctx)
        if self.calibration is None:
            return estimate
        return replace(estimate, peak_bytes=calibrated_bytes(model, self.samples * self.context))

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Walk over the parts; note what has to stay in float."""
        from passes._blockwise import run_calibrated

        if self.calibration is None:
            return super().run(model, ctx)
        texts = ctx.calibration[self.calibration]
        return self.noted(run_calibrated(self, self._round_block, texts, model, ctx))

    def rounded(self, weight: torch.Tensor, form: WeightFormat) -> dict[str, torch.Tensor]:
        """Return what is stored of a weight [N, M] that no calibration text tells of."""
        from passes._formats import round_to_nearest, search_clip

        return round_to_nearest(weight, form, None if self.clip == "none" else search_clip(weight, form))

    def _round_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Round the layers of one block, in the range that loses least of what they are multiplied by."""
        from passes._formats import round_to_nearest, search_clip
        from passes._quantized import QuantizedLayer

        squares, layers = block.squares(), {}
        for name, spec in block.specs.items():
            weight, form = block.weight(name), spec.weight_format
            scales = search_clip(weight, form, squares.get(name))
            layers[name] = QuantizedLayer(spec, round_to_nearest(weight, form, scales))
        return layers
