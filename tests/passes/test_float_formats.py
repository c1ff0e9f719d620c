"""Float formats: bit for bit what ml_dtypes makes of the numbers, the rules of scales, what is stored."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from passes._float_formats import E2M1, E4M3, FloatFormat, Fp8, Minifloat, Mxfp4, Nvfp4
from passes._formats import Scales, pack, round_to_nearest, rows_of, search_clip, unpack

DTYPES = ((E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn))
FORMATS = (Nvfp4(), Mxfp4(), Fp8("channel"), Fp8(32))
quick = settings(max_examples=30, deadline=None)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Matrices up to [4, 70] over ten orders of magnitude, some values zero, some groups far below the others."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 70)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-6, 4))
    weight[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.97]))] = 0
    weight[:, 32:] *= draw(st.sampled_from([1.0, 1e-3, 1e-9]))
    return weight


def bits_of(values: torch.Tensor, dtype: Any) -> np.ndarray:
    """Return the bits that ml_dtypes rounds float32 values to, those beyond its largest number to that."""
    largest = float(ml_dtypes.finfo(dtype).max)
    rounded: np.ndarray = values.clamp(-largest, largest).numpy().astype(dtype).view(np.uint8)
    return rounded


@pytest.mark.parametrize(("grid", "dtype"), DTYPES)
def test_bits_stand_for_the_numbers_they_stand_for_elsewhere(grid: Minifloat, dtype: Any) -> None:
    bits = np.arange(1 << grid.bits, dtype=np.uint8)
    assert np.array_equal(grid.table().numpy(), bits.view(dtype).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize(("grid", "dtype"), DTYPES)
@quick
@given(data=st.data())
def test_rounding_is_that_of_ml_dtypes_bit_for_bit(grid: Minifloat, dtype: Any, data: st.DataObject) -> None:
    numbers = st.floats(width=32, allow_nan=False) | st.floats(-1.5 * grid.largest, 1.5 * grid.largest, width=32)
    values = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=50)))
    assert np.array_equal(grid.encoded(grid.nearest(values)).numpy(), bits_of(values, dtype))


@pytest.mark.parametrize(("grid", "dtype"), DTYPES)
def test_ties_and_their_neighbours_round_as_in_ml_dtypes(grid: Minifloat, dtype: Any) -> None:
    numbers = grid.table()[: 1 << (grid.bits - 1)]
    numbers = numbers[numbers.isfinite()]
    ties = (numbers[1:] + numbers[:-1]) / 2
    around = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(torch.inf)), numbers])
    values = torch.cat([around, -around, torch.tensor([1e9, -torch.inf])])
    assert np.array_equal(grid.encoded(grid.nearest(values)).numpy(), bits_of(values, dtype))


def test_halves_go_to_the_even_mantissa_and_what_is_too_large_to_the_largest() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, 1e6, -0.25, -5.0])
    assert E2M1.nearest(values).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 6, 0, -4]
    assert E2M1.encoded(E2M1.nearest(values)).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7, 7, 8, 14]


def test_nvfp4_of_a_block_worked_by_hand() -> None:
    weight = torch.tensor([[12.0, 6.0, -4.0, 1.1] + [0.0] * 12 + [3.0, -0.6] + [0.0] * 14])
    form = Nvfp4().for_weight(weight)
    stored = round_to_nearest(weight, form)
    assert stored["tensor_scale"].item() == pytest.approx(12 / 2688)  # 448 * 6
    # Blocks reach 12 and 3, in scales of the whole 448 and 112: both are E4M3 numbers (2^8 * 1.75 and 2^6 * 1.75).
    assert stored["scales"].tolist() == [[0b0_1111_110, 0b0_1101_110]]
    # 12 / 2 = 6, 3, -2, 0.55 -> 0.5; then 3 / 0.5 = 6 and -1.2 -> -1.
    assert stored["qweight"][0, :, 0].tolist() == [0b0101_0111, 0b1010_0111]
    assert stored["qweight"][0, 0, 1].item() == 0b0001_1100
    want = [12.0, 6.0, -4.0, 1.0] + [0.0] * 12 + [3.0, -0.5] + [0.0] * 14
    torch.testing.assert_close(form.load(stored, 32)[0], torch.tensor(want), rtol=1e-6, atol=0)  # 12 / 2688 is rounded


def test_mxfp4_of_a_block_worked_by_hand() -> None:
    weight = torch.tensor([[7.5, 2.4, -0.4, 0.1] + [0.0] * 28])
    stored = round_to_nearest(weight, Mxfp4())
    assert stored["scales"].tolist() == [[127]]  # floor(log2(7.5)) - 2 = 0: the scale is 1, and 7.5 becomes 6
    assert Mxfp4().load(stored, 32)[0, :4].tolist() == [6, 2, -0.5, 0]
    searched = round_to_nearest(weight, Mxfp4(), search_clip(weight, Mxfp4()))
    assert searched["scales"].tolist() == [[128]]  # 8, 2, -0 and 0 lose 0.57; 6, 2, -0.5 and 0 lose 2.43
    assert Mxfp4().load(searched, 32)[0, :4].tolist() == [8, 2, 0, 0]


@quick
@given(weight=weights())
def test_scales_of_mxfp4_are_those_of_the_specification(weight: torch.Tensor) -> None:
    reach = Mxfp4().grouped(weight).abs().amax(-1).numpy()
    stored = round_to_nearest(weight, Mxfp4())["scales"].numpy()
    with np.errstate(divide="ignore"):
        exponents = np.where(reach == 0, 0, np.floor(np.log2(reach.astype(np.float64))) - 2)
    assert np.array_equal(stored.view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 2.0**exponents)


@quick
@given(weight=weights())
def test_scales_of_nvfp4_are_e4m3_numbers_of_ml_dtypes(weight: torch.Tensor) -> None:
    form = Nvfp4().for_weight(weight)
    stored = round_to_nearest(weight, form)
    assert form.tensor_scale is not None
    wanted = form.grouped(weight).abs().amax(-1) / 6 / form.tensor_scale
    smallest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).smallest_subnormal)
    assert np.array_equal(stored["scales"].numpy(), bits_of(wanted.clamp(min=smallest), ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@quick
@given(weight=weights(), is_searched=st.booleans())
def test_what_is_stored_is_worth_what_its_numbers_are(
    form: FloatFormat, weight: torch.Tensor, is_searched: bool
) -> None:
    rows, features = weight.shape
    own = form.for_weight(weight)
    groups = own.grouped(weight)
    scales = search_clip(weight, form) if is_searched else own.fit(groups)
    codes = own.round(groups, scales)
    stored = own.store(codes, scales)
    assert torch.equal(form.load(stored, features), own.value(codes, scales).flatten(1)[:, :features])
    assert {name: (tuple(each.shape), str(each.dtype)[6:]) for name, each in stored.items()} == form.shapes(
        rows, features
    )
    assert sum(each.nbytes for each in stored.values()) == form.bytes(rows, features)
    assert form.scales(stored).isfinite().all()
    assert (form.scales(stored) > 0).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@quick
@given(weight=weights())
def test_no_number_of_the_grid_is_nearer(form: FloatFormat, weight: torch.Tensor) -> None:
    own = form.for_weight(weight)
    groups = own.grouped(weight)
    scales = own.fit(groups)
    numbers = form.grid.table()
    numbers = numbers[numbers.isfinite()]
    error = (own.value(own.round(groups, scales), scales) - groups).abs()
    least = (numbers * scales.scale[..., None] - groups[..., None]).abs().amin(-1)
    assert (error <= least + 1e-6 * groups.abs().amax()).all()  # float32: a quotient and a product of 6e-8 each


@quick
@given(weight=weights())
def test_a_search_of_mxfp4_tries_the_neighbouring_exponents(weight: torch.Tensor) -> None:
    form, groups = Mxfp4(), Mxfp4().grouped(weight)

    def loss(scales: Scales) -> torch.Tensor:
        return (form.value(form.round(groups, scales), scales) - groups).square().sum(-1)

    plain = form.fit(groups)
    chosen = search_clip(weight, form)
    others = [Scales(plain.scale * factor, plain.zero) for factor in (0.5, 1.0, 2.0)]
    best = torch.stack([loss(each) for each in others]).amin(0)
    assert (loss(chosen)[plain.scale[..., 0] > 1e-30] <= best[plain.scale[..., 0] > 1e-30] * (1 + 1e-5)).all()


def test_numbers_are_packed_as_onnx_packs_them() -> None:
    values = np.array([0.5, -6.0, 3.0, 1.0], np.float32)
    packed = pack(E2M1.encoded(torch.tensor(values)), 4)
    assert packed.numpy().tobytes() == numpy_helper.from_array(values.astype(ml_dtypes.float4_e2m1fn)).raw_data
    assert torch.equal(E2M1.table()[unpack(packed, 4).int()], torch.tensor(values))


def test_a_format_that_has_a_scale_for_the_whole_keeps_it() -> None:
    form = Nvfp4().for_weight(torch.ones(1, 16))
    corrected = 3 * torch.ones(1, 16)  # what a method makes of columns that it has not rounded yet
    scales = search_clip(corrected, form)
    codes = form.round(form.grouped(corrected), scales)
    stored = form.store(codes, scales)
    assert torch.equal(form.load(stored, 16), form.value(codes, scales).flatten(1))


def test_rows_of_what_is_stored_keep_the_scale_of_the_whole() -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    stored = round_to_nearest(weight, Nvfp4())
    part = Nvfp4().load(rows_of(stored, slice(2, 5)), 48)
    assert torch.equal(part, Nvfp4().load(stored, 48)[2:5])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_weight_that_is_no_number_leaves_a_scale_that_is_none(form: FloatFormat, value: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 40] = value
    assert not form.scales(round_to_nearest(weight, form)).isfinite().all()
