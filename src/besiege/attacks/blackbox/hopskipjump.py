"""HopSkipJump: walks along the decision boundary by labels alone."""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from besiege.core.method import Search, search
from besiege.core.rng import Stream
from besiege.core.threat import INF, Ball

Found = Generator[Tensor, Tensor, Tensor]

QUESTION = 1 << 22
"""One question holds at most this many numbers, or 64 images."""


@search("HopSkipJump", paper="arXiv:1904.02144", norms=(2, INF), asks="labels", seeks="minimum", start=True)
def hopskipjump(
    x: Tensor,
    ball: Ball,
    rng: Stream,
    *,
    start: Tensor,
    starts: int = 20,
    steps: int = 64,
    probes: int = 100,
    most_probes: int = 10_000,
    orthogonal: bool = True,
) -> Search:
    """Estimate the boundary's normal from ``probes`` random points, step along it, bisect back to the boundary.

    Step t of ``steps`` asks about ``probes * sqrt(t)`` points, at most ``most_probes`` (Chen et al. 2020).

    Departs from the paper: it begins at the nearest of the image that the engine found and ``starts`` noise images
    (which shortens the result by a tenth and more), and the directions to the points are at right angles
    to each other rather than independent, so that they do not blur each other's answers. With ``starts=0`` and
    ``orthogonal=False`` it is the paper's.
    """
    d, linf = x.numel(), ball.norm == INF
    theta = 1 / (d * d if linf else d * math.sqrt(d))
    adv = yield from bisect(x, (yield from nearest(x, start, starts, rng, linf)), theta, linf)
    far = 0.0
    for t in range(1, steps + 1):
        radius = 0.1 if t == 1 else (d if linf else math.sqrt(d)) * theta * far
        count = min(int(probes * math.sqrt(t)), most_probes)
        normal = yield from _normal(adv, radius, count, rng, linf, orthogonal)
        normal = normal.sign() if linf else normal / normal.norm().clamp_min(1e-30)
        stride = _distance(adv - x, linf) / math.sqrt(t)
        ahead = yield from _step(adv, normal, stride)
        far = _distance(ahead - x, linf)
        adv = yield from bisect(x, ahead, theta, linf)


def nearest(x: Tensor, start: Tensor, starts: int, rng: Stream, linf: bool) -> Found:
    """Of ``start`` and ``starts`` noise images, brought toward ``x`` all together, the one that stands the longest.

    The noise comes in blocks of 1, 2, 4, … pixels in turn.
    """
    sizes = max(1, max(x.shape[1:]).bit_length() - 1)
    away = torch.stack([start, *(_blocks(x, 1 << k % sizes, rng) for k in range(starts))]) - x
    reach = away.flatten(1).abs().amax(1) if linf else away.flatten(1).norm(dim=1)
    low, high, radius, best = 0.0, 2 * float(reach[0]), float(reach[0]), start
    while starts and high - low > 0.02 * high:
        if linf:
            tried = x + away.clamp(-radius, radius)
        else:
            tried = x + away * (radius / reach.clamp_min(radius)).view(-1, 1, 1, 1)
        won = yield tried.clamp_(0, 1)
        if bool(won.any()):
            away, reach, high, best = away[won], reach[won], radius, tried[won][0]
        else:
            low = radius
        radius = (low + high) / 2
    return best


def _blocks(x: Tensor, side: int, rng: Stream) -> Tensor:
    """An image (c, h, w) of squares of ``side`` pixels, each of one uniform colour."""
    c, h, w = x.shape
    drawn = rng.rand(c, -(-h // side), -(-w // side)).to(x)
    return drawn.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :h, :w]


def _normal(adv: Tensor, radius: float, count: int, rng: Stream, linf: bool, orthogonal: bool) -> Found:
    """Which way from ``adv`` the adversarial side lies, by ``count`` points at ``radius`` around it."""
    d = adv.numel()
    sums, votes = adv.new_zeros(2, d), 0.0
    for size in _shares(count, min(d, max(64, QUESTION // d)) if orthogonal else max(64, QUESTION // d)):
        if orthogonal:
            noise = _orthogonal(size, d, rng)
        else:
            noise = rng.rand(size, d).mul_(2).sub_(1) if linf else rng.randn(size, d)
        noise = noise.to(adv)
        noise.mul_(radius / noise.norm(dim=1, keepdim=True).clamp_min(1e-30))
        tried = noise.add_(adv.flatten()).clamp_(0, 1)
        side = (yield tried.view(size, *adv.shape)).to(adv.dtype).mul_(2).sub_(1)
        sums += torch.stack([side, torch.ones_like(side)]) @ tried.sub_(adv.flatten())
        votes += float(side.sum())
    mean = votes / count
    return (sums[0] if abs(mean) == 1 else sums[0] - mean * sums[1]).view_as(adv)


def _shares(count: int, most: int) -> list[int]:
    """``count`` in parts of at most ``most``."""
    return [most] * (count // most) + [count % most] * (count % most > 0)


def _orthogonal(count: int, d: int, rng: Stream) -> Tensor:
    """(count, d) directions at right angles: random rows of the cosine transform, their columns' signs random."""
    rows = rng.rand(d).argsort()[:count, None]
    angles = rows * (2 * torch.arange(d, device=rows.device) + 1) % (4 * d)
    table = torch.arange(4 * d, device=rows.device).mul(math.pi / (2 * d)).cos_()
    return table[angles].mul_(rng.signs(d))


def _step(adv: Tensor, normal: Tensor, stride: float) -> Found:
    """The first adversarial point along ``normal``, each try half as far as the last; ``adv`` where there is none."""
    for _ in range(24):
        ahead = torch.add(adv, normal, alpha=stride).clamp_(0, 1)
        if (yield ahead[None]):
            return ahead
        stride /= 2
    return adv


def bisect(x: Tensor, adv: Tensor, theta: float, linf: bool) -> Found:
    """The adversarial point nearest ``x``: on the line to ``adv``, or in L∞ in the shrinking box around ``x``.

    The share of the way is found to ``theta``, or to 1e-7 where float32 resolves no more.
    """
    reach = _distance(adv - x, True)
    low, high, best = 0.0, 1.0, adv
    width = theta / max(reach, 1e-30) if linf else theta
    while high - low > max(width, 1e-7):
        middle = (low + high) / 2
        tried = x + (adv - x).clamp(-middle * reach, middle * reach) if linf else torch.lerp(x, adv, middle)
        if (yield tried.clamp_(0, 1)[None]):
            high, best = middle, tried
        else:
            low = middle
    return best


def _distance(delta: Tensor, linf: bool) -> float:
    return float(delta.abs().max() if linf else delta.norm())
