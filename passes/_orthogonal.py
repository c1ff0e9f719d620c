"""Random rotations that spread every channel over all others, and cost next to nothing to apply.

A Hadamard matrix has entries of one magnitude, so a channel that stands out is shared by all. Its order is 1, 2 or a
multiple of 4; the rest of a width is a Hadamard matrix by Paley's constructions (J. Math. Phys. 1933) where one of that
order is known, else a random orthogonal matrix. The Kronecker product of the two is applied one factor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LARGEST_FACTOR = 16
"""Order into which powers of two are cut: fewer and larger products than of order 2, and still few operations."""


class Turn:
    """An orthogonal matrix Q [width, width], drawn by a seed; rows are turned by x Q, width by width of their channels.

    Q is diag(signs) K, with K the Hadamard-like matrix; centred, it is K diag(signs) K^T with the first sign positive:
    the first column of K is constant, so the mean over all channels stays what it was, and a layer norm's answer turns.
    """

    def __init__(self, width: int, seed: int, *, centred: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.width, self.centred = width, centred
        self._factors = _factors(width, generator)
        self._signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        if centred:
            self._signs[0] = 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., n * width] turned, in double precision."""
        blocks = x.double().unflatten(-1, (-1, self.width))
        if self.centred:
            turned = _transposed(_multiplied(blocks, self._factors) * self._signs, self._factors)
        else:
            turned = _multiplied(blocks * self._signs, self._factors)
        return turned.flatten(-2)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Return what was turned into x [..., n * width], in double precision."""
        if self.centred:
            return self(x)  # symmetric and orthogonal, so its own inverse
        blocks = x.double().unflatten(-1, (-1, self.width))
        return (_transposed(blocks, self._factors) * self._signs).flatten(-2)


def hadamard(order: int) -> torch.Tensor | None:
    """Return a Hadamard matrix of a small order, its first column ones, float64; None where Paley knows none."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    for q, make in ((order - 1, _paley_1), (order // 2 - 1, _paley_2)):
        if order % 4 == 0 and _is_prime(q) and q % 4 == (3 if make is _paley_1 else 1):
            made = make(q)
            return made * made[:, :1]
    return None


def _factors(width: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Return orthogonal matrices, first columns constant, whose Kronecker product has `width` rows."""
    twos = width & -width
    odd, factors = width // twos, []
    if odd > 1:
        order = next((odd * two for two in _powers(4, twos) if hadamard(odd * two) is not None), odd)
        core = hadamard(order)
        factors.append(_random(odd, generator) if core is None else core / order**0.5)
        twos = width // order
    while twos > 1:
        order = min(twos, LARGEST_FACTOR)
        factors.append(_sylvester(order) / order**0.5)
        twos //= order
    return factors


def _powers(first: int, last: int) -> list[int]:
    return [1 << exponent for exponent in range(first.bit_length() - 1, last.bit_length())]


def _sylvester(order: int) -> torch.Tensor:
    two, made = hadamard(2), torch.ones(1, 1, dtype=torch.float64)
    assert two is not None
    while len(made) < order:
        made = torch.kron(made, two)
    return made


def _random(order: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random orthogonal matrix whose first column is constant."""
    drawn = torch.randn(order, order, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1
    orthogonal: torch.Tensor = torch.linalg.qr(drawn)[0]
    return orthogonal


def _paley_1(q: int) -> torch.Tensor:
    """Return the Hadamard matrix of order q + 1 for a prime q = 3 mod 4."""
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, -1, _jacobsthal(q)
    return border + torch.eye(q + 1, dtype=torch.float64)


def _paley_2(q: int) -> torch.Tensor:
    """Return the Hadamard matrix of order 2 (q + 1) for a prime q = 1 mod 4."""
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, 1, _jacobsthal(q)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _jacobsthal(q: int) -> torch.Tensor:
    """Return [i, j] -> 1 where i - j is a square modulo q, -1 where it is none, 0 on the diagonal."""
    squares = torch.full((q,), -1.0, dtype=torch.float64)
    squares[[x * x % q for x in range(q)]] = 1
    squares[0] = 0
    places = torch.arange(q)
    return squares[(places[:, None] - places) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _multiplied(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return x [..., width] times the Kronecker product: each factor takes the leading axis and leaves it last."""
    for factor in factors:
        x = (x.unflatten(-1, (len(factor), -1)).transpose(-1, -2) @ factor).flatten(-2)
    return x


def _transposed(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return x [..., width] times the transposed Kronecker product."""
    return _multiplied(x, [factor.T for factor in factors])
