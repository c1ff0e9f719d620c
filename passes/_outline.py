"""A model as a pass would leave it, without its weights: files that are right but for holes in the place of numbers.

At stage torch an outline has every tensor, in dtype and shape; a pass reads its headers as it reads a model's. At stage
onnx it is the graph of two shallow models, one with each kind of layer once and one that repeats them: what a graph
holds besides the weights grows by the same with every layer, and tracing all of them would take as long as the export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from passes._graph import in_outline, weight_bytes
from passes._kind import typed_config
from passes._quantized import CacheSpec, LayerSpec, QuantizedCache, QuantizedLayer, write_specs
from passes._safetensors import SINGLE_NAME, meta_tensor, weight_files, write_safetensors
from passes._skeleton import Skeleton, block_names, build_module, inside
from passes._twin import first_of_each, kinds_of_layers, with_layers
from passes._walk import run_blocks
from passes.base import ONNX, TORCH, Context, Estimate, Model, Pass, PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._checkpoint import StoredTensor

FILE = "outline.json"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class _Graphs:
    """What the outline of a graph is made of.

    Attributes:
        weights: bytes of the weights of the whole model, in the graph.
        parameters: of the whole model.
        shallow: bytes of the weights of each shallow model; its graph lies in the folder of that number.
        more: how often the layers of the first are to be added to it; what the second has more is one time.
    """

    weights: int
    parameters: int
    shallow: tuple[int, ...]
    more: float

    def whole(self, of_each: Sequence[int]) -> int:
        """Return a number of the whole model, from that of each shallow one."""
        return round(of_each[0] + (of_each[-1] - of_each[0]) * self.more)

    def size(self, of_each: Sequence[int]) -> int:
        """Return the size of the whole graph, from that of each shallow one."""
        return self.weights + self.whole([size - own for size, own in zip(of_each, self.shallow, strict=True)])


# ---- stage torch


def outline_quantized(specs: Mapping[str, LayerSpec], model: Model, ctx: Context) -> Model:
    """Write the outline of a torch stage some of whose layers are quantized: module name -> how."""

    def change(part: str, module: PreTrainedModel, _: Context) -> dict[str, QuantizedLayer]:
        chosen = {name: spec for name, spec in specs.items() if inside(name, part)}
        return {name: QuantizedLayer(spec, _stored(module, name, spec)) for name, spec in chosen.items()}

    return run_blocks(change, model, ctx, in_outline=True).model


def outline_caches(specs: Mapping[str, CacheSpec], model: Model, ctx: Context) -> Model:
    """Write the outline of a torch stage some of whose layers keep int8: module name -> how."""

    def change(part: str, module: PreTrainedModel, _: Context) -> dict[str, QuantizedCache]:
        return {name: QuantizedCache(spec, _empty(spec.shapes())) for name, spec in specs.items() if inside(name, part)}

    return run_blocks(change, model, ctx, in_outline=True).model


def outline_float32(model: Model, ctx: Context, *, outside: bool = False) -> Model:
    """Write the outline of a torch stage all of whose blocks become float32, and all `outside`, tied tables apart."""

    def change(part: str, module: PreTrainedModel, _: Context) -> dict[str, torch.Tensor]:
        if not outside and part not in block_names(module):
            return {}
        return {f"{part}.{name}": value for name, value in module.get_submodule(part).named_parameters()}

    return run_blocks(change, model, ctx, in_outline=True).model


def torch_bytes(model: Model) -> int:
    """Return the size of the files of a torch stage."""
    return sum(path.stat().st_size for path in weight_files(model.folder))


def parameters_of(module: torch.nn.Module) -> int:
    """Count a model's numbers, those of a tied tensor once."""
    return sum(parameter.numel() for parameter in {id(each): each for each in module.parameters()}.values())


def part_bytes(skeleton: Skeleton) -> list[int]:
    """Return the size of each part of a torch stage as it is stored."""
    return [
        sum(skeleton.entries[stored].nbytes for stored in set(skeleton.tensors(part).values()))
        for part in skeleton.outside() + skeleton.blocks
    ]


def walking_bytes(model: Model) -> int:
    """Return the memory of a walk over a torch stage: all outside its blocks, and the largest of these.

    Integers count as they are, all else 4 bytes.
    """
    skeleton = Skeleton(model)
    outside, blocks = ([_loaded(skeleton, part) for part in parts] for parts in (skeleton.outside(), skeleton.blocks))
    return sum(outside) + max(blocks, default=0)


def _loaded(skeleton: Skeleton, part: str) -> int:
    entries = [skeleton.entries[stored] for stored in set(skeleton.tensors(part).values())]
    return sum(entry.nbytes if entry.dtype in ("U8", "I8") else 4 * prod(entry.shape) for entry in entries)


def _stored(module: PreTrainedModel, layer: str, spec: LayerSpec) -> dict[str, torch.Tensor]:
    rows, features = module.get_parameter(f"{layer}.weight").shape
    return _empty(spec.shapes(rows, features))


def _empty(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (shape, dtype) in shapes.items()
    }


# ---- from torch to onnx


def outline_graph(model: Model, ctx: Context, lower: Callable[[Model, Path], None]) -> Estimate:
    """Return what lowering would leave; `lower` writes the graph of a torch stage into a folder.

    `peak_bytes` is left at 0.
    """
    whole = Skeleton(model)
    shallow, more = _shallow(whole, model, ctx.workdir)
    own, sizes = [], []
    for number, each in enumerate(shallow):
        folder = ctx.workdir / str(number)
        folder.mkdir()
        with in_outline():
            lower(each, folder)
        own.append(_loaded(Skeleton(each), ""))
        sizes.append(weight_bytes(folder))
    graphs = _Graphs(_loaded(whole, ""), parameters_of(build_module(model.config, "sdpa")), tuple(own), more)
    (ctx.workdir / FILE).write_text(json.dumps(asdict(graphs)))
    after = replace(model, stage=ONNX, folder=ctx.workdir)
    return Estimate(1, graphs.size(sizes), graphs.parameters, 0, after)


