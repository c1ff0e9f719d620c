"""Round weights to the nearest integer of a low-bit format.

Effect: Linear weights (and, if asked, embedding and head) become packed integers with one scale per group.
Source: round-to-nearest, the baseline of Frantar et al. 2022, arXiv:2210.17323, section 2. We differ: the symmetric
    form maps the value of largest magnitude to the most negative integer, so that all 2^bits values are used.
Changes: `weight` of nn.Linear inside the blocks; `embedding` and `lm_head` by option.   Keeps: biases, norms, shapes.
Cost: one read of the weights; memory of the largest block or embedding table in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from passes._override import LayerFormat, Override
from passes.base import BlockPass, Context, Estimate, Model, PassResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._quantized import LayerSpec, QuantizedLayer
    from passes._select import Selection

WeightFormat = Literal["int8", "int4", "int2"]


@dataclass(frozen=True, kw_only=True)
class QuantizeRtn(BlockPass):
    """Round weights to the nearest integer of a low-bit format."""

    format: WeightFormat = field(default="int4", metadata={"help": "integers that Linear weights become"})
    group_size: Literal[16, 32, 64, 128, 256, "channel"] = field(
        default=32, metadata={"help": "input features that share a scale; channel: all of an output's"}
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
            "help": "layers in another format, each entry `{layers: PATTERNS, format: float, int8, int4 or int2}`; the "
            "first entry that names a layer decides, `exclude` before all"
        },
    )

    def __post_init__(self) -> None:
        formats = {self.format, *(override.format for override in self.overrides)}
        if "int2" in formats and self.activations == "int8" and self.group_size in (16, 256):
            raise ValueError(
                f"group_size: got {self.group_size}, expected 32, 64, 128 or channel: onnxruntime has no kernel that "
                "multiplies int2 weights by int8 activations in other groups"
            )

    def requires(self, model: Model) -> None:
        """Refuse patterns that name nothing, tied tables in two formats, and models without a matching layer."""
        self._selection().require(model)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers."""
        return self._selection().estimate(model, ctx)

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Walk over the parts; note what has to stay in float."""
        from passes._skeleton import build_module

        return replace(super().run(model, ctx), note=self._selection().note(build_module(model.config, "sdpa")))

    def run_block(self, name: str, module: PreTrainedModel, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Quantize every chosen layer of one part."""
        from passes._formats import IntegerFormat, round_to_nearest
        from passes._quantized import QuantizedLayer
        from passes._skeleton import inside

        layers = {}
        for layer, spec in self._selection().specs(module).items():
            if inside(layer, name):
                weight, form = module.get_parameter(f"{layer}.weight"), spec.format
                assert isinstance(form, IntegerFormat)
                layers[layer] = QuantizedLayer(spec, round_to_nearest(weight, form))
        return layers

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that exactly the chosen layers are quantized and that every scale is finite and not zero."""
        self._selection().ensure(before, after)

    def _selection(self) -> Selection:
        from passes._select import Selection

        linear, embedding, lm_head = (self._spec(each) for each in (self.format, self.embedding, self.lm_head))
        assert linear is not None
        overrides = tuple((pattern, self._spec(each.format)) for each in self.overrides for pattern in each.patterns)
        return Selection(self.name(), linear, embedding, lm_head, self.exclude, overrides)

    def _spec(self, chosen: LayerFormat) -> LayerSpec | None:
        from passes._formats import IntegerFormat
        from passes._quantized import LayerSpec

        if chosen == "float":
            return None
        return LayerSpec(IntegerFormat(_bits(chosen), self.group_size, self.symmetric), self.activations)


def _bits(chosen: LayerFormat) -> Literal[2, 4, 8]:
    bits: dict[LayerFormat, Literal[2, 4, 8]] = {"int2": 2, "int4": 4, "int8": 8}
    return bits[chosen]
