"""HopSkipJump: walks along the decision boundary by labels alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from besiege.core.method import Search, search
from besiege.core.rng import Stream
from besiege.core.threat import INF, Ball

Found = Generator[Tensor, Tensor, Tensor]

QUESTION = 1 << 22
"""One question holds at most this many numbers, or 64 images."""

FEWEST = 4
"""A band has at least so many frequencies along a side, if the image has."""

REACH = 0.05
"""Points across the way to the image are at this share of its length from the boundary."""

NEAR = 2**-10
"""How near to the boundary, as a share of the way to the image, the points are asked for across it."""

LEAST = 0.01
"""A search that has not come nearer by this share loses patience."""

BESIDES = 10
"""A step asks about so many questions besides those for the normal."""


@search("HopSkipJump", paper="arXiv:1904.02144", norms=(2, INF), asks="labels", seeks="minimum", start=True)
def hopskipjump(
    x: Tensor,
    ball: Ball,
    rng: Stream,
    *,
    start: Tensor,
    starts: int = 20,
    steps: int = 1000,
    probes: int = 40,
    most_probes: int = 10_000,
    orthogonal: bool = True,
    bands: int = 4,
    circle: bool = True,
    patience: int = 700,
) -> Search:
    """Estimate the boundary's normal from ``probes`` random points, step along it, bisect back to the boundary.

    Step t of ``steps`` asks about ``probes * sqrt(t)`` points, at most ``most_probes`` (Chen et al. 2020).

    Departs from the paper, whose method is ``starts=0, steps=64, probes=100, orthogonal=False, bands=1, circle=False,
    patience=0``:

    - it begins at the nearest of the image that the engine found and ``starts`` noise images;
    - the directions to the points are at right angles to each other rather than independent, so that they do not blur
      each other's answers, and there are no more points than such directions;
    - the directions are made of the lower frequencies alone: all, a half, a quarter or an eighth of them along each
      side, whichever of the ``bands`` has gained most for its questions, and in one step of ten any of them (Li et al.
      2020, arXiv:2005.14137, choose one beforehand);
    - with ``circle``, in L2, the directions are at right angles to the way to the image, too, along which the normal is
      known; and the step goes along the circle through the image and the point on the boundary, on which the nearest
      point of a flat boundary lies (Reza et al. 2023, arXiv:2308.03163);
    - after ``patience`` questions that brought it no hundredth nearer it begins anew from other noise; the nearest
      image of all is what counts.
    """
    d, linf = x.numel(), ball.norm == INF
    theta, turning = 1 / (d * d if linf else d * math.sqrt(d)), circle and not linf
    adv = yield from bisect(x, (yield from nearest(x, start, starts, rng, linf)), NEAR if turning else theta, linf)
    every = _bands(x, bands)
    gains, angles, reached = [INF] * len(every), [0.3] * len(every), 0.0
    t, held, asked = 0, _distance(adv - x, linf), 0
    for _ in range(steps):
        if patience and asked > patience:
            fresh, asked = (yield from _fresh(x, starts, rng)), 0
            if fresh is not None:
                fresh = yield from nearest(x, fresh, starts, rng, linf)
                adv = yield from bisect(x, fresh, NEAR if turning else theta, linf)
                gains, angles, reached = [INF] * len(every), [0.3] * len(every), 0.0
                t, held = 0, _distance(adv - x, linf)
        t += 1
        k = rng.below(len(every)) if rng.below(10) == 0 else gains.index(max(gains))
        count = min(int(probes * math.sqrt(t)), most_probes, every[k].size if orthogonal else most_probes)
        draw = partial(every[k].drawn, rng=rng, orthogonal=orthogonal, linf=linf)
        far = _distance(adv - x, linf)
        if turning:
            normal = yield from _normal(adv, REACH * far, count, draw, adv - x)
            if bool(normal.any()):
                adv, angles[k] = yield from _turn(x, adv, normal, angles[k])
            adv = yield from _approach(x, adv)
        else:
            radius = 0.1 if t == 1 else (d if linf else math.sqrt(d)) * theta * reached
            normal = yield from _normal(adv, radius, count, draw)
            normal = normal.sign() if linf else normal / normal.norm().clamp_min(1e-30)
            ahead = yield from _step(adv, normal, far / math.sqrt(t))
            reached = _distance(ahead - x, linf)
            adv = yield from bisect(x, ahead, theta, linf)
        gain = math.log(max(far, 1e-30) / max(_distance(adv - x, linf), 1e-30)) / (count + BESIDES)
        gains[k] = gain if gains[k] == INF else (gains[k] + gain) / 2
        asked += count + BESIDES
        if _distance(adv - x, linf) < (1 - LEAST) * held:
            held, asked = _distance(adv - x, linf), 0


def _fresh(x: Tensor, starts: int, rng: Stream) -> Generator[Tensor, Tensor, Tensor | None]:
    """An adversarial image of noise; None where none of ``starts`` is."""
    noise = _noise(x, max(starts, 1), rng)
    won = yield noise
    return noise[won][0] if bool(won.any()) else None


def nearest(x: Tensor, start: Tensor, starts: int, rng: Stream, linf: bool) -> Found:
    """Of ``start`` and ``starts`` noise images, brought toward ``x`` all together, the one that stands the longest."""
    away = torch.cat([start[None], _noise(x, starts, rng)]) - x
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


def _noise(x: Tensor, count: int, rng: Stream) -> Tensor:
    """(count, c, h, w) images of noise, in blocks of 1, 2, 4, … pixels in turn."""
    sizes = max(1, max(x.shape[1:]).bit_length() - 1)
    return torch.stack([_blocks(x, 1 << k % sizes, rng) for k in range(count)]) if count else x.new_zeros(0, *x.shape)


def _blocks(x: Tensor, side: int, rng: Stream) -> Tensor:
    """An image (c, h, w) of squares of ``side`` pixels, each of one uniform colour."""
    c, h, w = x.shape
    drawn = rng.rand(c, -(-h // side), -(-w // side)).to(x)
    return drawn.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :h, :w]


@dataclass(frozen=True, eq=False)
class _Band:
    """The lowest frequencies of images of ``channels``: rows of the orthonormal cosine transform along each side."""

    channels: int
    down: Tensor
    across: Tensor

    @property
    def size(self) -> int:
        """How many directions there are at right angles."""
        return self.channels * len(self.down) * len(self.across)

    def drawn(self, count: int, rng: Stream, orthogonal: bool, linf: bool) -> Tensor:
        """(count, c * h * w) directions, those that are orthogonal of one length."""
        if orthogonal:
            noise = _orthogonal(count, self.size, rng)
        else:
            noise = rng.rand(count, self.size).mul_(2).sub_(1) if linf else rng.randn(count, self.size)
        if len(self.down) == self.down.shape[1]:
            return noise
        parts = noise.to(self.down).view(count, self.channels, len(self.down), len(self.across))
        return (self.down.T @ parts @ self.across).flatten(1)


def _bands(x: Tensor, most: int) -> list[_Band]:
    """Those of images like ``x``, each with half of the next one's frequencies along each side; the last has all."""
    c, h, w = x.shape
    high, wide = h, w
    bands: list[_Band] = []
    while len(bands) < most and (not bands or min(high, wide) >= FEWEST):
        bands.append(_Band(c, _waves(high, h).to(x), _waves(wide, w).to(x)))
        high, wide = -(-high // 2), -(-wide // 2)
    return bands[::-1]


def _waves(count: int, side: int) -> Tensor:
    """(count, side) the lowest rows of the orthonormal cosine transform."""
    angles = torch.arange(count)[:, None] * (2 * torch.arange(side) + 1) * (math.pi / (2 * side))
    rows = angles.cos() * math.sqrt(2 / side)
    rows[0] = math.sqrt(1 / side)
    return rows


def _normal(adv: Tensor, radius: float, count: int, draw: Callable[[int], Tensor], away: Tensor | None = None) -> Found:
    """Which way from ``adv`` the adversarial side lies, by ``count`` points at ``radius`` around it.

    Those around ``away`` lie across it, and if they are all on one side, the answer is 0.
    """
    sums, votes = adv.new_zeros(2, adv.numel()), 0.0
    for size in _shares(count, max(64, QUESTION // adv.numel())):
        noise = draw(size).to(adv)
        if away is not None:
            noise.addmm_((noise @ away.view(-1, 1)) / away.square().sum().clamp_min(1e-30), away.view(1, -1), alpha=-1)
        noise.mul_(radius / noise.norm(dim=1, keepdim=True).clamp_min(1e-30))
        tried = noise.add_(adv.flatten()).clamp_(0, 1)
        side = (yield tried.view(size, *adv.shape)).to(adv.dtype).mul_(2).sub_(1)
        sums += torch.stack([side, torch.ones_like(side)]) @ tried.sub_(adv.flatten())
        votes += float(side.sum())
    mean = votes / count
    if abs(mean) == 1:
        return (sums[0] if away is None else torch.zeros_like(sums[0])).view_as(adv)
    return (sums[0] - mean * sums[1]).view_as(adv)


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


def _turn(x: Tensor, adv: Tensor, normal: Tensor, angle: float) -> Generator[Tensor, Tensor, tuple[Tensor, float]]:
    """The adversarial point furthest along the circle with the diameter from ``x`` to ``adv``, to three tenths.

    Seen from ``x`` it turns from ``adv`` toward ``normal``, at first by ``angle``; how far it got is where to begin
    the next time.
    """
    far, best = float((adv - x).norm()), adv
    out = (adv - x) / max(far, 1e-30)
    aside = normal - (normal * out).sum() * out
    aside /= aside.norm().clamp_min(1e-30)
    low, high = 0.0, math.pi / 2
    for _ in range(10):
        way = math.cos(angle) * out + math.sin(angle) * aside
        tried = torch.add(x, way, alpha=far * math.cos(angle)).clamp_(0, 1)
        if (yield tried[None]):
            low, best = angle, tried
        else:
            high = angle
        if high - low <= 0.3 * low or high < 0.01:
            break
        angle = min(2 * low or INF, (low + high) / 2)
    return best, low or high


def _approach(x: Tensor, adv: Tensor) -> Found:
    """The adversarial point nearest ``x`` on the line to ``adv``, which is close to it already: steps that double."""
    low, high, stride, best = 0.0, 1.0, NEAR, adv
    while high - low > NEAR:
        share = max((low + high) / 2, high - stride)
        tried = torch.lerp(x, adv, share).clamp_(0, 1)
        if (yield tried[None]):
            high, best = share, tried
        else:
            low = share
        stride *= 2
    return best


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
