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


@search("HopSkipJump", paper="arXiv:1904.02144", norms=(2, INF), asks="labels", seeks="minimum", start=True)
def hopskipjump(
    x: Tensor, ball: Ball, rng: Stream, *, start: Tensor, steps: int = 64, probes: int = 100, most_probes: int = 10_000
) -> Search:
    """Estimate the boundary's normal from ``probes`` random points, step along it, bisect back to the boundary.

    Step t of ``steps`` asks about ``probes * sqrt(t)`` points, at most ``most_probes`` (Chen et al. 2020).
    """
    d, linf = x.numel(), ball.norm == INF
    theta = 1 / (d * d if linf else d * math.sqrt(d))
    far = _distance(start - x, linf)
    adv = yield from _bisect(x, start, theta, linf)
    for t in range(1, steps + 1):
        radius = 0.1 if t == 1 else (d if linf else math.sqrt(d)) * theta * far
        side, noise = yield from _probe(adv, radius, min(int(probes * math.sqrt(t)), most_probes), rng, linf)
        normal = (side @ noise).view_as(x)
        normal = normal.sign() if linf else normal / normal.norm().clamp_min(1e-12)
        step = _distance(adv - x, linf) / math.sqrt(t)
        while not (yield (adv + step * normal).clamp(0, 1)[None]):
            step /= 2
            if step < 1e-7:
                step, normal = 0.0, normal * 0
                break
        ahead = (adv + step * normal).clamp(0, 1)
        far = _distance(ahead - x, linf)
        adv = yield from _bisect(x, ahead, theta, linf)


def _probe(
    adv: Tensor, radius: float, count: int, rng: Stream, linf: bool
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Which side (count,) of the boundary random points around ``adv`` lie on, centred, and where (count, d)."""
    noise = (rng.rand(count, adv.numel()).mul_(2).sub_(1) if linf else rng.randn(count, adv.numel())).to(adv)
    noise.mul_(radius / noise.norm(dim=1, keepdim=True))
    tried = noise.add_(adv.flatten()).clamp_(0, 1)
    side = (yield tried.view(count, *adv.shape)).to(adv.dtype).mul_(2).sub_(1)
    mean = float(side.mean())
    return (side if abs(mean) == 1 else side - mean) / count, tried.sub_(adv.flatten())


def _bisect(x: Tensor, adv: Tensor, theta: float, linf: bool) -> Found:
    """The adversarial point nearest ``x``: on the line to ``adv``, or in L∞ in the shrinking box around ``x``."""
    reach = _distance(adv - x, True)
    low, high = 0.0, 1.0
    width = min(1.0, theta / reach) if linf and reach > 0 else theta
    best = adv
    while high - low > width and high - low > 1e-7:
        middle = (low + high) / 2
        tried = x + (adv - x).clamp(-middle * reach, middle * reach) if linf else torch.lerp(x, adv, middle)
        if (yield tried[None]):
            high, best = middle, tried
        else:
            low = middle
    return best


def _distance(delta: Tensor, linf: bool) -> float:
    return float(delta.abs().max() if linf else delta.norm())
