"""Rotations: orthogonal at every width, spread, and with the mean kept where that is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes._orthogonal import Turn, hadamard

PRECISE = 1e-12
"""Of sums of a few thousand products in double precision."""


def matrix(turn: Turn) -> torch.Tensor:
    return turn(torch.eye(turn.width))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 3), st.booleans())
def test_a_turn_is_orthogonal_and_goes_back(width: int, seed: int, centred: bool) -> None:
    turn = Turn(width, seed, centred=centred)
    q, one = matrix(turn), torch.eye(width, dtype=torch.float64)
    assert (q @ q.T - one).abs().max() < PRECISE
    assert (turn.back(q) - one).abs().max() < PRECISE
    if centred:
        assert (q.sum(0) - 1).abs().max() < PRECISE  # the vector of ones stays, so the mean does


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, 368])
def test_hadamard_matrices_are_those(order: int) -> None:
    made = hadamard(order)
    assert made is not None
    assert made.abs().eq(1).all()
    assert torch.equal(made @ made.T, order * torch.eye(order, dtype=torch.float64))
    assert made[:, 0].eq(1).all()


@pytest.mark.parametrize("order", [3, 6, 7, 52])
def test_orders_that_have_none_have_none(order: int) -> None:
    assert hadamard(order) is None  # 52 has one, which Paley's constructions over primes do not give


@pytest.mark.parametrize("width", [64, 80, 96, 576, 896])
def test_one_channel_is_shared_by_all_alike(width: int) -> None:
    spread = matrix(Turn(width, 0)).abs()
    assert torch.allclose(spread, torch.full_like(spread, width**-0.5))


def test_a_turn_by_hand() -> None:
    turn = Turn(2, 0)
    signs = turn(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).sign()
    assert signs[0].prod() == 1  # a row of [[1, 1], [1, -1]], or its negative
    assert signs[1].prod() == -1


def test_blocks_of_a_width_turn_alike_and_seeds_differ() -> None:
    x = torch.arange(8.0)
    assert torch.equal(Turn(4, 1)(x), torch.cat([Turn(4, 1)(x[:4]), Turn(4, 1)(x[4:])]))
    assert any(not torch.equal(Turn(16, 1)(torch.ones(16)), Turn(16, seed)(torch.ones(16))) for seed in (2, 3))
