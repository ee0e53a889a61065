"""Square attack: random search over squares of shrinking size, kept where the loss falls."""

from __future__ import annotations

import math
from bisect import bisect_left

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Access, Ball, Loss, rowwise

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After how many of 10 000 iterations the share of the image that a square covers is halved."""

DRAWN = 64
"""Random numbers are drawn for this many steps at once."""


@evasion("Square", paper="arXiv:1912.00049", norms=(2, INF), access=Access.SCORES)
def square(
    oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, *, iterations: int = 5000, area: float = 0.8, rescale: bool = True
) -> None:
    """Try ``iterations`` images; ``area`` is the share of the image that the first square covers.

    The schedule of shrinking squares belongs to 10 000 iterations; ``rescale`` fits it to fewer (Andriushchenko
    et al. 2020). All images step together, each with its own squares; one that has fallen is left out.
    """
    loss: Loss = "ce" if oracle.goal.targeted else "margin"
    (_stripes_and_squares if ball.norm == INF else _bumps)(oracle, x, ball, rng, loss, iterations, area, rescale)


def _stripes_and_squares(
    oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, loss: Loss, iterations: int, area: float, rescale: bool
) -> None:
    """L∞: vertical stripes of ±eps, then squares of one sign a channel, turned where they would change nothing."""
    c, h, w = x.shape[1:]
    best, known = ball.project(x + ball.eps * rng.signs(c, 1, w).to(x), x), 0
    value = oracle.loss(best, loss)
    for i in range(1, iterations):
        k = (i - 1) % DRAWN
        if k == 0:
            sides = [min(_side(j, iterations, area, rescale, h * w), h, w) for j in range(i, i + DRAWN)]
            drawn, side = rng.rand(DRAWN, 2 + c), torch.tensor(sides, device=x.device)
            first = (drawn[..., 0] * (h - side + 1)).long() * w + (drawn[..., 1] * (w - side + 1)).long()
            steps = (drawn[..., 2:, None] < 0.5).to(x).mul_(2).sub_(1).mul_(ball.eps)
        if sides[k] != known:
            window, known = _window(torch.zeros_like(first[:1, 0]), sides[k], c, h, w), sides[k]
        at, step = window + first[:, k, None], steps[:, k]
        flat, origin = best.flatten(1), x.flatten(1).gather(1, at).view(len(x), c, -1)
        old = flat.gather(1, at)
        same = ((origin + step).clamp_(0, 1).flatten(1) == old).all(1)
        new = (origin + torch.where(rowwise(same, step), -step, step)).clamp_(0, 1).flatten(1)
        flat.scatter_(1, at, new)
        tried = oracle.loss(best, loss)
        better = tried < value
        flat.scatter_(1, at, torch.where(better[:, None], new, old))
        value = torch.where(better, tried, value)
        x, best, value, first, steps, rng = oracle.live(x, best, value, first, steps, rng)


def _bumps(
    oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, loss: Loss, iterations: int, area: float, rescale: bool
) -> None:
    """L2: a grid of bumps on the sphere, then the energy of one window moved into a bump in another."""
    c, h, w = x.shape[1:]
    delta = _grid(x, rng)
    best = (x + delta * rowwise(ball.eps / delta.flatten(1).norm(dim=1), x)).clamp_(0, 1)
    value = oracle.loss(best, loss)
    most = min(h, w) - (min(h, w) + 1) % 2
    for i in range(1, iterations):
        if i % DRAWN == 1:
            drawn = rng.rand(DRAWN, 5 + c)
        side = max(_side(i, iterations, area, rescale, h * w), 3)
        side = min(side + (side + 1) % 2, most)
        u = drawn[:, (i - 1) % DRAWN]
        top, left, from_top, from_left = ((u[:, k] * (edge - side + 1)).long() for k, edge in enumerate((h, w, h, w)))
        at, away = _window(top * w + left, side, c, h, w), _window(from_top * w + from_left, side, c, h, w)
        delta = (best - x).flatten(1)
        both = torch.zeros_like(delta).scatter_(1, at, 1).scatter_(1, away, 1)
        energy = (delta * both).view(len(x), c, -1).square().sum(2)
        spare = (float(ball.eps) ** 2 - delta.square().sum(1, keepdim=True)).clamp_min(0) / c
        here = delta.gather(1, at).view(len(x), c, -1)
        bump = torch.where((u[:, 4] < 0.5)[:, None], *_bump(side, x))
        signs = (u[:, 5:] < 0.5).to(x) * 2 - 1
        new = bump[:, None] * signs[..., None] + here / (here.flatten(1).norm(dim=1)[:, None, None] + 1e-10)
        new = new / new.norm(dim=2, keepdim=True).clamp_min(1e-10) * (energy + spare).sqrt()[..., None]
        delta = delta.scatter(1, away, 0).scatter(1, at, new.flatten(1))
        candidate = x + (delta * (ball.eps / delta.norm(dim=1, keepdim=True).clamp_min(1e-10))).view_as(x)
        candidate.clamp_(0, 1)
        tried = oracle.loss(candidate, loss)
        better = tried < value
        best, value = torch.where(rowwise(better, x), candidate, best), torch.where(better, tried, value)
        x, best, value, drawn, rng = oracle.live(x, best, value, drawn, rng)


def _side(i: int, iterations: int, area: float, rescale: bool, pixels: int) -> int:
    """The length of a square's side at step ``i``."""
    share = area / 2 ** bisect_left(HALVINGS, i * 10_000 / iterations if rescale else i)
    return max(1, round(math.sqrt(float(share) * pixels)))


def _window(first: Tensor, side: int, c: int, h: int, w: int) -> Tensor:
    """(n, c * side * side) where the numbers of the squares that begin at the pixels ``first`` lie in flat images."""
    step = torch.arange(side, device=first.device)
    pixel = first[:, None] + (step[:, None] * w + step).flatten()
    return (pixel[:, None] + torch.arange(c, device=first.device)[:, None] * (h * w)).flatten(1)


def _bump(side: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(side * side,) a rise beside an equal fall, of unit norm, lying and standing."""
    half = side // 2
    pair = torch.cat([_pyramid(half, side), -_pyramid(side - half, side)]).to(x)
    pair = pair / pair.norm().clamp_min(1e-10)
    return pair.flatten(), pair.T.flatten()


def _pyramid(high: int, wide: int) -> Tensor:
    """Nested rectangles whose heights fall with the square of their order."""
    shape: Tensor = torch.zeros(high, wide)
    top, left = high // 2, wide // 2
    for k in range(max(top, left) + 1):
        shape[max(top - k, 0) : top + k + 1, max(left - k, 0) : left + k + 1] += 1 / (k + 1) ** 2
    return shape.div_(shape.norm().clamp_min(1e-10))


def _grid(x: Tensor, rng: Rng) -> Tensor:
    """Five by five bumps, each with a sign a channel and lying or standing as drawn."""
    n, c, h, w = x.shape
    side = max(min(h, w) // 5, 1)
    rows, columns = h // side, w // side
    u = rng.rand(rows, columns, 1 + c).to(x)
    lying, standing = (shape.view(side, side) for shape in _bump(side, x))
    shape = torch.where((u[..., 0] < 0.5)[..., None, None], lying, standing)
    signs = (u[..., 1:] < 0.5).to(x) * 2 - 1
    tiles = shape[:, :, :, None] * signs[..., None, None]
    delta = torch.zeros_like(x)
    delta[:, :, : rows * side, : columns * side] = tiles.permute(0, 3, 1, 4, 2, 5).reshape(
        n, c, rows * side, columns * side
    )
    return delta
