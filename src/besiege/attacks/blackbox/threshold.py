"""Threshold attack: every value within eps of its own, found by differential evolution."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.blackbox.evolution import evolve
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Access, Ball


@evasion("Threshold", paper="arXiv:1906.06026", norms=(INF,), access=Access.SCORES)
def threshold(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    population: int = 100,
    iterations: int = 400,
    factor: float = 0.5,
    best: bool = True,
    blocks: bool = True,
) -> None:
    """Let the whole perturbation evolve for ``iterations`` generations (Kotyan & Vargas 2022).

    A candidate holds one number a value, from ``x - eps`` to ``x + eps``.

    Departs from the paper, whose method is ``population=400, iterations=100, best=False, blocks=False``: every child
    starts from the fittest, and the first candidates are squares of 1, 2, 4, … pixels in turn, at either end of the
    range.
    """
    genes = (_squares(x, rng, population) if blocks else rng.rand(population, x[0].numel())).to(x)
    evolve(
        oracle,
        x,
        rng,
        genes,
        lambda image, part: ball.project(image + ball.eps * (2 * part.view_as(image) - 1), image),
        generations=iterations,
        factor=factor,
        best=best,
    )


def _squares(x: Tensor, rng: Rng, count: int) -> Tensor:
    """(n, count, values) of 0 and 1, the same within squares of 1, 2, 4, … pixels in turn."""
    c, h, w = x.shape[1:]
    drawn = rng.rand(count, c, h, w).round()
    sizes = max(1, max(h, w).bit_length() - 1)
    for k in range(1, sizes):
        down, across = (torch.arange(edge, device=x.device) >> k for edge in (h, w))
        drawn[:, k::sizes] = drawn[:, k::sizes][:, :, :, down][..., across]
    return drawn.flatten(2)
