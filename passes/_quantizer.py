"""What all weight quantizers share: which layers become which numbers, and what is promised of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from passes._override import FloatName, FormatName, Group, LayerFormat, Override
from passes.base import BlockPass, Context, Estimate, Model, PassResult

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes._blockwise import CalibratedBlock
    from passes._formats import WeightFormat
    from passes._quantized import LayerSpec, QuantizedLayer
    from passes._select import Selection


@dataclass(frozen=True, kw_only=True)
class Quantizer(BlockPass):
    """Turns the weights of linear layers, and if asked of the tables, into numbers of few bits."""

    format: FormatName = field(
        default="int4", metadata={"help": "integers, or floats of 4 or 8 bits, that Linear weights become"}
    )
    group_size: Group = field(
        default=32,
        metadata={
            "help": "input features that share a scale; channel: all of an output's; nvfp4 always has 16, mxfp4 32"
        },
    )
    symmetric: bool = field(default=True, metadata={"help": "no zero points: values are centred on zero"})
    activations: Literal["int8", "float"] = field(
        default="int8", metadata={"help": "precision of the other factor; int8 is what fast CPU kernels multiply"}
    )
    embedding: Literal["float", "int8", "int4"] = field(
        default="float",
        metadata={
            "help": "format of the token embedding; tied to lm_head, both must agree; its group divides its width"
        },
    )
    lm_head: Literal["float", "int8", "int4"] = field(default="float", metadata={"help": "format of the output head"})
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "layers left alone, as glob patterns on names, such as '*.down_proj'"}
    )
    overrides: tuple[Override, ...] = field(
        default=(),
        metadata={
            "help": "layers in another format, each entry `{layers: PATTERNS, format: float or a format}`; the "
            "first entry that names a layer decides, `exclude` before all"
        },
    )

    def __post_init__(self) -> None:
        groups = {group for form, group in self.given_formats() if form == "int2" and self.activations == "int8"}
        for group in groups & {16, 256}:
            raise ValueError(
                f"group_size: got {group}, expected 32, 64, 128 or channel: onnxruntime has no kernel that "
                "multiplies int2 weights by int8 activations in other groups"
            )
        formats = {form for form, _ in self.given_formats()}
        if not self.symmetric and (floats := sorted(formats & {*get_args(FloatName)})):
            raise ValueError(f"symmetric: got false, expected true: {' and '.join(floats)} have no zero points")
        if "fp8" in formats and self.activations == "int8":
            raise ValueError(
                "activations: got int8, expected float: no kernel multiplies fp8 weights by int8 activations"
            )

    def requires(self, model: Model) -> None:
        """Refuse patterns that name nothing, tied tables in two formats, and models without a matching layer."""
        self._selection().require(model)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers."""
        return self._selection().estimate(model, ctx)

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Walk over the parts; note what has to stay in float."""
        return self.noted(super().run(model, ctx))

    def run_block(self, name: str, module: PreTrainedModel, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Round every chosen layer of one part to nearest."""
        from passes._errors import weight_error
        from passes._quantized import QuantizedLayer

        layers = {}
        for layer, spec in self.chosen(name, module).items():
            weight = module.get_parameter(f"{layer}.weight")
            if weight.is_meta:  # tied, and stored with the part that owns it
                layers[layer] = QuantizedLayer(spec, {})
                continue
            stored = self.rounded(weight, spec.weight_format)
            layers[layer] = QuantizedLayer(spec, stored, error=weight_error(weight, spec, stored))
        return layers

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that exactly the chosen layers are quantized and that every scale is finite and not zero."""
        self._selection().ensure(before, after)

    def rounded(self, weight: torch.Tensor, form: WeightFormat) -> dict[str, torch.Tensor]:
        """Return what is stored of a weight [N, M] that no calibration text tells of."""
        from passes._formats import round_to_nearest

        return round_to_nearest(weight, form)

    def given_formats(self) -> list[tuple[LayerFormat, Group]]:
        """Return the formats, and their groups, that the recipe gives layers."""
        return [
            (self.format, self.group_size),
            *((each.format, each.group_size or self.group_size) for each in self.overrides),
        ]

    def chosen(self, part: str, module: PreTrainedModel) -> dict[str, LayerSpec]:
        """Return module name -> spec of the layers of one part that are to be quantized."""
        from passes._skeleton import inside

        return {layer: spec for layer, spec in self._selection().specs(module).items() if inside(layer, part)}

    def noted(self, result: PassResult) -> PassResult:
        """Say what has to stay in float, and which layers are furthest off."""
        from passes._errors import errors_note, read_errors
        from passes._skeleton import build_module

        notes = [self._selection().note(build_module(result.model.config, "sdpa"))]
        notes.append(errors_note(read_errors(result.model.folder)))
        return replace(result, note="; ".join(filter(None, notes)))

    def _selection(self) -> Selection:
        from passes._select import Selection

        linear, embedding, lm_head = (self._spec(each) for each in (self.format, self.embedding, self.lm_head))
        assert linear is not None
        overrides = tuple(
            (pattern, self._spec(each.format, each.group_size)) for each in self.overrides for pattern in each.patterns
        )
        return Selection(self.name(), linear, embedding, lm_head, self.exclude, overrides)

    def _spec(self, chosen: LayerFormat, group: Group | None = None) -> LayerSpec | None:
        from passes._float_formats import format_named
        from passes._quantized import LayerSpec

        if chosen == "float":
            return None
        return LayerSpec(format_named(chosen, group or self.group_size, self.symmetric), self.activations)


@dataclass(frozen=True, kw_only=True)
class CalibratedQuantizer(Quantizer):
    """A quantizer that looks at what the layers of a block are multiplied by, on texts; tables are only clipped."""

    calibration: str = field(metadata={"help": "entry of `data` with texts that layers are tried on", "names": "data"})
    samples: int = field(default=128, metadata={"help": "most calibration texts", "ge": 1})
    context: int = field(default=512, metadata={"help": "tokens of a calibration text that are read", "ge": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_texts(self.samples, self.context)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers, and the memory of as many texts as it may be given."""
        from passes._blockwise import calibrated_bytes

        peak = calibrated_bytes(model, self.samples * self.context)
        return replace(super().estimate(model, ctx), peak_bytes=peak)

    @abstractmethod
    def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer | torch.Tensor]:
        """Return module name -> quantized layer for those of `block.specs`; tensor name -> new values of others.

        The weights of the block's module may be changed on the way.
        """

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Walk over the blocks, each on what those before it, quantized, make of the texts."""
        from passes._blockwise import run_calibrated

        texts = ctx.calibration[self.calibration]
        return self.noted(run_calibrated(self, self.quantize_block, texts, model, ctx))

    def rounded(self, weight: torch.Tensor, form: WeightFormat) -> dict[str, torch.Tensor]:
        """Return what is stored of a weight [N, M] that no calibration text tells of."""
        from passes._formats import round_to_nearest, search_clip

        return round_to_nearest(weight, form, search_clip(weight, form))


def require_texts(samples: int, context: int) -> None:
    """Refuse a number of texts, or of their tokens, that is too small."""
    for name, got, least in (("samples", samples, 1), ("context", context, 2)):
        if got < least:
            raise ValueError(f"{name}: got {got}, expected at least {least}")
