"""Integer formats: the arithmetic by hand, its bounds on any weights, and the layout's size."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes._formats import (
    CHUNK_ELEMENTS,
    SHRINKS,
    IntegerFormat,
    Scales,
    pack,
    quantize_activations,
    round_to_nearest,
    row_chunks,
    search_clip,
    unpack,
)

ROUNDING = 1e-5
"""Float32 error, in units of the group's largest magnitude: a quotient, a product and a sum of 1e-7 each, times 2^bits
for the error of a zero point's scale at 8 bits."""

forms = st.builds(
    IntegerFormat,
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([16, 32, "channel"]),
    symmetric=st.booleans(),
)
quick = settings(max_examples=150, deadline=None)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Matrices up to [4, 70] over ten orders of magnitude, some values zero, some rows of one sign."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 70)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-6, 4))
    weight[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.97]))] = 0
    return weight.abs() if draw(st.booleans()) else weight


def per_value(groups: torch.Tensor, form: IntegerFormat, features: int) -> torch.Tensor:
    """Return a number per block [N, G] as one per weight [N, M]."""
    return groups.repeat_interleave(form.block, 1)[:, :features]


def largest_of_group(weight: torch.Tensor, form: IntegerFormat) -> torch.Tensor:
    size = weight.shape[1] if form.group_size == "channel" else form.group_size
    padded = torch.nn.functional.pad(weight.abs(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    largest: torch.Tensor = padded.amax(-1).repeat_interleave(size, 1)[:, : weight.shape[1]]
    return largest


@quick
@given(bits=st.sampled_from([2, 4, 8]), data=st.data())
def test_unpacking_returns_what_was_packed(bits: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8 * rows, max_size=8 * rows))
    q = torch.tensor(values, dtype=torch.uint8).reshape(rows, 8)
    packed = pack(q, bits)
    assert packed.shape == (rows, bits)
    assert torch.equal(unpack(packed, bits), q)


def test_the_first_value_lies_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([3, 0, 1, 2], dtype=torch.uint8), 2).tolist() == [0b10_01_00_11]
    assert pack(torch.tensor([0xA, 0x5], dtype=torch.uint8), 4).tolist() == [0x5A]
    assert pack(torch.tensor([200, 7], dtype=torch.uint8), 8).tolist() == [200, 7]


def test_symmetric_int4_of_a_4x4_matrix_worked_by_hand() -> None:
    weight = torch.tensor([
        [-8.0, 4.0, 2.0, 7.0],  # extreme -8 -> -8: scale 1, all exact
        [4.0, -3.9, 1.0, 0.2],  # extreme 4 -> -8: scale -0.5; -3.9 -> 7.8 is clipped to 7, half a unit short
        [0.0, 0.0, 0.0, 0.0],  # no extreme: any scale serves, none is zero
        [0.5, 1.5, -8.0, 2.6],  # scale 1; halves go to the even neighbour
    ])  # fmt: skip
    form = IntegerFormat(4, 4)
    stored = round_to_nearest(weight, form)
    assert stored["scales"].tolist() == [[1.0], [-0.5], [1.0], [1.0]]
    assert unpack(stored["qweight"], 4).squeeze(1).tolist() == [
        [0, 12, 10, 15],
        [0, 15, 6, 8],
        [8, 8, 8, 8],
        [8, 10, 0, 11],
    ]
    assert stored["qweight"].squeeze(1).tolist()[0] == [0xC0, 0xFA]
    assert form.load(stored, 4).tolist() == [
        [-8.0, 4.0, 2.0, 7.0],
        [4.0, -3.5, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 2.0, -8.0, 3.0],
    ]


