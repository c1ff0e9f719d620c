"""Counting what reaches a layer, and choosing the range its integers cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXTS, Workshop

from passes._calibrate import (
    BINS,
    CALIBRATORS,
    ENOUGH_TEXTS,
    LEVELS,
    Histogram,
    Range,
    entropy,
    few_texts_note,
    minmax,
    mse,
    observe,
    percentile,
    squared_error,
    watch,
)
from passes._formats import quantize_affine
from passes._skeleton import Skeleton
from passes._walk import walk
from passes.base import PassError


def counted(*tensors: torch.Tensor) -> Histogram:
    seen = Histogram()
    for tensor in tensors:
        seen.add(tensor)
    return seen


def with_outlier(size: float = 100.0) -> torch.Tensor:
    """Return a standard normal sample with one value far outside."""
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    values[7] = size
    return values


def rounding_error(values: torch.Tensor, covered: Range) -> float:
    """Return the mean squared error that uint8 over a range really makes."""
    scale, zero = covered.affine()
    back = (quantize_affine(values, torch.tensor(scale), torch.tensor(zero)) - zero) * scale
    return float((back - values).square().mean())


def test_counts_do_not_depend_on_the_order_of_what_is_counted() -> None:
    parts = with_outlier().split(30_000)
    one, other = counted(*parts), counted(*reversed(parts))
    assert one.limit == other.limit == 128  # the smallest power of two above the outlier
    assert np.array_equal(one.counts, other.counts)
    assert one.counts.sum() == 200_000


def test_a_layer_that_is_run_on_no_token_is_not_shown(workshop: Workshop) -> None:
    skeleton = Skeleton(workshop.model("llama"))
    block, shapes = skeleton.module.get_submodule(skeleton.blocks[0]), []
    layer = block.get_submodule("mlp.down_proj")

    def run_on_nothing(*_: object) -> None:
        layer(torch.zeros(0, layer.in_features))

    with block.register_forward_hook(run_on_nothing):
        watch(skeleton, [f"{skeleton.blocks[0]}.mlp.down_proj"], TEXTS[:1], lambda _, x: shapes.append(tuple(x.shape)))
    assert shapes == [(1, len(TEXTS[0]), layer.in_features)]


def test_a_value_is_counted_in_the_bin_it_lies_in() -> None:
    seen = counted(torch.tensor([-4.0, 0.0, 0.0001, 3.9999, 4.0]))
    assert np.flatnonzero(seen.counts).tolist() == [0, BINS // 2, BINS - 1]
    assert seen.counts[[0, BINS // 2, BINS - 1]].tolist() == [1, 2, 2]
    assert (seen.low, seen.high) == (-4.0, 4.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        counted(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(
    ("covered", "scale", "zero"),
    [
        (Range(-1.0, 1.55), 0.01, 100),
        (Range(0.5, 2.55), 0.01, 0),  # zero is covered always: padding and masks are zero
        (Range(-2.55, -1.0), 0.01, 255),
        (Range(0.0, 0.0), 1.0, 0),
    ],
)
def test_scale_and_zero_point_cover_the_range_and_zero(covered: Range, scale: float, zero: int) -> None:
    assert covered.affine() == (pytest.approx(scale), zero)


def test_minmax_covers_an_outlier_and_the_others_clip_it() -> None:
    seen = counted(with_outlier())
    assert minmax(seen).high == 100.0
    # 99.99 % of a normal sample lie within 3.9 standard deviations; a range of 10 leaves each method a choice.
    assert 3 < percentile(seen).high < 10
    assert 3 < entropy(seen).high < 20  # 128 levels of its own, each a bin or more
    assert mse(counted(with_outlier(30.0))).high < 30.0


def test_percentile_leaves_half_of_the_rest_on_either_side() -> None:
    values = torch.arange(-50_000, 50_000) / 50_000  # uniform: 0.005 % of it is 5 values at either end
    covered = percentile(counted(values))
    assert covered.low == pytest.approx(-0.9999, abs=2 / BINS)
    assert covered.high == pytest.approx(0.9999, abs=2 / BINS)


def test_mse_weighs_rounding_against_clipping() -> None:
    # n values spread over [-1, 1] and one at 8. Covering [-1, h] costs ((h + 1) / 255)^2 / 12 each and (8 - h)^2 once:
    # least where (8 - h) = n (h + 1) / (12 * 255^2), with n = 10^6 at h = 2.94.
    values = torch.cat([torch.linspace(-1, 1, 1_000_000), torch.tensor([8.0])])
    assert mse(counted(values)).high == pytest.approx(2.94, abs=0.1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    outliers=st.integers(0, 20),
    size=st.floats(1, 1000),
    shift=st.floats(-3, 3),
)
def test_mse_errs_no_more_than_minmax(seed: int, outliers: int, size: float, shift: float) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) + shift
    values[:outliers] *= size
    seen = counted(values)
    assert squared_error(seen, mse(seen)) <= squared_error(seen, Range(min(seen.low, 0), max(seen.high, 0)))
    # The values of a bin are not spread evenly over it, least of all beside an outlier of a thousand: hence 10 %.
    assert rounding_error(values, mse(seen)) <= 1.1 * rounding_error(values, minmax(seen))


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_every_calibrator_stays_within_what_was_seen_and_covers_most_of_it(calibrator: str) -> None:
    values = torch.nn.functional.gelu(with_outlier(5.0))  # one long tail, one short
    seen = counted(values)
    covered = CALIBRATORS[calibrator](seen)  # type: ignore[index]
    assert seen.low <= covered.low < 0 < covered.high <= seen.high
    assert (values > covered.high).float().mean() < 0.01
    assert (covered.high - covered.low) / LEVELS < 0.03


def test_calibrators_take_a_layer_that_only_sees_zero() -> None:
    for find in CALIBRATORS.values():
        assert find(counted(torch.zeros(10))).affine() == (1.0, 0)


@pytest.mark.parametrize(
    ("name", "layer"), [("llama", "model.layers.1.mlp.down_proj"), ("bert", "bert.encoder.layer.1.output.dense")]
)
def test_observing_counts_every_value_that_reaches_a_layer(workshop: Workshop, name: str, layer: str) -> None:
    skeleton = Skeleton(workshop.model(name))
    seen = observe(skeleton, [layer], TEXTS)[layer]
    inputs: list[torch.Tensor] = []
    hook = skeleton.module.get_submodule(layer).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    for text in TEXTS:  # each by itself: what is batched is never padded
        list(walk(skeleton, [lambda module, text=text: module(input_ids=torch.tensor([text])) and None]))  # type: ignore[misc]
    hook.remove()
    assert seen.counts.sum() == sum(x.numel() for x in inputs)
    assert seen.high == pytest.approx(max(float(x.max()) for x in inputs), rel=1e-5)  # batches sum in another order


def test_a_layer_that_is_never_run_is_named(workshop: Workshop) -> None:
    with pytest.raises(PassError, match=r"lm_head: no value reached it .* exclude it"):
        observe(Skeleton(workshop.model("llama")), ["lm_head"], TEXTS)


def test_few_texts_are_told_and_enough_are_not() -> None:
    assert few_texts_note([(1, 2)] * ENOUGH_TEXTS) == ""
    for count, texts in ((ENOUGH_TEXTS - 1, "31 calibration texts"), (1, "1 calibration text")):
        note = few_texts_note([(1, 2)] * count)
        assert note == f"ranges found on {texts}, and on so few they are narrow: give 32 or more"
