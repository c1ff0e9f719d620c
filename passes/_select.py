"""Which layers a quantizer takes: the rules that all quantizers share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from passes._formats import IntegerFormat
from passes._quantized import LayerSpec
from passes._skeleton import Skeleton, block_names, inside
from passes.base import Context, Estimate, Model, PassError

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedModel

GROUPS = (16, 32, 64, 128, 256)
TABLE_FORMATS = ("int4", "int8")
"""Of tables, whose rows `GatherBlockQuantized` looks up."""


@dataclass(frozen=True)
class Selection:
    """The layers that a quantizer takes, and what each becomes.

    Attributes:
        step: name of the pass, for messages.
        linear: of every nn.Linear inside the blocks.
        embedding, lm_head: of the token embedding and the output head; None leaves them in float.
        exclude: glob patterns on the names of layers that are left alone.
        overrides: glob patterns on names, and what such layers become instead; None leaves them alone. The first that
            matches decides; `exclude` comes before all. Tied tables are one layer with two names.
    """

    step: str
    linear: LayerSpec
    embedding: LayerSpec | None
    lm_head: LayerSpec | None
    exclude: tuple[str, ...]
    overrides: tuple[tuple[str, LayerSpec | None], ...] = ()

    def specs(self, module: PreTrainedModel) -> dict[str, LayerSpec]:
        """Return module name -> spec of the layers to quantize, in the model's order."""
        tables = self._tables(module)
        chosen = {
            name: self._decided(_aliases(module, name), spec) if spec is not None else None
            for name, spec in (self._linears(module) | tables).items()
        }
        fitted = {name: _fitted(chosen[name], _width(module, name)) for name in tables}
        return {name: spec for name, spec in (chosen | fitted).items() if spec is not None}

    def require(self, model: Model) -> None:
        """Refuse patterns that name nothing, tied tables in two formats, and models without a matching layer."""
        skeleton = Skeleton(model)
        if skeleton.specs:
            raise PassError(f"{self.step}: the model is quantized already; quantize each layer once")
        require_patterns_match(self.step, self.exclude, skeleton.module)
        self._require_overrides_match(skeleton.module)
        self._require_tables_agree(skeleton)
        if not self.specs(skeleton.module):
            is_any = self._linears(skeleton.module) or any(self._tables(skeleton.module).values())
            reason = "all are excluded" if is_any else "no nn.Linear in them"
            raise PassError(f"{self.step}: matched none of {len(skeleton.blocks)} blocks: {reason}")

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers."""
        from passes._outline import outline_quantized, parameters_of, part_bytes, torch_bytes

        skeleton = Skeleton(model)
        specs = self.specs(skeleton.module)
        after = outline_quantized(specs, model, ctx)
        return Estimate(
            matches=len(specs),
            bytes=torch_bytes(after),
            parameters=parameters_of(skeleton.module),
            peak_bytes=2 * max(part_bytes(skeleton)),
            model=after,
            note=self.note(skeleton.module),
        )

    def ensure(self, before: Model, after: Model) -> None:
        """Check that exactly the chosen layers are quantized, and that every scale is finite and not zero."""
        chosen, skeleton = self.specs(Skeleton(before).module), Skeleton(after)
        if skeleton.specs.keys() != chosen.keys():
            raise PassError(f"{self.step}: quantized {len(skeleton.specs)} layers, expected {len(chosen)}")
        for layer, spec in chosen.items():
            if skeleton.specs[layer] != spec:
                raise PassError(f"{self.step}: {layer}: got {skeleton.specs[layer]}, expected {spec}")
        for layer in sorted(chosen):
            beside = spec.format.shapes(1, 1).keys() - {"qweight"}
            scales = spec.format.scales({name: skeleton.read(f"{layer}.{name}") for name in beside})
            if not torch.isfinite(scales).all() or (scales == 0).any():
                raise PassError(
                    f"{self.step}: {layer}: a scale is zero or not finite; its weights hold NaN or infinity"
                )

    def note(self, module: PreTrainedModel) -> str:
        """Say how many layers an override changed, and which weights no quantizer can take."""
        return "; ".join(filter(None, (self._note_overrides(module), _note_experts(module))))

    def _note_overrides(self, module: PreTrainedModel) -> str:
        if not self.overrides:
            return ""
        plain, own = replace(self, overrides=()).specs(module), self.specs(module)
        changed = Counter(_word(own.get(name)) for name, spec in plain.items() if own.get(name) != spec)
        counts = ", ".join(f"{count} in {word}" for word, count in sorted(changed.items()))
        return f"{counts}, of {len(plain)} layers"

    def _decided(self, names: Collection[str], spec: LayerSpec) -> LayerSpec | None:
        """Return the spec of a layer of these names, `spec` unless a rule says otherwise."""
        rules = (*((pattern, None) for pattern in self.exclude), *self.overrides)
        matching = (rule for pattern, rule in rules if any(fnmatchcase(name, pattern) for name in names))
        return next(matching, spec)

    def _linears(self, module: PreTrainedModel) -> dict[str, LayerSpec | None]:
        """Return module name -> spec of every nn.Linear inside the blocks."""
        blocks = block_names(module)
        return {
            name: self.linear
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and any(inside(name, block) for block in blocks)
        }

    def _tables(self, module: PreTrainedModel) -> dict[str, LayerSpec | None]:
        """Return module name -> spec of the embedding and the head."""
        names = {id(child): name for name, child in module.named_modules()}
        tables = ((module.get_input_embeddings(), self.embedding), (module.get_output_embeddings(), self.lm_head))
        return {names[id(table)]: spec for table, spec in tables if table is not None}

    def _require_overrides_match(self, module: PreTrainedModel) -> None:
        """Refuse a pattern that names no layer which becomes integers, and a table in a format no kernel looks up."""
        tables = self._tables(module)
        taken = [name for name, spec in (self._linears(module) | tables).items() if spec is not None]
        for pattern, spec in self.overrides:
            named = [name for name in taken if fnmatchcase(name, pattern)]
            if taken and not named:
                raise PassError(
                    f"{self.step}: override pattern {pattern!r} matches no layer that becomes integers; "
                    f"one is {taken[-1]!r}"
                )
            for name in named:
                if name in tables and spec is not None and spec.format.name not in TABLE_FORMATS:
                    raise PassError(
                        f"{self.step}: {name}: got the override {_word(spec)}, expected float, int8 or int4"
                    )

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


def _note_experts(module: nn.Module) -> str:
    """Name the weights of experts that are one tensor, and no nn.Linear."""
    weights = {id(parameter): parameter for parameter in module.parameters()}
    experts = [parameter for parameter in weights.values() if parameter.ndim == 3]
    if not experts:
        return ""
    share = sum(each.numel() for each in experts) / sum(each.numel() for each in weights.values())
    return f"{len(experts)} expert tensors ({share:.0%} of the weights) left in float"


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


def _aliases(module: PreTrainedModel, name: str) -> set[str]:
    """Return the names of all modules that hold the weight of module `name`, which is one tensor with several names.

    Asked of transformers, not of the parameters: a table whose values are loaded is no longer the one it is tied to.
    """
    tied = module.all_tied_weights_keys  # parameter name -> name of the parameter it is tied to
    owner = tied.get(f"{name}.weight", f"{name}.weight")
    family = {owner, *(each for each, source in tied.items() if source == owner)}
    return {parameter.removesuffix(".weight") for parameter in family}


def _width(module: nn.Module, name: str) -> int:
    return module.get_parameter(f"{name}.weight").shape[-1]


def _word(spec: LayerSpec | None) -> str:
    return "float" if spec is None else spec.format.name
