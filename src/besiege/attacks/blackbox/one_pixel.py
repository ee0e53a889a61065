"""One-pixel attack: the places and colours of a few pixels, found by differential evolution."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.blackbox.evolution import evolve
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import Access, Ball


@evasion("One-pixel", paper="arXiv:1710.08864", norms=(0,), access=Access.SCORES)
def one_pixel(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    pixels: int | None = None,
    population: int = 30,
    iterations: int = 1300,
    factor: float = 0.5,
    crossover: float = 0.5,
    patience: int = 2000,
) -> None:
    """Change ``pixels`` pixels, by default as many as the ball allows, for ``iterations`` generations (Su et al. 2019).

    A candidate is a row, a column and a colour for each. Places start uniform, colours normal around 128 of 255
    with deviation 127. With ``patience`` an image is given up where so many questions have brought less than a quarter
    of the log-odds that are left.

    Departs from the paper by default: a child takes each pixel from its parent unless chosen with the probability
    ``crossover``, which a search for several pixels needs. The paper's is ``population=400, iterations=100,
    crossover=1.0, patience=0``.
    """
    count = min(int(ball.eps), x[0, 0].numel(), pixels or int(ball.eps))
    c = x.shape[1]
    places = rng.rand(population, count, 2)
    colours = (rng.randn(population, count, c) * (127 / 255) + 128 / 255).clamp(0, 1)
    genes = torch.cat([places, colours], 3).flatten(2).to(x)
    evolve(
        oracle,
        x,
        rng,
        genes,
        draw_pixels,
        generations=iterations,
        factor=factor,
        best=False,
        crossover=crossover,
        together=2 + c,
        patience=patience,
    )


def draw_pixels(x: Tensor, genes: Tensor) -> Tensor:
    """``x`` (m, c, h, w) with pixels of ``genes`` (m, count * (2 + c)): row, column and colour, all in [0, 1]."""
    m, c, h, w = x.shape
    parts = genes.view(m, -1, 2 + c)
    row, column = ((parts[..., k] * edge).long().clamp_max(edge - 1) for k, edge in enumerate((h, w)))
    drawn = x.clone().permute(0, 2, 3, 1)
    for k in range(parts.shape[1]):
        drawn[torch.arange(m, device=x.device), row[:, k], column[:, k]] = parts[:, k, 2:]
    return drawn.permute(0, 3, 1, 2).contiguous()
