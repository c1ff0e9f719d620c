"""Round weights and activations to 8-bit integers that one kernel multiplies.

Effect: nn.Linear layers multiply uint8 activations by int8 weights, one scale per output feature. Activations are
    rounded by the largest magnitude of their row (`row`), or by a range found beforehand on calibration texts
    (`static`).
Source: Jacob et al. 2018, arXiv:1712.05877, section 2; Dettmers et al. 2022, arXiv:2208.07339, section 2.1, for one
    scale per row. Ranges: passes/_calibrate.py. We differ: a layer's output stays float32.
Changes: `weight` of nn.Linear inside the blocks; `embedding` and `lm_head` by option.   Keeps: biases, norms, shapes.
Cost: one read of the weights; `static` one forward pass over the calibration texts before, one block in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from passes.base import BlockPass, Context, Estimate, Model, PassError, PassResult

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes._quantized import LayerSpec, QuantizedLayer
    from passes._select import Selection

RANGES = "ranges.json"
TABLE_GROUP = 64
"""Of the tables: larger groups make the last of an odd number of rows differ in its last bit (onnxruntime 1.31)."""


@dataclass(frozen=True, kw_only=True)
class QuantizeInt8(BlockPass):
    """Round weights and activations to 8-bit integers that one kernel multiplies."""

    activations: Literal["row", "static"] = field(
        default="row", metadata={"help": "range of activations: of each row as it comes, or one found beforehand"}
    )
    calibration: str | None = field(
        default=None, metadata={"help": "entry of `data` with texts that show the range, for static", "names": "data"}
    )
    calibrator: Literal["minmax", "entropy", "percentile", "mse"] | None = field(
        default=None, metadata={"help": "how static finds the range; mse if not given"}
    )
    samples: int = field(default=128, metadata={"help": "most calibration texts", "ge": 1})
    context: int = field(default=512, metadata={"help": "tokens of a calibration text that are read", "ge": 2})
    embedding: Literal["float", "int8"] = field(
        default="float", metadata={"help": "format of the token embedding; tied to lm_head, both must agree"}
    )
    lm_head: Literal["float", "int8"] = field(default="float", metadata={"help": "format of the output head"})
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "layers left alone, as glob patterns on names, such as '*.down_proj'"}
    )

    def __post_init__(self) -> None:
        if self.activations == "static" and self.calibration is None:
            raise ValueError("calibration: got none, expected an entry of `data`, for activations: static")
        for name in ("calibration", "calibrator"):
            if self.activations == "row" and getattr(self, name) is not None:
                raise ValueError(f"{name}: got {getattr(self, name)!r} for activations: row, expected it with static")
        for name, least in (("samples", 1), ("context", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")

    def requires(self, model: Model) -> None:
        """Refuse patterns that name nothing, tied tables in two formats, and models without a matching layer."""
        self._selection().require(model)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers."""
        return self._selection().estimate(model, ctx)

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Find the ranges of static activations, then walk over the parts; note what has to stay in float."""
        from passes._calibrate import few_texts_note
        from passes._skeleton import build_module

        ranges, notes = ctx.workdir / RANGES, [self._selection().note(build_module(model.config, "sdpa"))]
        if self.calibration is not None:
            texts = ctx.calibration[self.calibration]
            notes.append(few_texts_note(texts))
            if not ranges.exists():
                _write_ranges(ranges, self._ranges(model, texts))
        return replace(super().run(model, ctx), note="; ".join(filter(None, notes)))

    def run_block(self, name: str, module: PreTrainedModel, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Quantize every chosen layer of one part."""
        from passes._formats import ChannelFormat, round_channels, round_to_nearest
        from passes._quantized import QuantizedLayer
        from passes._skeleton import inside

        ranges = _read_ranges(ctx.workdir / RANGES)
        layers = {}
        for layer, spec in self._selection().specs(module).items():
            if inside(layer, name):
                weight, form = module.get_parameter(f"{layer}.weight"), spec.format
                stored = round_channels(weight) if isinstance(form, ChannelFormat) else round_to_nearest(weight, form)
                layers[layer] = QuantizedLayer(spec, stored | ranges.get(layer, {}))
        return layers

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that exactly the chosen layers are quantized, and that every scale is finite and not zero."""
        from math import isfinite

        from passes._skeleton import Skeleton

        self._selection().ensure(before, after)
        skeleton = Skeleton(after)
        for layer, spec in skeleton.specs.items():
            if spec.activations == "static":
                scale = float(skeleton.read(f"{layer}.input_scale"))
                if not (isfinite(scale) and scale > 0):
                    raise PassError(f"{self.name()}: {layer}: got the input scale {scale}, expected one above zero")

    def _ranges(self, model: Model, texts: Sequence[Sequence[int]]) -> dict[str, tuple[float, int]]:
        """Return layer name -> scale and zero point of its input."""
        from passes._calibrate import CALIBRATORS, observe
        from passes._skeleton import Skeleton

        skeleton = Skeleton(model)
        specs = self._selection().specs(skeleton.module)
        static = [name for name, spec in specs.items() if spec.activations == "static"]
        find = CALIBRATORS[self.calibrator or "mse"]
        return {name: find(seen).affine() for name, seen in observe(skeleton, static, texts).items()}

    def _selection(self) -> Selection:
        from passes._formats import ChannelFormat
        from passes._quantized import LayerSpec
        from passes._select import Selection

        linear = LayerSpec(ChannelFormat(), self.activations)
        return Selection(self.name(), linear, _table(self.embedding), _table(self.lm_head), self.exclude)


def _table(chosen: str) -> LayerSpec | None:
    """Return the spec of a table: integers in groups, as kernels that look rows up read them."""
    from passes._formats import IntegerFormat
    from passes._quantized import LayerSpec

    return None if chosen == "float" else LayerSpec(IntegerFormat(8, TABLE_GROUP), "int8")


def _write_ranges(path: Path, ranges: Mapping[str, tuple[float, int]]) -> None:
    from passes._files import atomic_write

    atomic_write(path, (json.dumps(ranges, indent=1) + "\n").encode())


def _read_ranges(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return layer name -> the tensors that hold its scale and zero point; empty without a file."""
    import torch

    if not path.exists():
        return {}
    return {
        layer: {"input_scale": torch.tensor(scale), "input_zero_point": torch.tensor(zero, dtype=torch.uint8)}
        for layer, (scale, zero) in json.loads(path.read_text()).items()
    }
