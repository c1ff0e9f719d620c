"""quantize_awq: which scales are tried and chosen, that folding them in keeps the function, and what it gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny_models import CALIBRATION, TEXTS, Workshop, file_hashes

from passes._blockwise import CalibratedBlock
from passes._errors import read_errors
from passes._float_formats import Mxfp4, Nvfp4
from passes._formats import IntegerFormat, WeightFormat
from passes._quantized import QuantizedLayer
from passes._skeleton import Skeleton
from passes.base import Context, Model
from passes.quantize_awq import QuantizeAwq, Reader, _candidates, search_scales
from passes.quantize_rtn import QuantizeRtn

INT4 = IntegerFormat(4, 16)


@dataclass(frozen=True, kw_only=True)
class Watched(QuantizeAwq):
    """Keeps what it makes of each block, and how far the block's output is off once scales are folded in."""

    calibration: str = CALIBRATION
    made: dict[str, Mapping[str, QuantizedLayer | torch.Tensor]] = field(default_factory=dict, compare=False)
    moved: list[float] = field(default_factory=list, compare=False)
    dies_at: str = ""

    def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer | torch.Tensor]:
        """Fold, but round nothing, to see what folding does."""
        if block.name == self.dies_at:
            raise KeyboardInterrupt
        made = self.made[block.name] = super().quantize_block(block, ctx)
        before = list(block.run())
        for name, new in made.items():
            if isinstance(new, torch.Tensor):
                layer, _, leaf = name.rpartition(".")
                block.layer(layer).get_parameter(leaf).copy_(new)
            else:
                rows = 1 if new.rows is None else new.rows[:, None]
                block.weight(name).mul_(rows).mul_(1 if new.columns is None else new.columns)
        for one, other in zip(before, block.run(), strict=True):
            self.moved.append(float((other - one).abs().max() / (one.max() - one.min())))
        return made


@pytest.fixture(scope="module")
def outliers(workshop: Workshop) -> Model:
    """The function of a tiny model, in which two channels of every norm are 100 times larger, and read as smaller."""
    return workshop.with_outliers("llama", 100)


def some(form: WeightFormat = INT4) -> Reader:
    """Return a layer with one input of 64 that is 30 times larger than the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    x[:, 5] *= 30
    return Reader(torch.randn(16, 64, generator=generator), x.T @ x, form)


def test_scales_that_are_tried_by_hand() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.5]])
    reader = Reader(weight, torch.diag(torch.tensor([256.0, 1.0, 16.0, 1.0])), IntegerFormat(4, 16))
    tried = list(_candidates([reader], torch.arange(4), 4))
    half = next(scales for place, scales in enumerate(tried) if place == 20)  # both of step 10 of 20: alpha 1/2
    torch.testing.assert_close(half, torch.tensor([4.0, 1.0, 2.0, 1.0]) / 2)  # between 1/2 and 2
    both = tried[21] / tried[21][1]
    torch.testing.assert_close(both, torch.tensor([4.0, 1.0, 2.0, 2**0.5]))  # and what is small in its group is raised
    assert torch.equal(tried[0], torch.ones(4))


def test_repeated_channels_are_scaled_as_one_and_unread_ones_not_at_all() -> None:
    reader = some()
    channels = torch.arange(64) // 2  # of 34, of which two are read by nothing
    scales = search_scales([reader], channels, 34)
    assert scales.shape == (34,)
    assert scales.argmax() == 2
    assert scales[32] == scales[33] < scales[2]


@pytest.mark.parametrize("form", [INT4, IntegerFormat(4, 32, False), IntegerFormat(2, 64), Nvfp4(), Mxfp4()], ids=str)
def test_a_channel_that_matters_is_rounded_finer(form: WeightFormat) -> None:
    reader = some(form)
    scales = search_scales([reader], torch.arange(64), 64)
    assert scales.argmax() == 5
    assert reader.error(scales) < (0.5 if isinstance(form, IntegerFormat) else 0.7) * reader.error(torch.ones(64))


def test_without_a_channel_that_matters_more_nothing_is_scaled() -> None:
    weight = torch.arange(-8.0, 8.0).repeat(4, 1)  # on the grid of int4: no scales can be better than none
    assert torch.equal(search_scales([Reader(weight, torch.eye(16), INT4)], torch.arange(16), 16), torch.ones(16))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "bert"])
def test_folding_keeps_the_function_and_rounding_is_nearer_than_rtn(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    step, model = Watched(activations="float"), workshop.model(name)
    ctx = workshop.context(tmp_path, model)
    step.requires(model)
    result = step.run(model, ctx)
    step.ensures(model, result.model, ctx)
    assert max(step.moved) < 1e-5  # of the block's range: products of scaled float32
    errors = read_errors(tmp_path)
    assert sum(e.output or 0 for e in errors.values()) < 0.95 * sum(e.output_rtn or 0 for e in errors.values())
    folded = [layer for made in step.made.values() for layer in made.values() if isinstance(layer, QuantizedLayer)]
    assert sum(layer.columns is not None for layer in folded) == (2 if name == "bert" else len(folded))


def test_outliers_lose_less(workshop: Workshop, tmp_path: Path, outliers: Model) -> None:
    step = QuantizeAwq(calibration=CALIBRATION, group_size=64, activations="float")
    step.run(outliers, workshop.context(tmp_path, outliers))
    for name, error in read_errors(tmp_path).items():
        if not name.endswith(("o_proj", "down_proj")):
            assert error.output and error.output_rtn and error.output < 0.7 * error.output_rtn, name


def test_an_excluded_layer_holds_back_its_norm(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    step = QuantizeAwq(calibration=CALIBRATION, exclude=("*.k_proj", "*.up_proj"))
    result = step.run(model, workshop.context(tmp_path, model))
    before, after = Skeleton(model), Skeleton(result.model)
    same = {
        name for name in before.entries if name in after.entries and torch.equal(before.read(name), after.read(name))
    }
    norms = {
        f"model.layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert norms < same
    assert read_errors(tmp_path).keys() == after.specs.keys()


def test_a_killed_run_makes_the_bytes_of_a_whole_one(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    QuantizeAwq(calibration=CALIBRATION).run(model, workshop.context(tmp_path / "whole", model))
    with pytest.raises(KeyboardInterrupt):
        Watched(dies_at="model.layers.1").run(model, workshop.context(tmp_path / "killed", model))
    again = Watched()
    again.run(model, workshop.context(tmp_path / "killed", model))
    assert again.made.keys() == {"model.layers.1"}
    assert file_hashes(tmp_path / "killed") == file_hashes(tmp_path / "whole")


def test_answers_are_nearer_than_those_of_rtn(workshop: Workshop, outliers: Model, tmp_path: Path) -> None:
    from passes._walk import walk

    def logits(model: Model) -> torch.Tensor:
        run = lambda module: module(input_ids=torch.tensor([TEXTS[1]])).logits  # noqa: E731
        answer: torch.Tensor = next(walk(Skeleton(model), [run]))[1]
        return answer

    want, errors = logits(outliers), []
    for step in (QuantizeRtn(activations="float"), QuantizeAwq(calibration=CALIBRATION, activations="float")):
        (tmp_path / step.name()).mkdir()
        made = step.run(outliers, workshop.context(tmp_path / step.name(), outliers)).model
        errors.append(float((logits(made) - want).norm()))
    assert errors[1] < 0.8 * errors[0]
