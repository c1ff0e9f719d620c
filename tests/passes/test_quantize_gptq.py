"""quantize_gptq: the rounding by hand and beside the paper's own algorithm, what it gains, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CALIBRATION, Workshop

from passes._errors import read_errors
from passes._float_formats import Mxfp4, Nvfp4
from passes._formats import IntegerFormat, Scales, WeightFormat, search_clip
from passes._safetensors import read_tensor, tensor_index, write_safetensors
from passes._skeleton import Skeleton
from passes.base import Model, PassError
from passes.quantize_gptq import QuantizeGptq, rounded_in_turn, solved, unit_factor
from passes.quantize_rtn import QuantizeRtn


def correlated(features: int, seed: int, tokens: int = 200) -> torch.Tensor:
    """Return inputs [T, M] whose features have much to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(1, features // 4), generator=generator)
    mixed = few @ torch.randn(few.shape[1], features, generator=generator)
    return mixed + 0.3 * torch.randn(tokens, features, generator=generator)


def output_loss(weight: torch.Tensor, restored: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (restored - weight).T).square().sum())


def gptq(weight: torch.Tensor, x: torch.Tensor, form: WeightFormat, damping: float = 0.01) -> torch.Tensor:
    codes, scales = solved(weight, x.T @ x, form, damping)
    return form.load(form.store(codes, scales), weight.shape[1])


