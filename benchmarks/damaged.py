"""Damaged copies of a model: noise on its weights, weights rounded to few bits, blocks whose output is nothing.

Everything happens to the Linear layers inside the blocks; embedding, norms and head stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from passes._skeleton import block_names, read_config
from passes.base import TORCH, Context, Model
from passes.quantize_rtn import QuantizeRtn

GROUP = 32
OUTPUTS = {
    "attention": ("self_attn.o_proj", "attention.output.dense"),
    "feed-forward": ("mlp.down_proj", "output.dense"),
}
Group: TypeAlias = int | Literal["channel"]


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of `size` standard deviations of each weight matrix."""

    size: float
    seed: int

    @property
    def name(self) -> str:
        return f"noise {self.size:g}, seed {self.seed}"

    def change(self, module: nn.Module) -> None:
        """Add the noise."""
        random = torch.Generator().manual_seed(self.seed)
        for _, _, layer in linears(module):
            noise = torch.randn(layer.weight.shape, generator=random)
            layer.weight += self.size * layer.weight.std() * noise


@dataclass(frozen=True)
class Rounding:
    """Round to the nearest of 2^bits values per group of input features; 8, 4 and 2 bits by `quantize_rtn`."""

    bits: int
    group: Group = GROUP

    @property
    def name(self) -> str:
        return f"{self.bits} bit, {'per channel' if self.group == 'channel' else f'groups of {self.group}'}"

    def change(self, module: nn.Module) -> None:
        """Round in place, which only 3 bits need: no pass writes them."""
        for _, _, layer in linears(module):
            layer.weight.copy_(rounded(layer.weight, self.bits, self.group))


@dataclass(frozen=True)
class Drop:
    """Zero the output projection of a block's attention, feed-forward, or both: the residual goes by unchanged."""

    block: int
    parts: tuple[str, ...] = tuple(OUTPUTS)

    @property
    def name(self) -> str:
        return f"block {self.block} without {' and '.join(self.parts)}"

    def change(self, module: nn.Module) -> None:
        """Zero weight and bias."""
        outputs = {name for part in self.parts for name in OUTPUTS[part]}
        found = [layer for block, name, layer in linears(module) if block == self.block and name in outputs]
        if len(found) != len(self.parts):
            raise ValueError(f"{self.name}: found {len(found)} output projections, expected {len(self.parts)}")
        for layer in found:
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()


Damage: TypeAlias = Noise | Rounding | Drop


def linears(module: nn.Module) -> Iterator[tuple[int, str, nn.Linear]]:
    """Yield (number of the block, name within it, layer) of every Linear inside the blocks."""
    for number, block in enumerate(block_names(module)):
        for name, layer in module.get_submodule(block).named_modules():
            if isinstance(layer, nn.Linear):
                yield number, name, layer


def rounded(weight: torch.Tensor, bits: int, group: Group) -> torch.Tensor:
    """Return `weight` [N, M] with the value of largest magnitude of each group at the most negative of 2^bits integers.

    `group` divides M. The same grid as `quantize_rtn`'s symmetric one.
    """
    rows, features = weight.shape
    values = weight.reshape(rows, -1, features if group == "channel" else group)
    middle = 1 << (bits - 1)
    scale = values.gather(-1, values.abs().argmax(-1, keepdim=True)) / -middle
    scale = torch.where(scale == 0, 1.0, scale)
    return ((values / scale).round().clamp(-middle, middle - 1) * scale).reshape(rows, features)


def damaged(source: Model, damage: Damage, load: Callable[[Path], Any], work: Path) -> Model:
    """Write a damaged copy into the empty folder `work` and return it.

    Args:
        source: at stage torch.
        damage: what is done to it.
        load: reads the model's module from a folder, in float32.
        work: where the copy is written.
    """
    if isinstance(damage, Rounding) and damage.bits != 3:
        formats: dict[int, Any] = {8: "int8", 4: "int4", 2: "int2"}
        group: Any = damage.group
        step = QuantizeRtn(format=formats[damage.bits], group_size=group, activations="float")
        return step.run(source, Context(work, source)).model
    module = load(source.folder)
    with torch.no_grad():
        damage.change(module)
    module.save_pretrained(work)
    return Model(TORCH, work, source.assets, read_config(work))
