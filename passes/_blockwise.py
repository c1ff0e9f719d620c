"""Quantize a model block by block, each block on what the blocks before it, as quantized, make of calibration texts.

The texts travel through the model together, as in passes/_walk.py, and stop before a block. A method may then run that
block, alone, as often as it likes. What it makes of it is written to a file; only then do the texts go through the
block, with the weights of the file. So a killed run takes up its work where it stopped and makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from passes._batches import equal_lengths
from passes._errors import judged, kept_rtn, read_errors
from passes._formats import quantize_activations
from passes._outline import walking_bytes
from passes._quantized import LayerSpec, QuantizedLayer
from passes._safetensors import read_header, read_tensor
from passes._skeleton import Skeleton
from passes._walk import (
    TOKENS_PER_BATCH,
    Arguments,
    Traveller,
    forward_without_head,
    part_file,
    run_blocks,
    specs_of_part,
    stopping_before_blocks,
)
from passes.base import Context, Model, PassResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes._quantizer import Quantizer

STATES_PER_TOKEN = 4
"""As wide as a block's widest layer, that are in memory while a batch runs through the block."""
JUDGED_TOKENS = 2048
"""Tokens on which the error of a layer's output is measured."""


class _Enough(Exception):
    """Ends a run of a block all of whose watched layers have been seen."""


