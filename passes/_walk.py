"""Walk a model block by block: only one block's weights are in memory, whatever the model's depth.

Every forward pass runs the model's own code in a thread of its own, and all of them move in lockstep: each stops
where it is about to enter a block, that block is loaded once for all, each runs through it, the block is freed.
So nothing is assumed of how a family hands masks, positions or caches from block to block. One thread runs at a time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from passes._batches import equal_lengths, walk_groups
from passes._errors import add_errors
from passes._files import atomic_write
from passes._kind import kind_of
from passes._quantized import CacheSpec, LayerSpec, QuantizedCache, QuantizedLayer, parse_spec, write_specs
from passes._safetensors import (
    INDEX_NAME,
    SafetensorsError,
    meta_tensor,
    read_header,
    read_metadata,
    write_safetensors,
)
from passes._skeleton import Skeleton
from passes.base import Context, Model, PassError, PassResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._checkpoint import StoredTensor

Result = TypeVar("Result")
Change = Callable[[str, "PreTrainedModel", Context], Mapping[str, QuantizedLayer | QuantizedCache | torch.Tensor]]
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
TOKENS_PER_BATCH = 4096


def walk(skeleton: Skeleton, forwards: Sequence[Callable[[PreTrainedModel], Result]]) -> Iterator[tuple[int, Result]]:
    """Run every function of `forwards` on the model, one block in memory at a time; yield (index, result) as they end.

    The tensors outside the blocks (embedding, final norm, head) stay in memory for the whole walk.
    """
    travellers = [Traveller(skeleton.module, forward) for forward in forwards]
    try:
        with stopping_before_blocks(skeleton), skeleton.loaded(*skeleton.outside()):
            yield from _advance(travellers, list(range(len(travellers))))
            while waiting := [index for index, t in enumerate(travellers) if t.before is not None]:
                block = travellers[waiting[0]].before
                assert block is not None
                with skeleton.loaded(block):
                    yield from _advance(travellers, [i for i in waiting if travellers[i].before == block])
    finally:
        for traveller in travellers:
            traveller.abandon()


@contextmanager
def stopping_before_blocks(skeleton: Skeleton) -> Iterator[None]:
    """Have every traveller stop where it is about to enter a block."""

    def entering(name: str) -> Callable[..., None]:
        return lambda _, args, options: Traveller.current().stop_before(name, (args, options))

    with ExitStack() as hooks:
        for name in skeleton.blocks:
            block = skeleton.module.get_submodule(name)
            hooks.enter_context(block.register_forward_pre_hook(entering(name), with_kwargs=True))
        yield


def forward_without_head(skeleton: Skeleton, ids: torch.Tensor) -> Callable[[PreTrainedModel], None]:
    """Return a forward pass of token ids [B, T] that nothing is wanted of but that it goes through the blocks."""
    options = {"use_cache": False} if kind_of(skeleton.config) == "decoder" else {}

    def run(module: PreTrainedModel) -> None:
        module.base_model(input_ids=ids, **options)

    return run


def walk_over(skeleton: Skeleton, sequences: Sequence[Sequence[int]]) -> None:
    """Run the model without its head over sequences of token ids, for the sake of the hooks on its modules."""
    lengths = [len(ids) for ids in sequences]
    for batches in walk_groups(equal_lengths(lengths, TOKENS_PER_BATCH), lengths):
        ids = [torch.tensor([sequences[i] for i in batch]) for batch in batches]
        for _ in walk(skeleton, [forward_without_head(skeleton, each) for each in ids]):
            pass


def _advance(travellers: Sequence[Traveller[Result]], indices: Sequence[int]) -> Iterator[tuple[int, Result]]:
    """Move some of the travellers to their next block; hand out the results of those that end."""
    for index in indices:
        travellers[index].advance()
        if travellers[index].before is None:
            yield index, travellers[index].take_result()


class _Abandoned(BaseException):
    """Unwinds a forward pass that nobody waits for any more."""


class Traveller(Generic[Result]):
    """One forward pass in a thread that runs only between `advance` and the next block.

    Attributes:
        before: the block it is about to enter; None before the first step and at the end.
        arguments: those of that block, and its keywords.
        outputs: what the blocks returned that it went `through`, if it is to keep that.
    """

    _local = threading.local()

    def __init__(
        self,
        module: PreTrainedModel,
        forward: Callable[[PreTrainedModel], Result],
        recorded: Sequence[Any] = (),
        *,
        keeps: bool = False,
    ) -> None:
        """Start the thread, which waits for `advance`; the first blocks return what is `recorded`, and do not run."""
        self.outputs: list[Any] | None = [] if keeps else None
        self._recorded = list(reversed(recorded))
        self.before: str | None = None
        self.arguments: Arguments = ((), {})
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(module, forward), daemon=True)
        self._thread.start()

    @classmethod
    def current(cls) -> Traveller[Any]:
        """Return the traveller whose thread this is."""
        traveller: Traveller[Any] = cls._local.traveller
        return traveller

    def advance(self) -> None:
        """Run until the next block is reached or the forward pass has ended; raise what it raised."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def stop_before(self, block: str, arguments: Arguments = ((), {})) -> None:
        """Called in the thread, on the way into a block: wait for `advance`."""
        self.before, self.arguments = block, arguments
        self._stopped.release()
        self._go.acquire()
        self.before, self.arguments = None, ((), {})
        if self._abandoned:
            raise _Abandoned

    def through(self, block: str, run: Callable[[], Any]) -> Any:
        """Called in the thread in the place of a block: return what was recorded of it, else stop and then run it."""
        if self._recorded:
            return self._recorded.pop()
        self.stop_before(block)
        output = run()
        if self.outputs is not None:
            self.outputs.append(output)
        return output

    def take_result(self) -> Result:
        """Return what the forward pass returned, and keep no hold on it."""
        return self._result.pop()

    def abandon(self) -> None:
        """End the thread where it stands."""
        if self._thread.is_alive():
            self._abandoned = True
            self._go.release()
            self._thread.join()

    def _run(self, module: PreTrainedModel, forward: Callable[[PreTrainedModel], Result]) -> None:
        self._local.traveller = self
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():
                    self._result.append(forward(module))
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.before = None
            self._stopped.release()