def _shallow(whole: Skeleton, model: Model, folder: Path) -> tuple[list[Model], float]:
    """Return outlines of models with each kind of layer once, and once more, and how often more it is in the whole one.

    The model itself, once, where it is no deeper, or where nothing says what its layers are.
    """
    typed = typed_config(model.config)
    depth = dict(type(typed).attribute_map).get("num_hidden_layers", "num_hidden_layers")
    full = {**typed.to_dict(), "architectures": list(model.config["architectures"])}
    count = full.get(depth)
    if not isinstance(count, int) or full.get("num_kv_shared_layers"):
        return [model], 0.0
    kinds = list(zip(kinds_of_layers(full, depth), _tensors_of_layers(model.config, count), strict=True))
    once = first_of_each(kinds)
    again = [layer for layer in once if kinds.count(kinds[layer]) > 1]
    if count <= len(once + again):
        return [model], 0.0
    try:
        made = [
            _with_layers(whole, model, with_layers(full, depth, layers), layers, folder / f"torch.{number}")
            for number, layers in enumerate((once, once + again))
        ]
    except (KeyError, PassError):  # layers that differ by more than this shows
        return [model], 0.0
    return made, (count - len(once)) / len(again)


def _tensors_of_layers(config: Mapping[str, Any], count: int) -> list[str]:
    """Return, for each layer, the names and shapes of its tensors."""
    module = build_module(config, "sdpa")  # in no format: a few layers in another one change little but the weights
    found: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(count)]
    for block in block_names(module):
        layer = int(block.rpartition(".")[2])
        if layer < count:
            tensors = module.get_submodule(block).state_dict()
            found[layer] += sorted((name, tuple(each.shape)) for name, each in tensors.items())
    return [repr(tensors) for tensors in found]


def _with_layers(
    whole: Skeleton, model: Model, config: Mapping[str, Any], layers: Sequence[int], folder: Path
) -> Model:
    """Write the outline of a model that has some of a model's layers.

    Raises:
        KeyError: it has a tensor that the model has not.
        PassError: transformers builds no such model, or its tensors have other shapes.
    """
    module = build_module(config, "sdpa")
    places = _places(whole.blocks, layers)
    tensors: dict[str, StoredTensor] = {}
    specs: dict[str, LayerSpec] = {}
    for name in module.state_dict():
        layer, _, leaf = name.rpartition(".")
        original = _original(layer, places)
        if leaf == "weight" and original in whole.specs:
            specs[layer] = whole.specs[original]
            names = specs[layer].shapes(0, 0)
        else:
            names = {leaf: ((), "")}
        for each in names:
            tensors[f"{layer}.{each}"] = whole.entries[whole.stored_name(f"{original}.{each}")]
    caches = {
        here + name.removeprefix(there): (name, spec)
        for here, there in places.items()
        for name, spec in whole.caches.items()
        if inside(name, there)
    }
    for cache, (original, spec) in caches.items():
        tensors |= {f"{cache}.{leaf}": whole.entries[f"{original}.{leaf}"] for leaf in spec.shapes()}
    folder.mkdir()
    write_safetensors(folder / SINGLE_NAME, {name: meta_tensor(entry) for name, entry in tensors.items()})
    write_specs(folder, specs | {cache: spec for cache, (_, spec) in caches.items()})
    made = Model(TORCH, folder, model.assets, config)
    Skeleton(made)  # refuses tensors of other shapes
    return made


def _places(blocks: Sequence[str], layers: Sequence[int]) -> dict[str, str]:
    """Return block of the shallow model -> block of the whole one."""
    lists = dict.fromkeys(block.rpartition(".")[0] for block in blocks)
    return {f"{name}.{place}": f"{name}.{layer}" for name in lists for place, layer in enumerate(layers)}


def _original(module: str, places: Mapping[str, str]) -> str:
    return next((there + module[len(here) :] for here, there in places.items() if inside(module, here)), module)


# ---- stage onnx


def outline_rewritten(step: Pass, model: Model, ctx: Context) -> Estimate:
    """Return what a pass would leave of a graph, having let it rewrite the outline.

    Raises:
        PassError: the pass finds no place, as it says of the whole graph.
    """
    graphs = _read(model)
    matches, sizes, notes = [], [], []
    for number in range(len(graphs.shallow)):
        folder = ctx.workdir / str(number)
        folder.mkdir()
        before = replace(model, folder=model.folder / str(number) if _is_outline(model) else model.folder)
        with in_outline():
            result = step.run(before, replace(ctx, workdir=folder))
        matches.append(result.changes.get("matched", 0))
        sizes.append(weight_bytes(folder))
        notes.append(result.note)
    (ctx.workdir / FILE).write_text(json.dumps(asdict(graphs)))
    after = replace(model, folder=ctx.workdir)
    return Estimate(graphs.whole(matches), graphs.size(sizes), graphs.parameters, 0, after, notes[-1])


def _is_outline(model: Model) -> bool:
    return (model.folder / FILE).exists()


def _read(model: Model) -> _Graphs:
    """Return what an outline is made of; a graph that is really there counts as one that is not shallow."""
    if not _is_outline(model):
        return _Graphs(0, parameters_of(build_module(model.config, "sdpa")), (0,), 0.0)
    content = json.loads((model.folder / FILE).read_text())
    return _Graphs(**{**content, "shallow": tuple(content["shallow"])})
