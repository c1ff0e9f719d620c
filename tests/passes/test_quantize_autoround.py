"""quantize_autoround: what is learned and what is not, gradients by hand, and that it is nearer than RTN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny_models import CALIBRATION, TEXTS, Workshop, file_hashes

from passes._blockwise import CalibratedBlock
from passes._errors import read_errors
from passes._float_formats import Mxfp4, Nvfp4
from passes._formats import IntegerFormat, WeightFormat, rounded
from passes._quantized import QuantizedLayer
from passes._skeleton import Skeleton
from passes._walk import walk
from passes.base import Context, Model
from passes.quantize_autoround import QuantizeAutoround, Rounding, _draws, learn
from passes.quantize_rtn import QuantizeRtn

FORMS = [IntegerFormat(4, 16), IntegerFormat(4, 32, False), IntegerFormat(2, 32), Nvfp4(), Mxfp4()]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_all() -> Iterator[list[int]]:
    while True:
        yield [0]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_stored_is_what_was_learned(form: WeightFormat) -> None:
    weight = drawn(6, 40)
    rounding = Rounding(weight, form, None)
    with torch.no_grad():
        rounding.offset[..., :9].copy_(drawn(*rounding.offset[..., :9].shape).clamp(-0.5, 0.5))
        rounding.low.mul_(0.9)
        torch.testing.assert_close(rounding.form.load(rounding.stored(), 40), rounding.weight())


def test_gradients_by_hand() -> None:
    weight = torch.tensor([[-8.0, 3.3, 0.4, 0.0]])
    rounding = Rounding(weight, IntegerFormat(4, 4), torch.tensor([1e9, 0.0, 0.0, 0.0]))  # type: ignore[arg-type]
    assert rounding.weight().tolist() == [[-8.0, 3.0, 0.0, 0.0]]
    offset, low, high = torch.autograd.grad(
        rounding.weight() @ torch.tensor([0.0, 1.0, 0.0, 0.0]), rounding.parameters()
    )
    assert offset.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]  # the scale: rounding is passed straight through
    # The scale is 8 alpha / 8; its number is 3, of which 3.3 fell with the scale and came back by rounding.
    assert low.item() == pytest.approx(3 - 3.3, abs=1e-6)
    assert high.item() == 0.0


def test_a_value_beyond_the_grid_has_no_gradient_of_its_own() -> None:
    rounding = Rounding(torch.tensor([[-8.0, 7.9, 1.0, 0.0]]), IntegerFormat(4, 4), torch.tensor([1e9, 0.0, 0.0, 0.0]))  # type: ignore[arg-type]
    offset, low, _ = torch.autograd.grad(rounding.weight() @ torch.tensor([0.0, 1.0, 0.0, 0.0]), rounding.parameters())
    assert offset.abs().max() == 0
    assert low.item() == pytest.approx(7.0)


def test_steps_go_against_the_sign_and_stay_within_bounds() -> None:
    rounding = Rounding(drawn(2, 16), IntegerFormat(4, 16), None)
    start = [parameter.detach().clone() for parameter in rounding.parameters()]
    gradients = [torch.full_like(start[0], -7.0), torch.full_like(start[1], 3.0), None]
    with torch.no_grad():
        rounding.move([None if each is None else each.clone() for each in gradients], 0.1)
        assert torch.equal(rounding.offset, torch.full_like(start[0], 0.1))
        torch.testing.assert_close(rounding.low, start[1] - 0.1)
        assert torch.equal(rounding.high, start[2])
        for _ in range(20):
            rounding.move([None if each is None else each.clone() for each in gradients], 0.1)
    assert rounding.offset.detach().max() == 0.5
    assert float(rounding.low.detach().min()) == pytest.approx(0.1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_outputs_come_nearer_than_those_of_rtn(form: WeightFormat) -> None:
    weight, x = drawn(16, 64, seed=1), drawn(256, 8, seed=2) @ drawn(8, 64, seed=3) + 0.3 * drawn(256, 64, seed=4)

    def loss(_: Sequence[int], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (x @ (weights["a"] - weight).T).square().sum()

    rounding = Rounding(weight, form, x.square().sum(0))
    reached = learn({"a": rounding}, loss, 1, draw_all(), 100)
    with torch.no_grad():
        stored = rounding.form.load(rounding.stored(), 64)
        assert reached == pytest.approx(float(loss([], {"a": stored})), rel=1e-4)
        assert reached < 0.6 * float(loss([], {"a": rounded(weight, form)}))


def test_what_is_no_better_is_not_kept() -> None:
    weight = drawn(4, 16)
    rounding = Rounding(weight, IntegerFormat(4, 16), None)
    before = rounding.weight().detach().clone()

    def loss(_: Sequence[int], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return 1 + (weights["a"] - before).square().sum() + 0 * weights["a"].sum()

    assert learn({"a": rounding}, loss, 1, draw_all(), 20) == 1.0
    assert torch.equal(rounding.weight(), before)


def test_every_batch_is_drawn_before_one_is_drawn_again() -> None:
    draws = _draws([1, 2, 3, 2], 4, torch.Generator().manual_seed(0))
    found = [next(draws) for _ in range(40)]
    flat = [batch for each in found for batch in each]
    for start in range(0, len(flat) - 4, 4):
        assert sorted(flat[start : start + 4]) == [0, 1, 2, 3]
    sizes = {sum([1, 2, 3, 2][batch] for batch in each) for each in found}
    assert min(sizes) >= 4 and max(sizes) <= 6


@dataclass(frozen=True, kw_only=True)
class Watched(QuantizeAutoround):
    """Notes the blocks; dies before one."""

    calibration: str = CALIBRATION
    steps: int = 12
    blocks: list[CalibratedBlock] = field(default_factory=list, compare=False)
    dies_at: str = ""

    def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Note the block."""
        if block.name == self.dies_at:
            raise KeyboardInterrupt
        self.blocks.append(block)
        return super().quantize_block(block, ctx)


