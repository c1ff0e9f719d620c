"""The torch stage in memory: a module whose weights are on the meta device, and the files they are read from.

Only what is asked for is loaded, in float32, and given back: the memory a pass needs is that of the part it works on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes._checkpoint import StoredTensor, stored_tensors
from passes._kind import SWITCHING_ROPES, architecture_of, first_line, typed_config
from passes._kv_cache import Int8Cache, round_caches
from passes._quantized import CacheSpec, LayerSpec, quantized, read_caches, read_specs
from passes.base import Model, PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Skeleton:
    """A model's modules without its weights.

    Attributes:
        config: the content of `config.json`.
        assets: the folder with tokenizer and sentence-transformers files.
        module: the transformers model, in evaluation mode, parameters on the meta device; buffers that are computed
            from the configuration (rotary frequencies) are real.
        specs: module name -> how it is quantized.
        caches: module name -> what an attention layer keeps in int8.
        ties: parameter name -> all names of that parameter, where it has several.
        entries: stored tensor name -> how to read it.
    """

    def __init__(self, model: Model, attention: str = "sdpa") -> None:
        self.config, self.assets = model.config, model.assets
        self.module = build_module(model.config, attention)
        self.specs: dict[str, LayerSpec] = read_specs(model.folder)
        self.caches: dict[str, CacheSpec] = read_caches(model.folder)
        self.ties = _ties(self.module)
        self.entries: Mapping[str, StoredTensor] = stored_tensors(model.folder, self.module)
        for name, spec in self.specs.items():
            self.module.set_submodule(name, quantized(self.module.get_submodule(name), spec))
        for name, cache in self.caches.items():
            self.module.set_submodule(name, Int8Cache(cache))
        if self.caches:
            round_caches(self.module)
        self.blocks = block_names(self.module)
        self._require_all_tensors(model.folder)

    def outside(self) -> list[str]:
        """Return the names of the modules outside the blocks that hold tensors of their own (embedding, norm, head)."""
        return [
            name
            for name, module in self.module.named_modules()
            if not any(inside(name, block) for block in self.blocks) and any(_stored(module))
        ]

    def tensors(self, name: str) -> dict[str, str]:
        """Return tensor name -> stored name for everything in module `name`, its children included."""
        prefix = f"{name}." if name else ""
        return {
            prefix + leaf: self.stored_name(prefix + leaf)
            for leaf in _tensor_names(self.module.get_submodule(name))
            if self.stored_name(prefix + leaf) in self.entries
        }

    def stored_name(self, tensor: str) -> str:
        """Return the name a tensor is stored under: its own, or that of the one it is tied to."""
        for alias in self.aliases(tensor):
            if alias in self.entries:
                return alias
        return self.aliases(tensor)[0]

    def aliases(self, tensor: str) -> list[str]:
        """Return every name of a tensor, the one to store it under first."""
        if tensor in self.ties:
            return list(self.ties[tensor])
        module, _, leaf = tensor.rpartition(".")
        family = self.ties.get(f"{module}.weight", ())
        if leaf == "bias" or not family:
            return [tensor]
        return [name.removesuffix("weight") + leaf for name in family]

    def owns(self, name: str, tensor: str) -> bool:
        """Return whether `tensor`, if it is tied, is stored as part of module `name`."""
        return inside(self.aliases(tensor)[0], name)

    def read(self, tensor: str) -> torch.Tensor:
        """Read one tensor, floating point as float32."""
        value = self.entries[self.stored_name(tensor)].read()
        return value.float() if value.is_floating_point() else value

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """Have the tensors of the named modules in memory as float32; tied ones are loaded once."""
        tensors = {tensor: stored for name in names for tensor, stored in self.tensors(name).items()}
        with self.filled(tensors, self.read):
            yield

    @contextmanager
    def loaded_as_stored(self, name: str) -> Iterator[None]:
        """Have the tensors of one module in memory in their own dtypes.

        One that is tied, and stored as another module's, stays on the meta device.
        """
        tensors = {tensor: stored for tensor, stored in self.tensors(name).items() if self.owns(name, tensor)}
        with self.filled(tensors, lambda tensor: self.entries[self.stored_name(tensor)].read()):
            yield

    @contextmanager
    def filled(self, tensors: Mapping[str, str], read: Callable[[str], torch.Tensor]) -> Iterator[None]:
        """Have tensors in memory, tensor name -> stored name; those stored under one name are read once."""
        shared: dict[str, torch.Tensor] = {}
        places: list[tuple[nn.Module, str]] = []
        for tensor, stored in tensors.items():
            if stored not in shared:
                shared[stored] = read(tensor)
            places.append(_put(self.module, tensor, shared[stored]))
        del shared
        try:
            yield
        finally:
            for owner, leaf in places:
                _assign(owner, leaf, getattr(owner, leaf).to("meta"))

    def _require_all_tensors(self, folder: Path) -> None:
        persistent = set(self.module.state_dict())
        missing = [name for name in sorted(persistent) if self.stored_name(name) not in self.entries]
        if missing:
            raise PassError(
                f"{folder}: {len(missing)} tensors that {type(self.module).__name__} needs are not in the safetensors "
                f"files, first {missing[0]}; the files hold {len(self.entries)} tensors, such as "
                f"{next(iter(self.entries), 'none')}"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        for name, shape in shapes.items():
            stored = self.entries[self.stored_name(name)].shape
            if stored != shape:
                raise PassError(f"{folder}: tensor {name} has shape {list(stored)}, config.json asks for {list(shape)}")


def build_module(config: Mapping[str, Any], attention: str) -> PreTrainedModel:
    """Return the transformers model of a `config.json`, parameters on the meta device, buffers real.

    Raises:
        PassError: the installed transformers does not know the architecture.
    """
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    architecture, typed = architecture_of(config), typed_config(config)
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise PassError(
            f"config.json: architecture {architecture} ({config.get('model_type')}) is not in transformers "
            f"{transformers.__version__}; a newer release may have it"
        )
    if attention == "sdpa" and not cls._supports_sdpa:
        attention = "eager"
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            module: PreTrainedModel = cls._from_config(typed, attn_implementation=attention, dtype=torch.float32)
        module.tie_weights()
    except Exception as error:  # transformers checks a configuration by what happens to go wrong
        raise PassError(
            f"config.json: transformers cannot build {architecture} from it: {first_line(error)}"
        ) from error
    module.eval().requires_grad_(False)
    _hold_rope(module)
    return module


def _hold_rope(module: nn.Module) -> None:
    """Let rotary embeddings that would switch with the length keep the angles they begin with.

    They would turn keys by other angles than those that are in the cache already; `position_limit` ends before that.
    """
    for child in module.modules():
        rotary: Any = child
        kinds = getattr(rotary, "rope_type", None)
        if isinstance(kinds, dict):
            rotary.rope_type = {layer: _held(kind) for layer, kind in kinds.items()}
        elif isinstance(kinds, str):
            rotary.rope_type = _held(kinds)


def _held(kind: str) -> str:
    return "default" if kind in SWITCHING_ROPES else kind


def block_names(module: nn.Module) -> list[str]:
    """Return the names of the model's blocks in order: the elements of every outermost `nn.ModuleList`."""
    lists: dict[str, int] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(inside(name, outer) for outer in lists):
            lists[name] = len(child)
    return [f"{name}.{i}" for name, length in lists.items() for i in range(length)]


def inside(name: str, outer: str) -> bool:
    """Return whether module `name` is `outer` or lies within it."""
    return name == outer or name.startswith(outer + ".")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json`."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def _ties(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return parameter name -> every name of the same parameter, for those that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(family) for family in names.values() if len(family) > 1 for name in family}


def _stored(module: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own tensors that a checkpoint holds."""
    yield from (name for name, value in module._parameters.items() if value is not None)
    transient = module._non_persistent_buffers_set
    yield from (name for name, value in module._buffers.items() if value is not None and name not in transient)


def _tensor_names(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_modules():
        yield from (f"{name}.{leaf}" if name else leaf for leaf in _stored(child))


def _put(module: nn.Module, tensor: str, value: torch.Tensor) -> tuple[nn.Module, str]:
    owner_name, _, leaf = tensor.rpartition(".")
    owner = module.get_submodule(owner_name)
    _assign(owner, leaf, value)
    return owner, leaf


def _assign(owner: nn.Module, leaf: str, value: torch.Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
