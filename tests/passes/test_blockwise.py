"""The calibrated walk: what reaches a block, what a killed run leaves, and what is said of a method's errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tiny_models import CALIBRATION, TEXTS, Workshop, file_hashes

from passes._blockwise import CalibratedBlock
from passes._errors import read_errors
from passes._formats import round_to_nearest
from passes._quantized import QuantizedLayer, QuantizedLinear
from passes._quantizer import CalibratedQuantizer
from passes._skeleton import Skeleton
from passes._walk import walk
from passes.base import Context, PassError, PassResult
from passes.quantize_rtn import QuantizeRtn

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Tried(CalibratedQuantizer):
    """Rounds to nearest, `spoilt` layers with scales that are twice too large, and dies before block `dies_at`."""

    calibration: str = CALIBRATION
    spoilt: tuple[str, ...] = ()
    dies_at: str = ""
    blocks: list[CalibratedBlock] = field(default_factory=list, compare=False)

    def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Note the block."""
        if block.name == self.dies_at:
            raise KeyboardInterrupt
        self.blocks.append(block)
        layers = {}
        for name, spec in block.specs.items():
            weight, form = block.weight(name), spec.weight_format
            scales = form.fit(form.grouped(weight), 2 if name in self.spoilt else 1)
            layers[name] = QuantizedLayer(spec, round_to_nearest(weight, form, scales))
        return layers


def run(workshop: Workshop, step: CalibratedQuantizer, folder: Path, name: str = "llama") -> PassResult:
    model = workshop.model(name)
    return step.run(model, workshop.context(folder, model))


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("embedding", ["int4", "float"])
def test_a_block_is_reached_by_what_the_model_before_it_makes_as_quantized(
    workshop: Workshop, tmp_path: Path, activations: str, embedding: str
) -> None:
    step = Tried(activations=activations, embedding=embedding, lm_head=embedding)  # type: ignore[arg-type]
    result = run(workshop, step, tmp_path)
    text = TEXTS[0]
    want: list[torch.Tensor] = []

    def forward(module: torch.nn.Module) -> None:
        layer = module.get_submodule("model.layers.1")
        hook = layer.register_forward_pre_hook(lambda _, args: want.append(args[0]))
        module(input_ids=torch.tensor([text]))
        hook.remove()

    list(walk(Skeleton(result.model), [forward]))
    assert [block.name for block in step.blocks] == ["model.layers.0", "model.layers.1"]
    reached = {args[0].shape[1]: args[0] for args, _ in step.blocks[1].batches}
    # The same numbers, whose biases are added in one step with the product here: 1e-7 of each.
    torch.testing.assert_close(reached[len(text)][:1], want[0], rtol=1e-5, atol=1e-5)


def test_every_token_of_every_text_is_watched(workshop: Workshop, tmp_path: Path) -> None:
    counted: dict[str, int] = {}

    class Watching(Tried):
        def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
            def see(name: str, x: torch.Tensor) -> None:
                counted[name] = counted.get(name, 0) + x.flatten(0, -2).shape[0]

            block.watch([UP, DOWN] if block.name.endswith("1") else [], see)
            assert [len(x) for x in block.sample([f"{block.name}.mlp.up_proj"], 50).values()] == [50]
            return super().quantize_block(block, ctx)

    result = run(workshop, Watching(), tmp_path)
    assert counted == {UP: sum(map(len, TEXTS)), DOWN: sum(map(len, TEXTS))}
    assert result.changes["calibration_tokens"] == sum(map(len, TEXTS))