def test_int2_with_zero_points_of_a_4x4_matrix_worked_by_hand() -> None:
    weight = torch.tensor([
        [-1.0, 0.4, 1.2, 2.0],  # -1..2 in 3 steps: scale 1, zero point 1
        [0.0, 3.0, 5.8, 9.0],  # all positive: 0..9, scale 3, zero point 0
        [-6.0, -2.2, -4.0, -1.0],  # all negative: -6..0, scale 2, zero point 3
        [0.0, 0.0, 0.0, 0.0],
    ])  # fmt: skip
    form = IntegerFormat(2, 4, symmetric=False)
    stored = round_to_nearest(weight, form)
    assert stored["scales"].tolist() == [[1.0], [3.0], [2.0], [1.0]]
    assert unpack(stored["zero_points"], 2)[:, 0].tolist() == [1, 0, 3, 0]
    assert form.load(stored, 4).tolist() == [
        [-1.0, 0.0, 1.0, 2.0],
        [0.0, 3.0, 6.0, 9.0],
        [-6.0, -2.0, -4.0, 0.0],  # -1 lies between 0 and -2; q = round(-0.5) + 3 = 3, the even neighbour
        [0.0, 0.0, 0.0, 0.0],
    ]


@quick
@given(weight=weights(), form=forms)
def test_no_value_is_further_off_than_its_step_allows(weight: torch.Tensor, form: IntegerFormat) -> None:
    stored = round_to_nearest(weight, form)
    step = per_value(stored["scales"], form, weight.shape[1])
    error = (form.load(stored, weight.shape[1]) - weight).abs()
    # Rounding costs half a step; the symmetric range ends one step short of the middle, away from its extreme.
    steps = (weight / step - (form.middle - 1)).clamp(0.5, 1) if form.symmetric else torch.tensor(0.5)
    assert (error <= steps * step.abs() + ROUNDING * largest_of_group(weight, form)).all()


@quick
@given(weight=weights(), form=forms)
def test_zeros_stay_exact(weight: torch.Tensor, form: IntegerFormat) -> None:
    restored = form.load(round_to_nearest(weight, form), weight.shape[1])
    assert (restored[weight == 0] == 0).all()


@quick
@given(weight=weights(), form=forms)
def test_stored_tensors_have_the_shapes_dtypes_and_bytes_that_were_announced(
    weight: torch.Tensor, form: IntegerFormat
) -> None:
    rows, features = weight.shape
    stored = round_to_nearest(weight, form)
    shapes = {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in stored.items()}
    assert shapes == form.shapes(rows, features)
    assert sum(tensor.nbytes for tensor in stored.values()) == form.bytes(rows, features)


@pytest.mark.parametrize("symmetric", [True, False])
def test_channel_means_one_scale_for_a_whole_row_repeated_over_its_blocks(symmetric: bool) -> None:
    weight = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    form = IntegerFormat(8, "channel", symmetric)
    stored = round_to_nearest(weight, form)
    assert stored["scales"].shape == (3, 3)  # 300 features in blocks of 128
    assert (stored["scales"] == stored["scales"][:, :1]).all()
    extent = weight.abs().amax(1) / 128 if symmetric else (weight.amax(1) - weight.amin(1)) / 255
    torch.testing.assert_close(stored["scales"][:, 0].abs(), extent)


def test_the_padding_of_a_ragged_last_group_is_worth_nothing() -> None:
    weight = torch.full((2, 40), -3.0)
    form = IntegerFormat(4, 32, symmetric=False)
    stored = round_to_nearest(weight, form)
    assert stored["qweight"].shape == (2, 2, 16)
    whole = form.load(stored, 64)
    assert (whole[:, :40] == -3).all()
    assert (whole[:, 40:] == 0).all()


def test_activations_are_rounded_to_127_steps_of_their_block() -> None:
    x = torch.tensor([[127.0, 0.4, -63.6, 0.0, 2.54, 0.02, -0.028, 0.0]])
    assert quantize_activations(x, 4).tolist() == [
        [127.0, 0.0, -64.0, 0.0, pytest.approx(2.54), pytest.approx(0.02), pytest.approx(-0.02), 0.0]
    ]
    assert quantize_activations(torch.zeros(2, 5), 4).tolist() == [[0.0] * 5] * 2


