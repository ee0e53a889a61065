"""Threshold attack: every value within eps of its own, found by differential evolution or CMA-ES."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.blackbox.evolution import Render, Strategy, adapt, evolve
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Access, Ball

SQUARES = 8
"""CMA-ES begins with the values of an image in squares, so many across its shorter edge."""

COARSE = 30
"""For so many generations."""


@evasion("Threshold", paper="arXiv:1906.06026", norms=(INF,), access=Access.SCORES)
def threshold(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    strategy: Strategy = "cma",
    population: int = 20,
    iterations: int = 2000,
    factor: float = 0.5,
    best: bool = True,
    blocks: bool = True,
) -> None:
    """Let the whole perturbation evolve for ``iterations`` generations (Kotyan & Vargas 2022).

    A candidate holds one number a value, from ``x - eps`` to ``x + eps``. ``strategy="cma"`` is CMA-ES, which begins
    at ``x``; with ``"de"`` every child starts from the fittest, or from any if not ``best``.

    Departs from the paper, where the covariance matrix is full and values are cut down to 8 bits: the matrix is
    diagonal and values are not cut. By default, too, CMA-ES has one number for each square, an eighth of the image
    wide, for 30 generations, and then begins again with one for each value, both times with a deviation of eps; with
    ``blocks=False`` it has one for each value and a deviation of a quarter of eps throughout, as in the paper, whose
    population is ``4 + 3 log(values)``. The first candidates of differential evolution are squares of 1, 2, 4, …
    pixels in turn, at either end of the range, for which 100 serve best; the paper's is ``strategy="de",
    population=400, iterations=100, blocks=False``.
    """

    def render(image: Tensor, part: Tensor) -> Tensor:
        return ball.project(image + ball.eps * (2 * part.view_as(image) - 1), image)

    if strategy == "de":
        genes = (_squares(x, rng, population) if blocks else rng.rand(population, x[0].numel())).to(x)
        evolve(oracle, x, rng, genes, render, generations=iterations, factor=factor, best=best)
        return
    coarse = min(COARSE, iterations) if blocks else 0
    side = max(1, min(x.shape[2:]) // SQUARES)
    x, rng = _adapted(oracle, x, rng, render, side, 0.5, population, coarse)
    _adapted(oracle, x, rng, render, 1, 0.5 if blocks else 0.125, population, iterations - coarse)


def _adapted(
    oracle: Oracle, x: Tensor, rng: Rng, render: Render, side: int, spread: float, population: int, generations: int
) -> tuple[Tensor, Rng]:
    """CMA-ES over squares of ``side`` pixels; the images that it has not made fall."""
    c, h, w = x.shape[1:]
    down, across = -(-h // side), -(-w // side)

    def widened(image: Tensor, part: Tensor) -> Tensor:
        whole = part.clamp(0, 1).view(-1, c, down, across).repeat_interleave(side, 2).repeat_interleave(side, 3)
        return render(image, whole[:, :, :h, :w].contiguous())

    middle = x.new_full((len(x), c * down * across), 0.5)
    wide = torch.full_like(middle[0], spread)
    return adapt(oracle, x, rng, middle, wide, widened, population=population, generations=generations)


def _squares(x: Tensor, rng: Rng, count: int) -> Tensor:
    """(n, count, values) of 0 and 1, the same within squares of 1, 2, 4, … pixels in turn."""
    c, h, w = x.shape[1:]
    drawn = rng.rand(count, c, h, w).round()
    sizes = max(1, max(h, w).bit_length() - 1)
    for k in range(1, sizes):
        down, across = (torch.arange(edge, device=x.device) >> k for edge in (h, w))
        drawn[:, k::sizes] = drawn[:, k::sizes][:, :, :, down][..., across]
    return drawn.flatten(2)
