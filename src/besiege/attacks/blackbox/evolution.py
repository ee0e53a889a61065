"""Evolution of many populations at once, one an image: differential evolution and separable CMA-ES."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import rowwise

Strategy = Literal["de", "cma"]
Render = Callable[[Tensor, Tensor], Tensor]
"""Draws genes (m, genes) onto images (m, c, h, w)."""


def evolve(
    oracle: Oracle,
    x: Tensor,
    rng: Rng,
    genes: Tensor,
    render: Render,
    *,
    generations: int,
    factor: float,
    best: bool,
    most: float = 0.0,
    crossover: float = 1.0,
    together: int = 1,
    redraw: bool = False,
    patience: int = 0,
) -> None:
    """Let ``genes`` (n, population, genes) in [0, 1] evolve, so that the images that they ``render`` fall.

    Each child is ``a + factor * (b - c)`` of three others of its population, of which ``a`` is the fittest where
    ``best`` says so, and takes its parent's place where its loss is lower (Storn & Price 1997). With ``most`` each
    generation's factor is drawn between the two. With a ``crossover`` below 1 that share of the child's genes, in
    groups of as many as are ``together``, is new, and one group at least; the others are its parent's. A gene that
    leaves [0, 1] stops at its edge, or is drawn anew if ``redraw`` says so. For ``patience`` see `_hopeful`.
    """
    count, width = genes.shape[1:]
    value = _values(oracle, x, genes, render)
    past = x.new_zeros(len(x), math.ceil(patience / count))
    for generation in range(generations):
        x, genes, value, past, rng = oracle.live(x, genes, value, past, rng)
        rows = _hopeful(oracle, past, value.amin(1), generation) if patience else None
        if rows is not None and not len(rows):
            return
        own = torch.arange(count, device=x.device)
        others = (rng.rand(count, count - 1).topk(3, dim=2).indices + 1 + own[:, None]) % count
        a, b, c = (genes.gather(1, others[..., k : k + 1].expand(-1, -1, width)) for k in range(3))
        if best:
            a = genes.gather(1, value.argmin(1)[:, None, None].expand(-1, -1, width))
        scale = factor + (most - factor) * rng.rand(1, 1).to(x) if most > factor else factor
        child = a + scale * (b - c)
        if redraw:
            child = torch.where((child < 0) | (child > 1), rng.rand(count, width).to(x), child)
        child = child.clamp_(0, 1)
        if crossover < 1:
            drawn = rng.rand(count, width // together)
            new = (drawn < crossover) | (drawn == drawn.amin(2, keepdim=True))
            child = torch.where(new.repeat_interleave(together, 2), child, genes)
        lost = _values(oracle, x, child, render, rows)
        won = lost < value
        genes, value = torch.where(won[..., None], child, genes), torch.where(won, lost, value)


def adapt(
    oracle: Oracle,
    x: Tensor,
    rng: Rng,
    mean: Tensor,
    spread: Tensor,
    render: Render,
    *,
    population: int,
    generations: int,
    patience: int = 0,
) -> tuple[Tensor, Rng]:
    """Draw genes around ``mean`` (n, genes), with deviations ``spread`` (genes,) at first, and follow the better half.

    CMA-ES with a diagonal covariance matrix, whose update is linear in the genes and learns the faster for it
    (Ros & Hansen 2008). What leaves [0, 1] is rendered from its edge. The images that stand are returned, and their
    streams. For ``patience`` see `_hopeful`.
    """
    d = mean.shape[1]
    weights = math.log(population / 2 + 0.5) - torch.arange(1, population // 2 + 1, device=x.device).to(x).log()
    weights = weights / weights.sum()
    mass = 1 / float(weights.square().sum())
    rate_path, rate_step = 4 / (d + 4), (mass + 2) / (d + mass + 3)
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (d + 1)) - 1) + rate_step
    rate = 2 / (mass * (d + math.sqrt(2)) ** 2) + (1 - 1 / mass) * min(1.0, (2 * mass - 1) / ((d + 2) ** 2 + mass))
    rate = min(1.0, rate * (d + 2) / 3)
    expected = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
    step, deviation = torch.ones_like(mean[:, 0]), spread.expand_as(mean)
    turn, path = torch.zeros_like(mean), torch.zeros_like(mean)
    best, past = torch.full_like(step, math.inf), x.new_zeros(len(x), math.ceil(patience / population))
    for generation in range(1, generations + 1):
        x, mean, deviation, step, turn, path, best, past, rng = oracle.live(
            x, mean, deviation, step, turn, path, best, past, rng
        )
        rows = _hopeful(oracle, past, best, generation - 2) if patience and generation > 1 else None
        if rows is not None and not len(rows):
            break
        noise = rng.randn(population, d).to(x)
        value = _values(oracle, x, mean[:, None] + rowwise(step, noise) * deviation[:, None] * noise, render, rows)
        best = torch.minimum(best, value.amin(1))
        order = value.argsort(dim=1, stable=True)[:, : population // 2, None].expand(-1, -1, d)
        chosen = noise.gather(1, order)
        shift = (weights[:, None] * chosen).sum(1)
        mean = mean + step[:, None] * deviation * shift
        turn = (1 - rate_step) * turn + math.sqrt(rate_step * (2 - rate_step) * mass) * shift
        length = turn.norm(dim=1) / expected
        settled = math.sqrt(1 - (1 - rate_step) ** (2 * generation)) * (1.4 + 2 / (d + 1))
        small = (length < settled).to(x)[:, None]
        path = (1 - rate_path) * path + small * math.sqrt(rate_path * (2 - rate_path) * mass) * deviation * shift
        lasting = path.square() + (1 - small) * rate_path * (2 - rate_path) * deviation.square()
        recent = (weights[:, None] * (deviation[:, None] * chosen).square()).sum(1)
        deviation = ((1 - rate) * deviation.square() + rate / mass * lasting + rate * (1 - 1 / mass) * recent).sqrt()
        step = step * ((rate_step / damping) * (length - 1)).exp()
    return x, rng


def _values(oracle: Oracle, x: Tensor, genes: Tensor, render: Render, rows: Tensor | None = None) -> Tensor:
    """(n, population) losses, infinite beside ``rows``.

    One candidate of every image at a time, so that one that has fallen asks no more.
    """
    if rows is None or len(rows) == len(x):
        return torch.stack([oracle.loss(render(x, part), "ce") for part in genes.unbind(1)], 1)
    chosen = x[rows]
    asked = [oracle.loss(render(chosen, part), "ce", rows) for part in genes[rows].unbind(1)]
    return x.new_full(genes.shape[:2], math.inf).index_copy_(0, rows, torch.stack(asked, 1))


def _hopeful(oracle: Oracle, past: Tensor, best: Tensor, generation: int) -> Tensor:
    """The rows that are worth more questions, given the lowest losses ``best`` (n,) so far.

    ``past`` (n, window) holds what was left of the way in each of as many last generations, and is brought up to
    date. An image is given up where a window has brought no more than a quarter of what is left.
    """
    slot, left = generation % past.shape[1], _left(oracle, best)
    hopeful = past[:, slot] - left > left.clamp_min(0) / 4
    if generation < past.shape[1]:
        hopeful = torch.ones_like(hopeful)
    past[:, slot] = left
    return hopeful.nonzero().squeeze(1)


def _left(oracle: Oracle, loss: Tensor) -> Tensor:
    """(n,) the log-odds of the class that is to go, or against the one that is to come, from cross-entropies."""
    log = -loss.abs().clamp(1e-9, 80)
    odds = log - torch.log(-torch.expm1(log))
    return -odds if oracle.goal.targeted else odds