def nearest(weight: torch.Tensor, x: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    scales = search_clip(weight, form, x.square().sum(0))
    return form.load(form.store(form.round(form.grouped(weight), scales), scales), weight.shape[1])


def test_two_features_worked_by_hand() -> None:
    weight = torch.tensor([[0.4], [0.4]])  # by input feature, one output
    gram = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    # H = U D U^T with U = [[1, 1/2], [0, 1]] and D = diag(7/2, 2)
    feedback, cost = unit_factor(gram, torch.arange(2), 0.0)
    torch.testing.assert_close(cost, torch.tensor([3.5, 2.0]))
    torch.testing.assert_close(feedback, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    form, ones = IntegerFormat(4, 16), Scales(torch.ones(1, 1, 1), torch.full((1, 1, 1), 8.0))
    codes, lost, corrected = rounded_in_turn(weight, feedback, cost, form, ones, torch.arange(2))
    # 0.4 becomes 0; half of the error goes to the second: 0.4 + 0.2 = 0.6 becomes 1, where nearest would be 0
    assert (codes - 8).tolist() == [[0.0], [1.0]]
    assert corrected.flatten().tolist() == pytest.approx([0.4, 0.6])
    error = torch.tensor([0.4, -0.6])
    assert lost.item() == pytest.approx(float(error @ gram @ error)) == pytest.approx(3.5 * 0.4**2 + 2 * 0.4**2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), features=st.sampled_from([3, 16, 150]), bits=st.sampled_from([2, 4]))
def test_it_is_the_rounding_of_the_paper(seed: int, features: int, bits: int) -> None:
    weight = torch.randn(5, features, generator=torch.Generator().manual_seed(seed)).double()
    gram = correlated(features, seed).double()
    gram = gram.T @ gram
    damped = gram + torch.diag(0.01 * gram.diagonal())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    form = IntegerFormat(bits, features)  # type: ignore[arg-type]
    scales = form.fit(weight[:, None])
    scale, zero = (each[:, 0] for each in scales)
    left, expected = weight.clone(), torch.empty_like(weight)
    for k in range(features):  # algorithm 1 of arXiv:2210.17323, without blocks
        expected[:, k] = form.round(left[:, k : k + 1], Scales(scale, zero))[:, 0]
        error = (left[:, k] - (expected[:, k] - zero[:, 0]) * scale[:, 0]) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
    feedback, cost = (each.double() for each in unit_factor(gram, torch.arange(features), 0.01))
    codes, _, _ = rounded_in_turn(weight.T.contiguous(), feedback, cost, form, scales, torch.arange(features))
    # U is kept in float32, so that a value within 1e-5 of the middle of two may become the other, and what follows.
    assert (expected != codes.T).double().mean() < 0.02


@pytest.mark.parametrize("group", [16, 32, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_move_less_than_rounded_to_nearest(group: int, symmetric: bool) -> None:
    weight, x = torch.randn(8, 72, generator=torch.Generator().manual_seed(1)), correlated(72, 2)
    form = IntegerFormat(4, group, symmetric)
    ours, plain = gptq(weight, x, form), nearest(weight, x, form)
    assert ours.shape == weight.shape
    assert output_loss(weight, ours, x) < 0.5 * output_loss(weight, plain, x)


def test_features_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest() -> None:
    weight, form = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), IntegerFormat(4, 16)
    x = torch.eye(32)
    assert torch.equal(gptq(weight, x, form), nearest(weight, x, form))


def test_a_feature_that_is_always_zero_is_rounded_to_nearest_and_moves_no_other() -> None:
    weight, x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), correlated(32, 0)
    x[:, [3, 20]] = 0
    form = IntegerFormat(4, 32)
    codes, scales = solved(weight, x.T @ x, form, 0.01)
    assert torch.equal(codes[..., [3, 20]], form.round(weight[:, None, [3, 20]], scales))
    restored = gptq(weight, x, form)
    moved = weight.clone()
    moved[:, 3] = 0.01
    assert torch.equal(gptq(moved, x, form)[:, 4:20], restored[:, 4:20])


def test_inputs_that_are_copies_of_each_other_want_damping() -> None:
    one = torch.ones(2, 2)
    with pytest.raises(PassError, match=r"^quantize_gptq: damping: got 0.0, with which X\^T X has no Cholesky factor"):
        unit_factor(one, torch.arange(2), 0.0)
    assert unit_factor(one, torch.arange(2), 0.01)[0][0, 1] == pytest.approx(1 / 1.01)
    with pytest.raises(ValueError, match=r"^damping: got -0.1, expected 0 or more"):
        QuantizeGptq(calibration=CALIBRATION, damping=-0.1)


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_layers_of_a_model_come_closer_than_rounded_to_nearest(workshop: Workshop, name: str) -> None:
    step = QuantizeGptq(calibration=CALIBRATION, format="int4", group_size=32)
    result = workshop.run(name, step)
    step.ensures(workshop.model(name), result.model, workshop.context(Path(), workshop.model(name)))
    errors = read_errors(result.model.folder)
    closer = [error.output < error.output_rtn for error in errors.values() if error.output and error.output_rtn]
    assert len(closer) == len(errors) and sum(closer) > 0.9 * len(errors)


def test_tables_are_clipped_and_layers_of_other_formats_are_rounded_too(workshop: Workshop) -> None:
    from passes._override import Override

    options = {"embedding": "int4", "lm_head": "int4", "overrides": (Override(layers="*.down_proj", format="int2"),)}
    ours = workshop.run("llama", QuantizeGptq(calibration=CALIBRATION, **options)).model  # type: ignore[arg-type]
    plain = workshop.run("llama", QuantizeRtn(**options)).model  # type: ignore[arg-type]
    one, other = read_errors(ours.folder), read_errors(plain.folder)
    table = "model.embed_tokens"
    assert 0 < one[table].weight < other[table].weight
    down = one["model.layers.0.mlp.down_proj"]
    assert down.output and down.output_rtn and 0.1 < down.output < 0.8 * down.output_rtn


def test_values_that_are_not_finite_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    model = broken(workshop.model("llama"), tmp_path, "model.layers.1.input_layernorm.weight")
    (tmp_path / "work").mkdir()
    ctx = workshop.context(tmp_path / "work", model)
    with pytest.raises(PassError, match=r"^quantize_gptq: model.layers.1.self_attn.q_proj: its input holds NaN or inf"):
        QuantizeGptq(calibration=CALIBRATION).run(model, ctx)


def broken(model: Model, folder: Path, name: str) -> Model:
    """Return a copy of a model with NaN in one tensor."""
    for path in model.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    entries = tensor_index(folder)
    tensors = {each: read_tensor(entry) for each, entry in entries.items()}
    tensors[name][0] = torch.nan
    write_safetensors(folder / "model.safetensors", tensors, {})
    return replace(model, folder=folder)


def test_layers_that_read_the_same_input_share_its_products(workshop: Workshop, tmp_path: Path) -> None:
    seen: list[list[list[str]]] = []

    class Looking(QuantizeGptq):
        def quantize_block(self, block, ctx):  # type: ignore[no-untyped-def]
            seen.append([[name.rpartition(".")[2] for name in names] for names in block.readers()])
            return super().quantize_block(block, ctx)

    model = workshop.model("llama")
    Looking(calibration=CALIBRATION).run(model, workshop.context(tmp_path, model))
    attention = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert seen == [[*attention, ["gate_proj", "up_proj"], ["down_proj"]]] * len(Skeleton(model).blocks)


def test_scales_are_found_again_for_what_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)), correlated(128, 2)
    form, losses = IntegerFormat(2, 64), []
    for refits in (0, 2):
        monkeypatch.setattr("passes.quantize_gptq.REFITS", refits)
        losses.append(output_loss(weight, gptq(weight, x, form), x))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("form", [Nvfp4(), Mxfp4()], ids=["nvfp4", "mxfp4"])
def test_numbers_of_four_bits_with_a_point_are_rounded_in_turn_too(form: WeightFormat) -> None:
    weight, x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)), correlated(128, 2)
    form = form.for_weight(weight)
    assert output_loss(weight, gptq(weight, x, form), x) < 0.5 * output_loss(weight, nearest(weight, x, form), x)
