"""Spread a budget of bits over the layers: those that lose most get most.

Effect: each Linear weight becomes numbers of one of several formats, all together of at most `bits` bits per weight,
    scales included; which format a layer gets is what does least to the model in all.
Source: damage of single layers, added up, as in HAWQ-V2 (Dong et al. 2019, arXiv:1911.03852) and the
    integer programme of HAWQ-V3 (Yao et al. 2020, arXiv:2011.10680). We differ: damage is measured, on
    calibration texts, by changing one layer at a time, not taken from second derivatives.
Changes: `weight` of nn.Linear inside the blocks; `embedding` and `lm_head` by option.   Keeps: biases, norms, shapes.
Cost: damage `block`: one more run of a block on the texts for each format of each of its layers; one block in memory.
    `answers`: a run of the model from each layer on for each format, and the model in one format more on disk.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from passes._override import Group, LayerFormat, Override
from passes._quantizer import Quantizer, require_texts
from passes.base import Context, Estimate, Model, PassError, PassResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from transformers import PreTrainedModel

    from passes._budget import Damages
    from passes._formats import WeightFormat
    from passes._quantized import LayerSpec

FILE = "mixed.json"
FORMAT = re.compile(r"int(2|4|8) (?:g(16|32|64|128|256)|(channel))")
EXPECTED = "expected such as 'int8 g128' or 'int4 channel': int2, int4 or int8, g and 16 to 256, or channel"


@dataclass(frozen=True, kw_only=True)
class QuantizeMixed(Quantizer):
    """Spread a budget of bits over the layers: those that lose most get most."""

    bits: float = field(
        default=4.5, metadata={"help": "most bits per weight of the linear layers together, scales included", "gt": 0}
    )
    others: tuple[str, ...] = field(
        default=("int2 g64", "int4 g128", "int8 g128"),
        metadata={"help": "formats that a layer may get besides `format` in groups of `group_size`"},
    )
    damage: Literal["block", "answers"] = field(
        default="block",
        metadata={"help": "what is measured of a layer: how far its block's output moves, or the model's answers"},
    )
    calibration: str = field(metadata={"help": "entry of `data` with texts that layers are tried on", "names": "data"})
    samples: int = field(default=16, metadata={"help": "most calibration texts", "ge": 1})
    context: int = field(default=512, metadata={"help": "tokens of a calibration text that are read", "ge": 2})

    def __post_init__(self) -> None:
        for each in self.others:
            if not FORMAT.fullmatch(each):
                raise ValueError(f"others: got {each!r}, {EXPECTED}")
        if not self.bits > 0:
            raise ValueError(f"bits: got {self.bits}, expected more than 0")
        super().__post_init__()
        require_texts(self.samples, self.context)

    def given_formats(self) -> list[tuple[LayerFormat, Group]]:
        """Return the formats, and their groups, that the recipe gives layers or lets them have."""
        return [*super().given_formats(), *self._choices()]

    def requires(self, model: Model) -> None:
        """Refuse what every quantizer refuses, and a budget that the smallest formats exceed."""
        from passes._skeleton import build_module

        super().requires(model)
        self._spread(build_module(model.config, "sdpa"), None)

    def estimate(self, model: Model, ctx: Context) -> Estimate:
        """Count layers and bytes from the headers, as if all layers were alike: the budget is used up in any case."""
        from passes._skeleton import build_module

        return Quantizer.estimate(self._spread(build_module(model.config, "sdpa"), None), model, ctx)

    def run(self, model: Model, ctx: Context) -> PassResult:
        """Measure what every format does to every layer, choose, then walk over the parts."""
        from passes._files import atomic_write
        from passes._skeleton import Skeleton

        path = ctx.workdir / FILE
        if not path.exists():
            spread = self._spread(Skeleton(model).module, self._damages(model, ctx))
            chosen = spread.overrides[len(self.overrides) :]
            atomic_write(path, (json.dumps([asdict(each) for each in chosen], indent=1) + "\n").encode())
        spread = self._as_chosen(ctx.workdir)
        result = Quantizer.run(spread, model, ctx)
        used = spread._bits_used(Skeleton(model).module)
        return replace(result, note="; ".join(filter(None, (f"{used:.2f} bits per weight", result.note))))

    def ensures(self, before: Model, after: Model, ctx: Context) -> None:
        """Check that layers are as was chosen, every scale finite and not zero, and that they keep to the budget."""
        from passes._skeleton import build_module

        spread = self._as_chosen(after.folder)
        Quantizer.ensures(spread, before, after, ctx)
        used = spread._bits_used(build_module(before.config, "sdpa"))
        if used > self.bits + 1e-9:
            raise PassError(f"{self.name()}: {used:.3f} bits per weight, expected at most {self.bits}")

    def rounded(self, weight: torch.Tensor, form: WeightFormat) -> dict[str, torch.Tensor]:
        """Round to nearest, in the range of each group that loses least."""
        from passes._formats import round_to_nearest, search_clip

        return round_to_nearest(weight, form, search_clip(weight, form))

    def _choices(self) -> list[tuple[LayerFormat, Group]]:
        """Return the formats that a layer may get, each once."""
        found: list[tuple[LayerFormat, Group]] = [(self.format, self.group_size), *map(_parsed, self.others)]
        return list(dict.fromkeys(found))

    def _as_chosen(self, folder: Path) -> QuantizeMixed:
        """Return the pass with the formats that were chosen as its overrides."""
        content = json.loads((folder / FILE).read_text())
        chosen = (Override(**{**each, "layers": tuple(each["layers"])}) for each in content)
        return replace(self, overrides=(*self.overrides, *chosen))

    def _spread(self, module: PreTrainedModel, damages: Damages | None) -> QuantizeMixed:
        """Return the pass with the best spread of the budget as its overrides.

        Without damages those of layers alike: of each weight as much as the square of a step, 4^-bits.
        """
        from passes._budget import least_damage

        choices = self._choices()
        specs, free = self._linears(module), self._free(module)
        shapes = _shapes(module, specs)
        weights = sum(map(prod, shapes.values()))
        taken = sum(specs[layer].format.bytes(*shapes[layer]) for layer in specs.keys() - set(free))
        sizes = {layer: [self._form(*each).bytes(*shapes[layer]) for each in choices] for layer in free}
        if damages is None:
            loss = [4.0 ** -_true_bits(self._form(*each)) for each in choices]
            damages = {layer: [prod(shapes[layer]) * each for each in loss] for layer in free}
        try:
            places = least_damage(damages, sizes, int(self.bits * weights / 8) - taken)
        except PassError as error:
            raise PassError(
                f"{self.name()}: bits: got {self.bits}, which is {error}; give more bits or smaller others"
            ) from error
        chosen = [
            Override(layers=tuple(layer for layer in free if places[layer] == place), format=form, group_size=group)
            for place, (form, group) in enumerate(choices)
            if place in places.values()
        ]
        return replace(self, overrides=(*self.overrides, *chosen))

    def _damages(self, model: Model, ctx: Context) -> Damages:
        """Return what each choice does to each free layer."""
        from passes._budget import answer_damages, block_damages
        from passes._skeleton import Skeleton

        skeleton, texts = Skeleton(model), ctx.calibration[self.calibration]
        layers = self._free(skeleton.module)
        if self.damage == "block":
            return block_damages(skeleton, texts, layers, [self._form(*each) for each in self._choices()], self.rounded)
        found, plain = [], replace(self, embedding="float", lm_head="float")
        for number, (form, group) in enumerate(self._choices()):
            whole = replace(plain, overrides=(Override(layers="*", format=form, group_size=group),))
            with TemporaryDirectory(dir=ctx.workdir) as folder:
                after = Quantizer.run(whole, model, replace(ctx, workdir=Path(folder))).model
                found.append(answer_damages(Skeleton(model), Skeleton(after), texts))
            ctx.progress(number + 1, len(self._choices()), "formats")
        return {layer: [each[layer] for each in found] for layer in layers}

    def _linears(self, module: PreTrainedModel) -> dict[str, LayerSpec]:
        """Return module name -> spec of the linear layers that are taken."""
        return replace(self, embedding="float", lm_head="float")._selection().specs(module)

    def _free(self, module: PreTrainedModel) -> list[str]:
        """Return the layers whose format is to be chosen: those that no override names."""
        patterns = [pattern for each in self.overrides for pattern in each.patterns]
        return [name for name in self._linears(module) if not any(fnmatchcase(name, each) for each in patterns)]

    def _bits_used(self, module: PreTrainedModel) -> float:
        """Return the bits per weight of the linear layers together."""
        specs = self._linears(module)
        shapes = _shapes(module, specs)
        total = sum(spec.format.bytes(*shapes[layer]) for layer, spec in specs.items())
        return 8 * total / sum(map(prod, shapes.values()))

    def _form(self, form: LayerFormat, group: Group) -> WeightFormat:
        spec = self._spec(form, group)
        assert spec is not None
        return spec.weight_format


def _parsed(text: str) -> tuple[LayerFormat, Group]:
    """Return format and group of a text such as 'int4 g128'."""
    found = FORMAT.fullmatch(text)
    assert found is not None
    return f"int{found[1]}", int(found[2]) if found[2] else "channel"  # type: ignore[return-value]


def _shapes(module: PreTrainedModel, layers: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return layer -> rows and features of its weight."""
    found = {}
    for layer in layers:
        rows, features = module.get_parameter(f"{layer}.weight").shape
        found[layer] = (rows, features)
    return found


def _true_bits(form: WeightFormat) -> float:
    return 8 * form.bytes(1, 256) / 256