def run_blocks(change: Change, model: Model, ctx: Context, *, in_outline: bool = False) -> PassResult:
    """Load each part of the model, let a pass change it, write it to a file of its own.

    `change(part, module, ctx)` returns module name -> quantized layer or cache, or tensor name -> its new values.

    A file that is already there was finished by an earlier run that was killed, and is kept. In outline nothing is
    loaded: what `change` returns is on the meta device, and the files have holes.
    """
    skeleton = Skeleton(model)
    if skeleton.caches:
        raise PassError("the cache is quantized, to ranges of the weights as they are; put quantize_kv_cache last")
    parts = skeleton.outside() + skeleton.blocks
    specs: dict[str, LayerSpec | CacheSpec] = dict(skeleton.specs)
    weight_map: dict[str, str] = {}
    for done, name in enumerate(parts):
        path = part_file(ctx.workdir, name)
        if not _is_complete(path):
            with nullcontext() if in_outline else skeleton.loaded_as_stored(name), torch.no_grad():
                changed = change(name, skeleton.module, ctx)
                tensors = _part(skeleton, name, changed, meta_tensor if in_outline else _read)
                layers = {layer: new for layer, new in changed.items() if isinstance(new, QuantizedLayer)}
                add_errors(ctx.workdir, {layer: new.error for layer, new in layers.items()})  # before: all or none
                caches = {cache: new for cache, new in changed.items() if isinstance(new, QuantizedCache)}
                written = {place: asdict(new.spec) for place, new in (layers | caches).items()}
                write_safetensors(path, tensors, {"quantization": json.dumps(written, sort_keys=True)})
        specs |= _written(path)
        weight_map |= dict.fromkeys(read_header(path), path.name)
        ctx.progress(done + 1, len(parts), "parts")
    write_specs(ctx.workdir, specs)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    atomic_write(ctx.workdir / INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode())
    new = len(specs) - len(skeleton.specs)
    return PassResult(replace(model, folder=ctx.workdir), {"layers_quantized": new})


def part_file(folder: Path, part: str) -> Path:
    """Return the file of one part of a model."""
    return folder / f"{part}.safetensors"


def specs_of_part(path: Path) -> dict[str, LayerSpec]:
    """Return module name -> spec of the layers that were quantized in the file of a part."""
    return {layer: spec for layer, spec in _written(path).items() if isinstance(spec, LayerSpec)}


def _written(path: Path) -> dict[str, LayerSpec | CacheSpec]:
    return {place: parse_spec(spec) for place, spec in json.loads(read_metadata(path)["quantization"]).items()}


def _read(stored: StoredTensor) -> torch.Tensor:
    return stored.read()


def _part(
    skeleton: Skeleton,
    name: str,
    changed: Mapping[str, QuantizedLayer | QuantizedCache | torch.Tensor],
    read: Callable[[StoredTensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return what is stored of one part: what was changed as given, all else as it was, tied tensors by their owner.

    A tied tensor that has new values under a name which is not its owner's is tied no more.
    """
    tensors: dict[str, torch.Tensor] = {}
    for tensor in skeleton.tensors(name):
        if not skeleton.owns(name, tensor) and tensor not in changed:
            continue
        layer, _, leaf = tensor.rpartition(".")
        quantized, new = changed.get(layer), changed.get(tensor)
        if isinstance(quantized, QuantizedLayer) and leaf == "weight":
            tensors |= {f"{layer}.{leaf}": value for leaf, value in quantized.stored.items()}
        elif isinstance(new, torch.Tensor):
            tensors[tensor] = new
        else:
            tensors[tensor] = read(skeleton.entries[skeleton.stored_name(tensor)])
    for place, new in changed.items():
        if isinstance(new, QuantizedCache):
            tensors |= {f"{place}.{leaf}": value for leaf, value in new.stored.items()}
    return tensors


def _is_complete(path: Path) -> bool:
    try:
        return path.exists() and read_header(path) is not None
    except SafetensorsError:
        return False
