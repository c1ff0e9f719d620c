"""The walk: the numbers of a plain forward pass with one block in memory, and passes that survive a kill."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny_models import Workshop, file_hashes
from torch import nn

from passes._quantized import QuantizedLayer
from passes._skeleton import Skeleton, inside
from passes._walk import walk
from passes.base import BlockPass, Context
from passes.quantize_rtn import QuantizeRtn

IDS = torch.arange(24).reshape(2, 12) * 7 % 256


class CountingSkeleton(Skeleton):
    """Counts how often each tensor is read."""

    reads: dict[str, int]

    def read(self, tensor: str) -> torch.Tensor:
        self.__dict__.setdefault("reads", {})
        self.reads[tensor] = self.reads.get(tensor, 0) + 1
        return super().read(tensor)


def forward(ids: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    return lambda module: module(input_ids=ids).logits


def plain(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    with skeleton.loaded(""), torch.inference_mode():
        return forward(ids)(skeleton.module)


def leftovers(skeleton: Skeleton) -> tuple[list[str], int]:
    """Return the tensors still in memory and the number of hooks on blocks."""
    loaded = [n for n, tensor in skeleton.module.state_dict(keep_vars=True).items() if not tensor.is_meta]
    return loaded, sum(len(skeleton.module.get_submodule(block)._forward_pre_hooks) for block in skeleton.blocks)


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_walk_equals_the_plain_forward_pass_bit_for_bit(workshop: Workshop, name: str) -> None:
    skeleton = Skeleton(workshop.model(name))
    want = plain(skeleton, IDS)
    assert torch.equal(dict(walk(skeleton, [forward(IDS)]))[0], want)


def test_walk_over_quantized_layers_equals_the_plain_forward_pass(workshop: Workshop) -> None:
    step = QuantizeRtn(embedding="int8", lm_head="int8")
    skeleton = Skeleton(workshop.run("llama", step).model)
    want = plain(skeleton, IDS)
    assert torch.equal(dict(walk(skeleton, [forward(IDS)]))[0], want)


def test_one_block_at_a_time_is_in_memory(workshop: Workshop) -> None:
    skeleton = Skeleton(workshop.model("llama"))
    seen: dict[str, set[str]] = {}

    def look(block: str) -> set[str]:
        tensors = skeleton.module.state_dict(keep_vars=True).items()
        held = {name for name, tensor in tensors if not tensor.is_meta}
        return {other for other in skeleton.blocks if any(inside(name, other) for name in held)}

    def run(module: nn.Module) -> None:
        for block in skeleton.blocks:
            module.get_submodule(block).register_forward_hook(lambda *_, b=block: seen.update({b: look(b)}))
        module(input_ids=IDS)

    list(walk(skeleton, [run]))
    assert seen == {block: {block} for block in skeleton.blocks}


def test_several_forward_passes_share_one_reading_of_each_block(workshop: Workshop) -> None:
    skeleton = CountingSkeleton(workshop.model("llama-untied"))
    inputs = [IDS, IDS[:1, :5], IDS.flip(1)]
    results = dict(walk(skeleton, [forward(ids) for ids in inputs]))
    assert set(skeleton.reads.values()) == {1}
    assert skeleton.reads.keys() == skeleton.entries.keys()
    assert all(torch.equal(results[index], plain(skeleton, ids)) for index, ids in enumerate(inputs))


def test_a_forward_pass_that_ends_early_is_handed_out_early(workshop: Workshop) -> None:
    skeleton = CountingSkeleton(workshop.model("llama-untied"))
    steps = walk(skeleton, [forward(IDS), lambda module: module.get_input_embeddings()(IDS)])
    index, embedded = next(steps)
    assert (index, embedded.shape) == (1, (2, 12, 64))
    assert not any(name.startswith("model.layers") for name in skeleton.reads)
    assert [index for index, _ in steps] == [0]


def test_a_model_may_be_run_twice_in_one_forward_pass(workshop: Workshop) -> None:
    skeleton = Skeleton(workshop.model("llama"))
    once, twice = plain(skeleton, IDS), plain(skeleton, IDS.flip(1))
    run = lambda module: (forward(IDS)(module), forward(IDS.flip(1))(module))  # noqa: E731
    first, second = dict(walk(skeleton, [run]))[0]
    assert torch.equal(first, once) and torch.equal(second, twice)


def test_an_error_in_a_forward_pass_comes_out_and_leaves_nothing_behind(workshop: Workshop) -> None:
    skeleton, threads = Skeleton(workshop.model("llama")), threading.active_count()

    def fail(module: nn.Module) -> None:
        module.model.layers[1].register_forward_hook(lambda *_: 1 / 0)  # type: ignore[union-attr, index]
        module(input_ids=IDS)

    with pytest.raises(ZeroDivisionError):
        list(walk(skeleton, [forward(IDS), fail]))
    assert leftovers(skeleton) == ([], 0)
    assert threading.active_count() == threads


def test_a_walk_that_is_abandoned_leaves_nothing_behind(workshop: Workshop) -> None:
    skeleton, threads = Skeleton(workshop.model("llama")), threading.active_count()
    steps = walk(skeleton, [lambda _: "early", forward(IDS)])
    assert next(steps) == (0, "early")
    assert leftovers(skeleton)[0] and threading.active_count() > threads
    steps.close()  # type: ignore[attr-defined]
    assert leftovers(skeleton) == ([], 0)
    assert threading.active_count() == threads


@dataclass(frozen=True, kw_only=True)
class Watched(BlockPass):
    """Does what `step` does, notes the parts, and dies before the part `dies_at`."""

    step: BlockPass
    dies_at: str = ""
    parts: list[str] = field(default_factory=list)

    def run_block(self, name: str, module: nn.Module, ctx: Context) -> Mapping[str, QuantizedLayer]:
        if name == self.dies_at:
            raise KeyboardInterrupt
        self.parts.append(name)
        return self.step.run_block(name, module, ctx)


PARTS = ["model.embed_tokens", "model.norm", "lm_head", "model.layers.0", "model.layers.1"]
STEP = QuantizeRtn(embedding="int8", lm_head="int8")


def test_a_pass_sees_each_part_once_with_nothing_else_in_memory(workshop: Workshop, tmp_path: Path) -> None:
    held: list[set[str]] = []

    class Looking(Watched):
        def run_block(self, name: str, module: nn.Module, ctx: Context) -> Mapping[str, QuantizedLayer]:
            loaded = {n for n, tensor in module.state_dict(keep_vars=True).items() if not tensor.is_meta}
            held.append({n for n in loaded if not inside(n.rpartition(".")[0], name)})
            return super().run_block(name, module, ctx)

    model = workshop.model("llama")
    step = Looking(step=STEP)
    step.run(model, workshop.context(tmp_path, model))
    assert step.parts == PARTS
    assert held == [set()] * len(PARTS)


@pytest.mark.parametrize("dies_at", ["model.norm", "model.layers.1"])
def test_a_killed_pass_resumes_at_the_part_it_died_in(workshop: Workshop, tmp_path: Path, dies_at: str) -> None:
    model = workshop.model("llama")
    ctx = workshop.context(tmp_path, model)
    with pytest.raises(KeyboardInterrupt):
        Watched(step=STEP, dies_at=dies_at).run(model, ctx)
    assert not (tmp_path / "quantization.json").exists()
    resumed = Watched(step=STEP)
    result = resumed.run(model, ctx)
    assert resumed.parts == PARTS[PARTS.index(dies_at) :]
    assert result == Watched(step=STEP).run(model, ctx)
    assert file_hashes(tmp_path) == file_hashes(workshop.run("llama", STEP).model.folder)


def test_a_part_that_is_cut_short_is_made_again(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    ctx = workshop.context(tmp_path, model)
    STEP.run(model, ctx)
    part = tmp_path / "model.layers.0.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    resumed = Watched(step=STEP)
    resumed.run(model, ctx)
    assert resumed.parts == ["model.layers.0"]
    assert file_hashes(tmp_path) == file_hashes(workshop.run("llama", STEP).model.folder)


def test_a_pass_reports_each_finished_part(workshop: Workshop, tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []
    model = workshop.model("llama")
    ctx = Context(workdir=tmp_path, source=model, progress=lambda *report: reports.append(report))
    STEP.run(model, ctx)
    assert reports == [(done, 5, "parts") for done in range(1, 6)]
