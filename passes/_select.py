"""Which layers a quantizer takes: the rules that all quantizers share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from passes._formats import IntegerFormat
from passes._quantized import LayerSpec
from passes._skeleton import Skeleton, block_names, inside
from passes.base import Estimate, Model, PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Selection:
    """The layers that a quantizer takes, and what each becomes.

    Attributes:
        step: name of the pass, for messages.
        linear: of every nn.Linear inside the blocks.
        embedding, lm_head: of the token embedding and the output head; None leaves them in float.
        exclude: glob patterns on the names of layers that are left alone.
    """

    step: str
    linear: LayerSpec
    embedding: LayerSpec | None
    lm_head: LayerSpec | None
    exclude: tuple[str, ...]

    def specs(self, module: PreTrainedModel) -> dict[str, LayerSpec]:
        """Return module name -> spec of the layers to quantize, in the model's order."""
        blocks = block_names(module)
        chosen: dict[str, LayerSpec | None] = {
            name: self.linear
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and any(inside(name, block) for block in blocks)
        }
        chosen |= {name: _fitted(spec, _width(module, name)) for name, spec in self._tables(module).items()}
        return {
            name: spec
            for name, spec in chosen.items()
            if spec is not None and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }

    def require(self, model: Model) -> None:
        """Refuse patterns that name nothing, tied tables in two formats, and models without a matching layer."""
        skeleton = Skeleton(model)
        if skeleton.specs:
            raise PassError(f"{self.step}: the model is quantized already; quantize each layer once")
        require_patterns_match(self.step, self.exclude, skeleton.module)
        self._require_tables_agree(skeleton)
        if not self.specs(skeleton.module):
            reason = "all are excluded" if replace(self, exclude=()).specs(skeleton.module) else "no nn.Linear in them"
            raise PassError(f"{self.step}: matched none of {len(skeleton.blocks)} blocks: {reason}")

    def estimate(self, model: Model) -> Estimate:
        """Count layers and bytes from the headers."""
        skeleton = Skeleton(model)
        specs = self.specs(skeleton.module)
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

    def ensure(self, before: Model, after: Model) -> None:
        """Check that exactly the chosen layers are quantized, and that every scale is finite and not zero."""
        chosen, skeleton = self.specs(Skeleton(before).module), Skeleton(after)
        if skeleton.specs != chosen:
            raise PassError(f"{self.step}: quantized {len(skeleton.specs)} layers, expected {len(chosen)}")
        for layer in sorted(chosen):
            scales = skeleton.read(f"{layer}.scales")
            if not torch.isfinite(scales).all() or (scales == 0).any():
                raise PassError(
                    f"{self.step}: {layer}: a scale is zero or not finite; its weights hold NaN or infinity"
                )

    def note(self, module: nn.Module) -> str:
        """Say which weights no quantizer can take: those of experts that are one tensor, and no nn.Linear."""
        weights = {id(parameter): parameter for parameter in module.parameters()}
        experts = [parameter for parameter in weights.values() if parameter.ndim == 3]
        if not experts:
            return ""
        share = sum(each.numel() for each in experts) / sum(each.numel() for each in weights.values())
        return f"{len(experts)} expert tensors ({share:.0%} of the weights) left in float"

    def _tables(self, module: PreTrainedModel) -> dict[str, LayerSpec | None]:
        """Return module name -> spec of the embedding and the head."""
        names = {id(child): name for name, child in module.named_modules()}
        tables = ((module.get_input_embeddings(), self.embedding), (module.get_output_embeddings(), self.lm_head))
        return {names[id(table)]: spec for table, spec in tables if table is not None}

    def _require_tables_agree(self, skeleton: Skeleton) -> None:
        tables = self._tables(skeleton.module)
        tied = [name for name in tables if f"{name}.weight" in skeleton.ties]
        if len({tables[name] for name in tied}) > 1:
            raise PassError(
                f"{self.step}: {' and '.join(tied)} share one tensor, got embedding: {_word(self.embedding)} and "
                f"lm_head: {_word(self.lm_head)}; give both the same format"
            )
        for name, spec in self.specs(skeleton.module).items():
            width = _width(skeleton.module, name)
            if name in tables and isinstance(spec.format, IntegerFormat) and width % spec.format.block:
                raise PassError(
                    f"{self.step}: {name} has {width} features, which no group of {', '.join(map(str, GROUPS))} "
                    "divides; leave it in float"
                )


def require_patterns_match(step: str, exclude: tuple[str, ...], module: nn.Module) -> None:
    """Refuse a pattern that matches no module's name: a slip of the pen."""
    names = [name for name, _ in module.named_modules()]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PassError(f"{step}: exclude pattern {pattern!r} matches no module; one is {names[-1]!r}")


def _fitted(spec: LayerSpec | None, width: int) -> LayerSpec | None:
    """Return a table's spec; one that is looked up by rows needs a group that divides its width."""
    if spec is None or not isinstance(spec.format, IntegerFormat) or width % spec.format.block == 0:
        return spec
    fitting = [group for group in GROUPS if group < spec.format.block and width % group == 0]
    return replace(spec, format=replace(spec.format, group_size=max(fitting))) if fitting else spec


def _width(module: nn.Module, name: str) -> int:
    return module.get_parameter(f"{name}.weight").shape[-1]


def _word(spec: LayerSpec | None) -> str:
    return "float" if spec is None else f"int{spec.format.bits}"