def test_a_killed_run_goes_on_where_it_stopped_and_makes_the_same_bytes(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    run(workshop, Tried(), tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(workshop, Tried(dies_at="model.layers.1"), tmp_path / "killed")
    resumed = Tried()
    run(workshop, resumed, tmp_path / "killed")
    assert [block.name for block in resumed.blocks] == ["model.layers.1"]
    assert file_hashes(tmp_path / "killed") == file_hashes(tmp_path / "whole")


def test_a_layer_that_is_worse_than_rounded_to_nearest_is_kept_as_that(workshop: Workshop, tmp_path: Path) -> None:
    result = run(workshop, Tried(spoilt=(DOWN,)), tmp_path)
    nearest = workshop.run("llama", QuantizeRtn()).model
    for leaf in ("qweight", "scales"):
        assert torch.equal(Skeleton(result.model).read(f"{DOWN}.{leaf}"), Skeleton(nearest).read(f"{DOWN}.{leaf}"))
    assert result.changes["layers_kept_rtn"] == 1
    assert f"1 layer ({DOWN}) rounded to nearest, which was closer" in result.note
    errors = read_errors(tmp_path)
    assert [name for name, error in errors.items() if error.is_kept_rtn] == [DOWN]


def test_the_errors_of_a_layer_are_those_of_its_weight_and_of_its_output(workshop: Workshop, tmp_path: Path) -> None:
    result = run(workshop, Tried(activations="float"), tmp_path)
    model = workshop.model("llama")
    name, block = "model.layers.0.self_attn.q_proj", "model.layers.0"
    inputs: list[torch.Tensor] = []

    def forward(module: torch.nn.Module) -> None:
        hook = module.get_submodule(name).register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].flatten(0, 1))
        )
        for text in TEXTS:
            module(input_ids=torch.tensor([text]))
        hook.remove()

    list(walk(Skeleton(model), [forward]))
    before, after = Skeleton(model), Skeleton(result.model)
    with after.loaded(block):
        layer = after.module.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        off = layer.dequantized(slice(None)) - before.read(f"{name}.weight")
    weight, x = before.read(f"{name}.weight"), torch.cat(inputs)
    hessian = x.T @ x
    error = read_errors(tmp_path)[name]
    # float32 sums of a few thousand squares in two orders: 1e-6
    assert error.weight == pytest.approx(float(off.norm() / weight.norm()), rel=1e-5)
    share = (off @ hessian * off).sum() / (weight @ hessian * weight).sum()
    assert error.output == pytest.approx(float(share.sqrt()), rel=1e-4)
    worst = max(read_errors(tmp_path).items(), key=lambda item: item[1].output or 0)
    assert f"worst layer {worst[0]}: output off by {worst[1].output:.1%}" in result.note


def test_what_was_folded_into_a_layer_is_no_error_of_it(workshop: Workshop, tmp_path: Path) -> None:
    class Folding(Tried):
        def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
            layers = dict(super().quantize_block(block, ctx))
            for name, layer in layers.items():
                weight, form = block.weight(name), layer.spec.weight_format
                rows, columns = torch.full((len(weight),), 2.0), torch.full((weight.shape[1],), 4.0)
                stored = round_to_nearest(8 * weight, form)  # powers of two change no rounding
                layers[name] = replace(layer, stored=stored, rows=rows, columns=columns)
            return layers

    (tmp_path / "folded").mkdir()
    run(workshop, Folding(), tmp_path / "folded")
    folded = read_errors(tmp_path / "folded")[UP]
    assert folded.weight == folded.weight_rtn and 0 < folded.weight < 0.2


def test_weights_that_are_not_finite_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    class Broken(Tried):
        def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
            layers = dict(super().quantize_block(block, ctx))
            layer = layers[block.name + ".mlp.up_proj"]
            layer.stored["scales"][0, 0] = torch.nan
            return layers

    with pytest.raises(PassError, match=r"^broken: model.layers.0.mlp.up_proj: its error is nan; its weights or"):
        run(workshop, Broken(), tmp_path)


def test_gradients_may_be_taken_of_what_reaches_a_block(workshop: Workshop, tmp_path: Path) -> None:
    class Training(Tried):
        def quantize_block(self, block: CalibratedBlock, ctx: Context) -> Mapping[str, QuantizedLayer]:
            with torch.enable_grad():
                gain = torch.ones(64, requires_grad=True)
                (args, options), *_ = block.batches
                out = block.module.forward(args[0] * gain, *args[1:], **options)
                (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
            assert gain.grad is not None and gain.grad.abs().max() > 0
            return super().quantize_block(block, ctx)

    run(workshop, Training(), tmp_path)


@pytest.mark.parametrize("name", ["bert", "gpt2", "albert"])
def test_families_go_through_the_walk(workshop: Workshop, tmp_path: Path, name: str) -> None:
    if name == "gpt2":  # its layers are no nn.Linear
        with pytest.raises(PassError, match="matched none of 2 blocks"):
            Tried().requires(workshop.model(name))
        return
    step = Tried()
    result = run(workshop, step, tmp_path, name)
    step.ensures(workshop.model(name), result.model, workshop.context(tmp_path, workshop.model(name)))
    assert [block.name for block in step.blocks] == Skeleton(workshop.model(name)).blocks
    assert all(error.output for error in read_errors(tmp_path).values())


def test_importance_clips_what_seldom_counts(workshop: Workshop, tmp_path: Path) -> None:
    results = {}
    for clip in ("none", "mse", "importance"):
        folder = tmp_path / clip
        folder.mkdir()
        calibration = CALIBRATION if clip == "importance" else None
        run(workshop, QuantizeRtn(clip=clip, calibration=calibration, format="int2"), folder)  # type: ignore[arg-type]
        results[clip] = read_errors(folder)
    assert results["mse"][DOWN].weight < results["none"][DOWN].weight
    important = results["importance"][DOWN]
    assert important.output is not None and important.output_rtn is not None
    assert important.output < important.output_rtn
    assert important.weight > results["mse"][DOWN].weight
