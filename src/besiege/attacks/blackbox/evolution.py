"""Differential evolution of many populations at once, one an image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from besiege.core.oracle import Oracle
from besiege.core.rng import Rng

Render = Callable[[Tensor, Tensor], Tensor]
"""Draws genes (m, genes) onto images (m, c, h, w)."""


def evolve(
    oracle: Oracle, x: Tensor, rng: Rng, genes: Tensor, render: Render, *, generations: int, factor: float, best: bool
) -> None:
    """Let ``genes`` (n, population, genes) in [0, 1] evolve, so that the images that they ``render`` fall.

    Each child is ``a + factor * (b - c)`` of three others of its population, of which ``a`` is the fittest where
    ``best`` says so, and takes its parent's place where its loss is lower (Storn & Price 1997).
    """
    count, width = genes.shape[1:]
    value = _values(oracle, x, genes, render)
    for _ in range(generations):
        x, genes, value, rng = oracle.live(x, genes, value, rng)
        own = torch.arange(count, device=x.device)
        others = (rng.rand(count, count - 1).topk(3, dim=2).indices + 1 + own[:, None]) % count
        a, b, c = (genes.gather(1, others[..., k : k + 1].expand(-1, -1, width)) for k in range(3))
        if best:
            a = genes.gather(1, value.argmin(1)[:, None, None].expand(-1, -1, width))
        child = (a + factor * (b - c)).clamp(0, 1)
        lost = _values(oracle, x, child, render)
        won = lost < value
        genes, value = torch.where(won[..., None], child, genes), torch.where(won, lost, value)


def _values(oracle: Oracle, x: Tensor, genes: Tensor, render: Render) -> Tensor:
    """(n, population) losses. One candidate of every image at a time, so that one that has fallen asks no more."""
    return torch.stack([oracle.loss(render(x, part), "ce") for part in genes.unbind(1)], 1)