def hidden(model: Model, block: str) -> torch.Tensor:
    """Return what reaches a block of the first text."""
    found: list[torch.Tensor] = []

    def forward(module: torch.nn.Module) -> None:
        hook = module.get_submodule(block).register_forward_pre_hook(lambda _, args: found.append(args[0]))
        module(input_ids=torch.tensor([TEXTS[0]]))
        hook.remove()

    list(walk(Skeleton(model), [forward]))
    return found[0]


def test_a_block_is_shown_what_would_reach_it_had_nothing_been_quantized(workshop: Workshop, tmp_path: Path) -> None:
    model, step = workshop.model("llama"), Watched(steps=1, batch=2, context=16)
    step.run(model, workshop.context(tmp_path, model))
    last = step.blocks[-1]
    originals = [args[0] for args, _ in last.originals if args[0].shape[1] == len(TEXTS[0])]
    torch.testing.assert_close(originals[0][:1], hidden(model, last.name), rtol=1e-5, atol=1e-5)  # float32 sums
    assert not torch.allclose(last.originals[0][0][0], last.batches[0][0][0], atol=1e-3)
    assert {len(args[0]) for args, _ in last.batches} <= {1, 2, 3, 4}  # 32 tokens of 8, 9 or 10 each


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_model_is_nearer_than_rounded_to_nearest(workshop: Workshop, tmp_path: Path, name: str) -> None:
    model, folder = workshop.model(name), tmp_path / "learned"
    folder.mkdir()
    ctx = workshop.context(folder, model)
    step = Watched(activations="float", format="int2", steps=40)
    result = step.run(model, ctx)
    step.ensures(model, result.model, ctx)
    assert result.changes["layers_kept_rtn"] == 0
    nearest = workshop.run(name, QuantizeRtn(activations="float", format="int2")).model
    last = Skeleton(model).blocks[-1]
    want, *got = (hidden(each, last) for each in (model, nearest, result.model))
    assert (got[1] - want).norm() < 0.8 * (got[0] - want).norm()


def test_a_killed_run_makes_the_bytes_of_a_whole_one_another_seed_others(workshop: Workshop, tmp_path: Path) -> None:
    from dataclasses import replace

    model = workshop.model("llama")
    for name in ("whole", "killed", "other"):
        (tmp_path / name).mkdir()
    Watched(batch=2, context=10).run(model, workshop.context(tmp_path / "whole", model))
    with pytest.raises(KeyboardInterrupt):
        Watched(batch=2, context=10, dies_at="model.layers.1").run(model, workshop.context(tmp_path / "killed", model))
    again = Watched(batch=2, context=10)
    again.run(model, workshop.context(tmp_path / "killed", model))
    assert [block.name for block in again.blocks] == ["model.layers.1"]
    assert file_hashes(tmp_path / "killed") == file_hashes(tmp_path / "whole")
    Watched(batch=2, context=10).run(model, replace(workshop.context(tmp_path / "other", model), seed=1))
    assert file_hashes(tmp_path / "other") != file_hashes(tmp_path / "whole")


def test_options_out_of_range_are_refused() -> None:
    for name in ("steps", "batch"):
        with pytest.raises(ValueError, match=rf"^{name}: got 0, expected at least 1"):
            QuantizeAutoround(calibration=CALIBRATION, **{name: 0})  # type: ignore[arg-type]


def test_bfloat16_learns_something_else_of_the_same_form(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    result = Watched(precision="bfloat16", steps=3).run(model, workshop.context(tmp_path, model))
    assert all(error.output for error in read_errors(result.model.folder).values())
