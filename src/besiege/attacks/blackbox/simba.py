"""SimBA: steps along the directions of an orthonormal basis, kept where the probability falls."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import Access, Ball, rowwise

Basis = Literal["pixel", "dct"]

BANDS = 8
"""Frequencies are tried in this many bands, the lowest first."""


@evasion("SimBA", paper="arXiv:1905.07121", norms=(2,), access=Access.SCORES)
def simba(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    iterations: int = 10_000,
    step: float = 0.2,
    basis: Basis = "pixel",
    again: bool = True,
) -> None:
    """Try ``iterations`` directions, ``step`` one way and, where that does not help, the other (Guo et al. 2019).

    The basis is that of single values or of the cosine transform, its lowest eighth of frequencies first; no direction
    is tried twice. Log-probabilities are compared, which keep apart what probabilities round to 1.

    Departs from the paper, whose method is ``again=False``: once every direction was tried, they are tried anew in
    another order, with steps half as long. Candidates are brought back into the ball.
    """
    d = x[0].numel()
    best, value = x.clone(), oracle.loss(x, "ce")
    for i in range(iterations if again else min(iterations, d)):
        if i % d == 0:
            order = _order(x, rng, basis)
            length = step / 2 ** (i // d)
        move = length * _direction(x, order[:, i % d], basis)
        rows = torch.arange(len(x), device=x.device)
        for way in (-1, 1):
            tried = ball.project(best[rows] + way * move[rows], x[rows])
            loss = oracle.loss(tried, "ce", rows)
            won = loss < value[rows]
            best[rows] = torch.where(rowwise(won, x), tried, best[rows])
            value[rows] = torch.where(won, loss, value[rows])
            rows = rows[~won]
        x, best, value, order, rng = oracle.live(x, best, value, order, rng)


def _order(x: Tensor, rng: Rng, basis: Basis) -> Tensor:
    """(n, d) every direction once: at random, frequencies by band."""
    c, h, w = x.shape[1:]
    keys = rng.rand(c * h * w)
    if basis == "dct":
        down, across = (torch.arange(edge, device=x.device) * BANDS // edge for edge in (h, w))
        keys = keys + torch.maximum(down[:, None], across).expand(c, h, w).flatten()
    return keys.argsort(1)


def _direction(x: Tensor, index: Tensor, basis: Basis) -> Tensor:
    """(n, c, h, w) the basis vectors numbered ``index`` (n,)."""
    n, (c, h, w) = len(index), x.shape[1:]
    if basis == "pixel":
        return x.new_zeros(n, c * h * w).scatter_(1, index[:, None], 1).view(n, c, h, w)
    down, across = _cosine(index // w % h, h, x), _cosine(index % w, w, x)
    plane = down[:, :, None] * across[:, None, :]
    channel = x.new_zeros(n, c).scatter_(1, (index // (h * w))[:, None], 1)
    return channel[:, :, None, None] * plane[:, None]


def _cosine(frequency: Tensor, edge: int, like: Tensor) -> Tensor:
    """(n, edge) rows of the orthonormal cosine transform."""
    place = 2 * torch.arange(edge, device=like.device) + 1
    wave = (frequency[:, None] * place * (math.pi / (2 * edge))).cos()
    return (wave * torch.where(frequency == 0, math.sqrt(1 / edge), math.sqrt(2 / edge))[:, None]).to(like)
