"""Few-pixel attack: a few pixels on the 8-bit grid, found by differential evolution or CMA-ES."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.blackbox.evolution import Strategy, adapt, evolve
from besiege.attacks.blackbox.one_pixel import draw_pixels
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import Access, Ball

DEVIATION = 63 / 4
"""With which CMA-ES starts in the paper, in rows, columns and 8-bit colours alike."""


@evasion("Few-pixel", paper="arXiv:1906.06026", norms=(0,), access=Access.SCORES)
def few_pixel(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    pixels: int | None = None,
    strategy: Strategy = "de",
    population: int = 50,
    iterations: int = 800,
    crossover: float = 0.3,
    extremes: bool = True,
    patience: int = 2000,
) -> None:
    """Change ``pixels`` pixels, by default as many as the ball allows, for ``iterations`` generations.

    A candidate is a row, a column and a colour for each, cut down to whole numbers of 255 (Kotyan & Vargas 2022).
    With ``strategy="de"`` a child starts from the fittest candidate, the factor is drawn from [0.5, 1] and what
    leaves its range is drawn anew, as in the paper; ``"cma"`` is CMA-ES with a diagonal covariance matrix, where the
    paper's is full. With ``patience`` an image is given up where so many questions have brought less than a quarter
    of the log-odds that are left.

    Departs from the paper by default: a child takes each pixel from its parent unless chosen with the probability
    ``crossover``, and colours begin at the ``extremes``, 0 and 255 (for CMA-ES, around grey with that reach, at
    random places). The paper's is ``population=400, iterations=100, crossover=1.0, extremes=False, patience=0``; for
    CMA-ES ``extremes=False, patience=0`` and a population of ``4 + 3 log(genes)``, which begins at the first pixels as
    they are.
    """
    c, h, w = x.shape[1:]
    count = min(int(ball.eps), h * w, pixels or int(ball.eps))
    if strategy == "de":
        genes = _spread_out(rng, population, count * (2 + c)).to(x)
        if extremes:
            colours = genes.view(len(x), population, count, 2 + c)[..., 2:]
            colours.copy_(colours.round())
        evolve(
            oracle,
            x,
            rng,
            genes,
            draw_whole,
            generations=iterations,
            factor=0.5,
            most=1.0,
            best=True,
            crossover=crossover,
            together=2 + c,
            redraw=True,
            patience=patience,
        )
        return
    if extremes:
        mean = torch.cat([rng.rand(count, 2), torch.full((len(x), count, c), 0.5, device=x.device)], 2).to(x)
        spread = x.new_tensor([0.15] * 2 + [1.0] * c)
    else:
        first = torch.arange(count, device=x.device)
        places = torch.stack([first // w / h, first % w / w], 1).to(x)
        mean = torch.cat([places.expand(len(x), -1, -1), x.flatten(2)[:, :, :count].transpose(1, 2)], 2)
        spread = DEVIATION / x.new_tensor([h, w] + [255] * c)
    adapt(
        oracle,
        x,
        rng,
        mean.flatten(1),
        spread.repeat(count),
        draw_whole,
        population=population,
        generations=iterations,
        patience=patience,
    )


def _spread_out(rng: Rng, count: int, width: int) -> Tensor:
    """(n, count, width) in [0, 1): of each gene one value in every ``count``-th of the range (Latin hypercube)."""
    return (rng.rand(count, width).argsort(1) + rng.rand(count, width)) / count


def draw_whole(x: Tensor, genes: Tensor) -> Tensor:
    """`draw_pixels` with colours cut down to whole numbers of 255."""
    parts = genes.clamp(0, 1).view(len(x), -1, 2 + x.shape[1])
    colours = (parts[..., 2:] * 255 + 1e-4).floor() / 255
    return draw_pixels(x, torch.cat([parts[..., :2], colours], 2).flatten(1))
