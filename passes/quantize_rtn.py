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
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from passes._formats import IntegerFormat, round_to_nearest
from passes.base import BlockPass, Context, Estimate, Model, PassError

if TYPE_CHECKING:
    from torch import nn

    from passes._quantized import LayerSpec, QuantizedLayer
    from passes._skeleton import Skeleton

WeightFormat = Literal["int8", "int4", "int2"]
GROUPS = (16, 32, 64, 128, 256)


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

    def __post_init__(self) -> None:
        if self.format == "int2" and self.activations == "int8" and self.group_size in (16, 256):
            raise ValueError(
                f"group_size: got {self.group_size}, expected 32, 64, 128 or channel: onnxruntime has no kernel that "
                "multiplies int2 weights by int8 activations in other groups"
            )

    def requires(self, model: Model) -> None:
        """Refuse patterns that name nothing, tied tables in two formats, and models without a matching layer."""
        from passes._skeleton import Skeleton

        skeleton = Skeleton(model)
        if skeleton.specs:
            raise PassError(f"{self.name()}: the model is quantized already; quantize each layer once")
        names = [name for name, _ in skeleton.module.named_modules()]
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PassError(f"{self.name()}: exclude pattern {pattern!r} matches no module; one is {names[-1]!r}")
        self._require_tables_agree(skeleton)
        if not self._chosen(skeleton.module):
            raise PassError(f"{self.name()}: matched none of {len(skeleton.blocks)} blocks: no nn.Linear in them")

    def estimate(self, model: Model) -> Estimate:
        """Count layers and bytes from the headers."""
        from math import prod

        from passes._skeleton import Skeleton

        skeleton = Skeleton(model)
        specs = self._chosen(skeleton.module)
        total = sum(entry.nbytes for entry in skeleton.entries.values())
        largest = 0
        for part in skeleton.outside() + skeleton.blocks:
            shapes = {stored: skeleton.entries[stored].shape for stored in skeleton.tensors(part).values()}
            largest = max(largest, sum(4 * prod(shape) for shape in shapes.values()))
        replaced = {skeleton.stored_name(f"{name}.weight"): spec for name, spec in specs.items()}
        for tensor, spec in replaced.items():
            entry = skeleton.entries[tensor]
            total += spec.format.bytes(entry.shape[0], entry.shape[1]) - entry.nbytes
        return Estimate(matches=len(specs), bytes=total, peak_bytes=3 * largest)

    def run_block(self, name: str, module: nn.Module, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Quantize every chosen layer of one part."""
        from passes._quantized import QuantizedLayer
        from passes._skeleton import inside

        layers = {}
        for layer, spec in self._chosen(module).items():
            if inside(layer, name):
                weight = module.get_parameter(f"{layer}.weight")
                layers[layer] = QuantizedLayer(spec, round_to_nearest(weight, spec.format))
        return layers

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that exactly the chosen layers are quantized and that every scale is finite and not zero."""
        import torch

        from passes._skeleton import Skeleton

        chosen, skeleton = set(self._chosen(Skeleton(before).module)), Skeleton(after)
        if set(skeleton.specs) != chosen:
            raise PassError(f"{self.name()}: quantized {len(skeleton.specs)} layers, expected {len(chosen)}")
        for layer in sorted(chosen):
            scales = skeleton.read(f"{layer}.scales")
            if not torch.isfinite(scales).all() or (scales == 0).any():
                raise PassError(
                    f"{self.name()}: {layer}: a scale is zero or not finite; its weights hold NaN or infinity"
                )

    def _chosen(self, module: nn.Module) -> dict[str, LayerSpec]:
        """Return module name -> spec of the layers to quantize, in the model's order."""
        from torch import nn

        from passes._quantized import LayerSpec
        from passes._skeleton import block_names, inside

        blocks = block_names(module)
        formats: dict[str, str] = {
            name: self.format
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and any(inside(name, block) for block in blocks)
        }
        formats |= self._tables(module)
        return {
            name: LayerSpec(self._format(name, chosen, module), self.activations)
            for name, chosen in formats.items()
            if chosen != "float" and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }

    def _format(self, name: str, chosen: str, module: nn.Module) -> IntegerFormat:
        """Return a layer's format; a table that is looked up by rows needs a group that divides its width."""
        form = IntegerFormat(_bits(chosen), self.group_size, self.symmetric)
        width = module.get_parameter(f"{name}.weight").shape[-1]
        if name not in self._tables(module) or width % form.block == 0:
            return form
        fitting = [group for group in GROUPS if group < form.block and width % group == 0]
        return replace(form, group_size=max(fitting)) if fitting else form

    def _tables(self, module: nn.Module) -> dict[str, str]:
        """Return module name -> format of the embedding and the head."""
        tables: dict[str, str] = {}
        for table, chosen in (
            (module.get_input_embeddings(), self.embedding),  # type: ignore[operator]
            (module.get_output_embeddings(), self.lm_head),  # type: ignore[operator]
        ):
            if table is not None:
                tables[next(name for name, child in module.named_modules() if child is table)] = chosen
        return tables

    def _require_tables_agree(self, skeleton: Skeleton) -> None:
        tables = self._tables(skeleton.module)
        tied = [name for name in tables if f"{name}.weight" in skeleton.ties]
        if len({tables[name] for name in tied}) > 1:
            raise PassError(
                f"{self.name()}: {' and '.join(tied)} share one tensor, got embedding: {self.embedding} and "
                f"lm_head: {self.lm_head}; give both the same format"
            )
        for name, spec in self._chosen(skeleton.module).items():
            width = skeleton.module.get_parameter(f"{name}.weight").shape[-1]
            if name in tables and width % spec.format.block:
                raise PassError(
                    f"{self.name()}: {name} has {width} features, which no group of {', '.join(map(str, GROUPS))} "
                    "divides; leave it in float"
                )


def _bits(chosen: str) -> Literal[2, 4, 8]:
    bits: dict[str, Literal[2, 4, 8]] = {"int2": 2, "int4": 4, "int8": 8}
    return bits[chosen]