@dataclass(frozen=True)
class CalibratedBlock:
    """One block in float32, and what reaches it of the calibration texts.

    Tensors are made without gradients, outside `torch.inference_mode`: a method may clone them and train.

    Attributes:
        name: of the block.
        module: its weights may be changed.
        specs: module name -> spec of the layers to quantize, in the model's order.
        batches: arguments and keywords of the block, for each batch.
        originals: the same as they would be had nothing been quantized; empty unless `run_calibrated` was asked.
    """

    name: str
    module: nn.Module
    specs: Mapping[str, LayerSpec]
    batches: Sequence[Arguments]
    originals: Sequence[Arguments] = ()

    def layer(self, name: str) -> nn.Module:
        """Return a module of the block by its full name."""
        return self.module.get_submodule(name[len(self.name) + 1 :])

    def weight(self, name: str) -> torch.Tensor:
        """Return the weight [N, M] of a layer as it is now."""
        return self.layer(name).get_parameter("weight")

    def run(self) -> Iterator[torch.Tensor]:
        """Yield the block's output [B, T, D] on every batch, with the weights it has now."""
        yield from self._outputs(self.batches)

    def targets(self) -> Iterator[torch.Tensor]:
        """Yield what the block, with the weights it has now, puts out on every batch as that would be in float."""
        yield from self._outputs(self.originals)

    def watch(self, names: Collection[str], see: Callable[[str, torch.Tensor], None]) -> None:
        """Run the block on every batch and call `see(layer name, its input)` whenever a layer is run.

        A run ends where all layers have been seen. An expert that no token of a batch is sent to is not.
        """
        for _ in self._watched(names, see):
            pass

    def squares(self) -> dict[str, torch.Tensor]:
        """Return layer name -> sum of squares of each input feature [M]; without layers that no token reaches."""
        squares: dict[str, torch.Tensor] = {}

        def see(name: str, x: torch.Tensor) -> None:
            total = x.flatten(0, -2).square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        self.watch(self.specs, see)
        return squares

    def sample(self, names: Collection[str], tokens: int) -> dict[str, torch.Tensor]:
        """Return layer name -> the first of its inputs, at most [tokens, M]; without those that no token reaches."""
        found: dict[str, torch.Tensor] = {}

        def see(name: str, x: torch.Tensor) -> None:
            rows = x.flatten(0, -2)[:tokens]
            found[name] = torch.cat([found[name], rows])[:tokens] if name in found else rows

        for _ in self._watched(names, see):
            if found.keys() == set(names) and min(map(len, found.values())) >= tokens:
                break
        return found

    def readers(self) -> list[list[str]]:
        """Return the layers in the order in which they are run, those that read the same input together."""
        inputs: dict[str, torch.Tensor] = {}
        next(self._watched(self.specs, inputs.__setitem__), None)
        together: list[list[str]] = []
        for name in (*inputs, *(name for name in self.specs if name not in inputs)):  # an expert may come later
            before = together[-1][0] if together else ""
            if name in inputs and before in inputs and inputs[before] is inputs[name]:
                together[-1].append(name)
            else:
                together.append([name])
        return together

    def _outputs(self, batches: Sequence[Arguments]) -> Iterator[torch.Tensor]:
        for args, options in batches:
            out = self.module.forward(*args, **options)
            yield out if isinstance(out, torch.Tensor) else out[0]

    def _watched(self, names: Collection[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Show one batch after the other to `see`."""
        waited: set[str] = set()

        def enter(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                if inputs[0].numel():
                    see(name, inputs[0])
                waited.discard(name)
                if not waited:
                    raise _Enough

            return hook

        with ExitStack() as hooks:
            for name in names:
                hooks.enter_context(self.layer(name).register_forward_pre_hook(enter(name)))
            for args, options in self.batches:
                waited.update(names)
                with suppress(_Enough):
                    self.module.forward(*args, **options)
                yield


Method = Callable[[CalibratedBlock, Context], Mapping[str, "QuantizedLayer | torch.Tensor"]]


def run_calibrated(
    step: Quantizer,
    method: Method,
    texts: Sequence[Sequence[int]],
    model: Model,
    ctx: Context,
    *,
    originals_of: int | None = None,
) -> PassResult:
    """Quantize the blocks of a model by a method, and its tables as `step` does; measure the error of each layer.

    A method that makes up in one layer for others wants `originals_of` so many tokens to a batch: what would reach a
    block had nothing been quantized. It must compare blocks with round-to-nearest itself.
    """
    with CalibrationWalk(model, texts, ctx.workdir, originals_of=originals_of) as walk:

        def change(part: str, module: PreTrainedModel, ctx: Context) -> Mapping[str, QuantizedLayer | torch.Tensor]:
            if part not in walk.skeleton.blocks:
                return step.run_block(part, module, ctx)
            specs = step.chosen(part, module)
            if not specs:
                return {}
            with walk.at(part, specs) as block:
                inputs = block.sample(list(specs), JUDGED_TOKENS)
                changed = method(block, ctx)
            weight = lambda name: walk.skeleton.read(f"{name}.weight")  # noqa: E731
            return judged(step.name(), changed, weight, inputs, one_by_one=originals_of is None)

        result = run_blocks(change, model, ctx)
    changes = {"layers_kept_rtn": len(kept_rtn(read_errors(ctx.workdir))), "calibration_tokens": sum(map(len, texts))}
    return replace(result, changes={**result.changes, **changes})


def calibrated_bytes(model: Model, tokens: int) -> int:
    """Return the memory of a calibrated walk: the largest block twice, the states of all texts, and a batch's."""
    skeleton = Skeleton(model)
    weights = [each for name in skeleton.blocks for each in skeleton.module.get_submodule(name).parameters()]
    width = int(skeleton.module.get_input_embeddings().get_parameter("weight").shape[1])
    widest = max((max(weight.shape) for weight in weights), default=width)
    states = 4 * (tokens * width + STATES_PER_TOKEN * TOKENS_PER_BATCH * widest)
    return 2 * walking_bytes(model) + states


class CalibrationWalk:
    """Calibration texts on their way through a model, the blocks behind them as they have been written.

    The tensors outside the blocks stay in memory, but for the tables, which only the first step needs.
    """

    def __init__(
        self, model: Model, texts: Sequence[Sequence[int]], folder: Path, *, originals_of: int | None = None
    ) -> None:
        self.skeleton = Skeleton(model)
        self._texts, self._folder, self._originals_of = texts, folder, originals_of
        self._travellers: list[Traveller[None]] = []
        self._originals: list[Traveller[None]] = []
        self._held = ExitStack()

    def __enter__(self) -> CalibrationWalk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for traveller in (*self._travellers, *self._originals):
            traveller.abandon()
        self._held.close()

    @contextmanager
    def at(self, name: str, specs: Mapping[str, LayerSpec]) -> Iterator[CalibratedBlock]:
        """Have a block in memory, and the texts before it, all blocks before which have been written."""
        if not self._travellers:
            self._start()
        self._go_to(name, self._travellers, self._as_written)
        self._go_to(name, self._originals, self.skeleton.loaded)
        batches, originals = (
            [each.arguments for each in travellers if each.before == name]
            for travellers in (self._travellers, self._originals)
        )
        with self.skeleton.loaded(name), torch.no_grad():
            yield CalibratedBlock(name, self.skeleton.module.get_submodule(name), specs, batches, originals)

    def _start(self) -> None:
        """Bring every batch before the first block."""
        skeleton = self.skeleton
        lengths = [len(ids) for ids in self._texts]
        most = TOKENS_PER_BATCH if self._originals_of is None else min(TOKENS_PER_BATCH, self._originals_of)
        for batch in equal_lengths(lengths, most):
            ids = torch.tensor([self._texts[index] for index in batch])
            self._travellers.append(Traveller(skeleton.module, forward_without_head(skeleton, ids)))
            if self._originals_of is not None:
                self._originals.append(Traveller(skeleton.module, forward_without_head(skeleton, ids)))
        self._held.enter_context(stopping_before_blocks(skeleton))
        embedding, tables = _tables(skeleton)
        for name in (name for name in skeleton.outside() if name not in tables):
            self._held.enter_context(self._as_written(name))
        for travellers, loaded in ((self._travellers, self._as_written), (self._originals, skeleton.loaded)):
            with loaded(embedding):
                for traveller in travellers:
                    traveller.advance()

    def _go_to(
        self,
        name: str,
        travellers: Sequence[Traveller[None]],
        loaded: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Let texts through every block before `name`, `loaded` one after the other, that has been written.

        One that is used again later is the same then.
        """
        while behind := {each.before for each in travellers if each.before not in (name, None)}:
            written = [block for block in behind if block and part_file(self._folder, block).exists()]
            if not written:
                return
            with loaded(written[0]):
                for traveller in travellers:
                    if traveller.before == written[0]:
                        traveller.advance()

    @contextmanager
    def _as_written(self, name: str) -> Iterator[None]:
        """Have a part in memory as its file says, quantized layers in the numbers they stand for."""
        path = part_file(self._folder, name)
        entries = read_header(path)
        specs = specs_of_part(path)

        def read(tensor: str) -> torch.Tensor:
            if not self.skeleton.owns(name, tensor):  # tied, and stored with another part
                return self.skeleton.read(tensor)
            layer, _, leaf = tensor.rpartition(".")
            if leaf == "weight" and layer in specs:
                module, spec = self.skeleton.module.get_submodule(layer), specs[layer]
                rows, features = module.get_parameter("weight").shape
                stored = {each: read_tensor(entries[f"{layer}.{each}"]) for each in spec.shapes(rows, features)}
                return spec.weight_format.load(stored, features)
            value = read_tensor(entries[tensor])
            return value.float() if value.is_floating_point() else value

        with self.skeleton.filled(self.skeleton.tensors(name), read), ExitStack() as hooks:
            for layer, spec in specs.items():
                module = self.skeleton.module.get_submodule(layer)
                if spec.activations == "int8" and isinstance(module, nn.Linear):
                    hooks.enter_context(module.register_forward_pre_hook(_rounding(spec.weight_format.block)))
            yield


def _rounding(block: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return a hook that rounds a layer's input as its kernel will."""
    return lambda _, inputs: (quantize_activations(inputs[0], block), *inputs[1:])


def _tables(skeleton: Skeleton) -> tuple[str, set[str]]:
    """Return the name of the embedding, and those of both tables."""
    module = skeleton.module
    names = {id(child): name for name, child in module.named_modules()}
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    return names[id(embedding)], {names[id(table)] for table in (embedding, head) if table is not None}