@given(rows=st.integers(1, 300_000), features=st.integers(1, 2 * CHUNK_ELEMENTS))
def test_chunks_cover_every_row_once_and_stay_small(rows: int, features: int) -> None:
    rows = min(rows, 2000 * max(1, CHUNK_ELEMENTS // features))
    chunks = row_chunks(rows, features)
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == rows
    assert all((chunk.stop - chunk.start) * features <= max(features, CHUNK_ELEMENTS) for chunk in chunks)


def test_a_weight_of_several_chunks_is_rounded_as_its_rows_are() -> None:
    weight = torch.randn(3, CHUNK_ELEMENTS // 2, generator=torch.Generator().manual_seed(0))
    form = IntegerFormat(4, 256, symmetric=False)
    assert len(row_chunks(*weight.shape)) == 2
    whole, last = round_to_nearest(weight, form), round_to_nearest(weight[2:], form)
    assert all(torch.equal(whole[name][2:], last[name]) for name in whole)


BYTES = {
    (2, 16, True): "5d3870f3c0391ce4",
    (2, 16, False): "271681fbd4696bc1",
    (2, 128, True): "b60f4a9ce71b4aad",
    (2, 128, False): "856b69aaf5092642",
    (2, "channel", True): "c43b434a59f9f60b",
    (2, "channel", False): "95558101419b2777",
    (4, 16, True): "91b67e4353d9eb26",
    (4, 16, False): "1d2abe24c284e0ea",
    (4, 128, True): "a6302d16804a58c2",
    (4, 128, False): "9a64ab5e52d10e59",
    (4, "channel", True): "dc6c9700c2346366",
    (4, "channel", False): "8f80b047960430a0",
    (8, 16, True): "21f850541ca8ea0f",
    (8, 16, False): "388b6ab716720a0e",
    (8, 128, True): "6d2001212ca0032a",
    (8, 128, False): "df3137d86ad60c2e",
    (8, "channel", True): "626e240edb8f3347",
    (8, "channel", False): "22622c0d3e86b330",
}
"""Bits, group, symmetric -> the hash of all that is stored of one weight. Artifacts of users hold such bytes."""


@pytest.mark.parametrize(("bits", "group", "symmetric"), BYTES)
def test_rounding_makes_the_bytes_it_always_made(bits: Literal[2, 4, 8], group: Any, symmetric: bool) -> None:
    n = torch.arange(5 * 300).reshape(5, 300)
    weight = ((n * 7919 + n // 13) % 2003 - 1001).float() / 37
    weight[1, 3:40], weight[2], weight[3] = 0, weight[2].abs(), -weight[3].abs()
    stored = round_to_nearest(weight, IntegerFormat(bits, group, symmetric))
    content = b"".join(stored[name].numpy().tobytes() for name in sorted(stored))
    assert hashlib.sha256(content).hexdigest()[:16] == BYTES[bits, group, symmetric]


@quick
@given(weight=weights(), form=forms)
def test_what_is_stored_is_worth_what_its_codes_are(weight: torch.Tensor, form: IntegerFormat) -> None:
    groups = form.grouped(weight)
    scales = form.fit(groups)
    codes = form.round(groups, scales)
    restored = form.load(form.store(codes, scales), weight.shape[1])
    assert torch.equal(restored, form.value(codes, scales).flatten(1)[:, : weight.shape[1]])


@settings(max_examples=40, deadline=None)
@given(weight=weights(), form=forms, seed=st.none() | st.integers(0, 99))
def test_no_clip_of_the_search_loses_less_than_the_one_it_chose(
    weight: torch.Tensor, form: IntegerFormat, seed: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed or 0)
    importance = None if seed is None else torch.rand(weight.shape[1], generator=generator) ** 8
    groups, weighted = form.grouped(weight), 1 if importance is None else form.grouped(importance[None])

    def loss(scales: Scales) -> torch.Tensor:
        return ((form.value(form.round(groups, scales), scales) - groups) ** 2 * weighted).sum(-1)

    chosen = loss(search_clip(weight, form, importance))
    assert all((chosen <= loss(form.fit(groups, shrink)) * (1 + ROUNDING)).all() for shrink in SHRINKS)


def test_the_search_clips_a_value_that_nothing_is_multiplied_by() -> None:
    weight = torch.tensor([[8.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0] * 2])
    form = IntegerFormat(2, 16)
    whole, plain = form.fit(form.grouped(weight)), search_clip(weight, form)
    seldom = search_clip(weight, form, (weight[0] < 8).float())
    assert whole.scale.abs().item() == 4
    assert plain.scale.abs().item() > 2 * seldom.scale.abs().item() == pytest.approx(2 * 1.6)
