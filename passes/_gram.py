"""Gram matrices of what reaches a layer: by them the error of its output follows from that of its weight alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from passes._blockwise import CalibratedBlock

PANEL = 1024
"""Rows of X^T X that are computed at once: what lies below its diagonal is not, but for that panel."""


def gram_matrices(block: CalibratedBlock, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return layer name -> X^T X [M, M] of its input over all tokens, float32; without those that no token reaches."""
    grams: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        x = x.flatten(0, -2)
        if name not in grams:
            grams[name] = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], PANEL):
            grams[name][start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])

    block.watch(names, see)
    for gram in grams.values():
        gram.copy_(gram.triu() + gram.triu(1).T)
    return grams


def output_error(deviation: torch.Tensor, gram: torch.Tensor) -> float:
    """Return tr(D X^T X D^T) = |X D^T|^2: what an error D [N, M] of a weight costs its output."""
    return float((deviation @ gram).mul_(deviation).sum())
