"""What a module's tensors are called on disk: as in the module, or as transformers' own loading rules translate them.

Checkpoints of several families name or cut tensors in another way than the modules that load them: one file tensor per
expert where the module has one for all, or an older name. transformers keeps these rules; here they are applied one
tensor at a time, when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from passes._kind import first_line
from passes._quantized import FILE
from passes._safetensors import TensorEntry, tensor_index
from passes.base import PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredTensor(Protocol):
    """A tensor that can be read; `dtype` in the names of safetensors ("BF16")."""

    @property
    def dtype(self) -> str:
        """Return its element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its extents."""

    @property
    def nbytes(self) -> int:
        """Return its size on disk."""

    def read(self) -> torch.Tensor:
        """Read it in its own dtype."""


@dataclass(frozen=True)
class Converted:
    """A tensor that transformers makes of one or several file tensors, such as all experts' weights in one.

    Attributes:
        name: in the module.
        shape: in the module; what the conversion really gives is checked when it is read.
        sources: (the converter's pattern, file tensor) in the order the converter takes them.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, TensorEntry], ...]
    first_name: str
    converter: WeightConverter
    module: PreTrainedModel

    @property
    def dtype(self) -> str:
        """Return the element type of the file tensors."""
        return self.sources[0][1].dtype

    @property
    def nbytes(self) -> int:
        """Return the size of a tensor of this shape and the file tensors' element type."""
        elements = sum(torch.Size(entry.shape).numel() for _, entry in self.sources)
        return sum(entry.nbytes for _, entry in self.sources) * torch.Size(self.shape).numel() // max(1, elements)

    def read(self) -> torch.Tensor:
        """Read the file tensors and convert them.

        Raises:
            PassError: the conversion fails, or gives no tensor of this name and shape.
        """
        converter: Any = deepcopy(self.converter)  # annotated for futures; it takes anything that can be called, too
        for pattern, entry in self.sources:
            converter.collected_tensors[pattern].append(entry.read)
        try:
            made = converter.convert(self.first_name, model=self.module, config=self.module.config)[self.name]
        except Exception as error:  # a conversion checks its input by what happens to go wrong
            raise PassError(
                f"{self.sources[0][1].file}: transformers cannot make {self.name}: {first_line(error)}"
            ) from error
        value: torch.Tensor = made[0] if isinstance(made, list) else made
        if tuple(value.shape) != self.shape:
            raise PassError(
                f"{self.sources[0][1].file}: {self.name} made of {len(self.sources)} tensors has shape "
                f"{list(value.shape)}, config.json asks for {list(self.shape)}"
            )
        return value.contiguous()


def stored_tensors(folder: Path, module: PreTrainedModel) -> Mapping[str, StoredTensor]:
    """Return every tensor of a torch stage by the name that `module`, its parameters on the meta device, has for it.

    A stage that a pass wrote has the module's names already; a checkpoint goes through transformers' rules, and what
    they lead nowhere keeps its own name.
    """
    entries = tensor_index(folder)
    if (folder / FILE).exists():
        return entries
    return _translated(entries, module)


def _translated(entries: Mapping[str, TensorEntry], module: PreTrainedModel) -> dict[str, StoredTensor]:
    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = module.state_dict()
    found: dict[str, StoredTensor] = {}
    groups: dict[str, list[tuple[str, TensorEntry]]] = {}
    for name in sorted(entries, key=dot_natural_key):  # the order in which transformers hands experts to a converter
        target, pattern = _target(name, renamings, converters, module.base_model_prefix, wanted)
        if target not in wanted:
            found.setdefault(name, entries[name])
        elif pattern is None:
            found[target] = entries[name]
        else:
            groups.setdefault(target, []).append((pattern, entries[name]))
    for first, sources in groups.items():
        converter = converter_of[sources[0][0]]
        for target in _targets(first, converter, wanted):
            found[target] = Converted(target, tuple(wanted[target].shape), tuple(sources), first, converter, module)
    return found


def _target(
    name: str,
    renamings: Sequence[WeightRenaming],
    converters: Sequence[WeightConverter],
    prefix: str,
    wanted: Mapping[str, Any],
) -> tuple[str, str | None]:
    """Return what the module calls a file tensor, and the pattern of the converter that takes it, if one does."""
    target, pattern = rename_source_key(name, list(renamings), list(converters), prefix, dict(wanted))
    if target not in wanted and name in wanted:
        target, pattern = rename_source_key(name, [], [], prefix, dict(wanted))
    return target, pattern


def _targets(first: str, converter: WeightConverter, wanted: Mapping[str, Any]) -> list[str]:
    """Return the module's names of all that a converter makes, given the first of them."""
    head, *others = converter.target_patterns
    names = [first, *(first.replace(head, other, 1) for other in others)]
    return [name for name in names if name in wanted]
