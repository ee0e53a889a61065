"""Boundary attack: a random walk along the decision boundary toward the image, by labels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.blackbox.hopskipjump import bisect, nearest
from besiege.core.method import Search, search
from besiege.core.rng import Stream
from besiege.core.threat import Ball

TRIALS = 20
"""The steps' lengths follow how many of this many last tries succeeded."""

DRAWN = 32
"""Random numbers are drawn for this many steps at once."""


@search("Boundary attack", paper="arXiv:1712.04248", norms=(2,), asks="labels", seeks="minimum", start=True)
def boundary(
    x: Tensor,
    ball: Ball,
    rng: Stream,
    *,
    start: Tensor,
    starts: int = 20,
    moves: int = 25_000,
    spherical: float = 0.01,
    source: float = 0.01,
    least: float = 1e-7,
    memory: float = 0.0,
) -> Search:
    """Try ``moves`` random moves around ``x`` and, where one stays adversarial, a move toward it.

    Both are shares of the distance: ``spherical`` grows where more than half of its moves succeed, ``source`` where
    more than a quarter do, and they shrink where fewer do; the walk ends when ``source`` falls below ``least``
    (Brendel et al. 2018).

    Departs from the paper: it begins on the boundary, at the nearest of the image that the engine found and
    ``starts`` noise images; ``starts=0`` begins at the engine's. With ``memory`` each move is drawn toward the mean
    of the last that succeeded.
    """
    adv = yield from nearest(x, start, starts, rng, False)
    if starts:
        adv = yield from bisect(x, adv, 1e-3, False)
    path, around, ahead = torch.zeros_like(x), [], []
    for step in range(moves):
        if step % DRAWN == 0:
            noise = rng.randn(DRAWN, *x.shape).to(x)
        away = adv - x
        far = away.norm()
        if float(far) == 0:
            return
        way = noise[step % DRAWN] / noise[step % DRAWN].norm() + memory * path
        way = way - away * ((way * away).sum() / far.square())
        moved = away + way * (spherical * far / way.norm().clamp_min(1e-30))
        moved = moved * (far / moved.norm())
        stays = bool((yield (x + moved).clamp_(0, 1)[None]))
        around.append(stays)
        if stays:
            tried = (x + (1 - source) * moved).clamp_(0, 1)
            won = bool((yield tried[None]))
            ahead.append(won)
            if won and float((tried - x).norm()) < float(far):
                path = 0.9 * path + 0.1 * way / way.norm().clamp_min(1e-30)
                adv = tried
        if len(around) == TRIALS:
            spherical, around = min(1.0, _followed(spherical, around, 0.5, 0.2)), []
        if len(ahead) == TRIALS:
            source, ahead = min(0.5, _followed(source, ahead, 0.25, 0.1)), []
        if source < least:
            return


def _followed(length: float, tries: list[bool], high: float, low: float) -> float:
    """``length``, half as long again if more than the share ``high`` of ``tries`` succeeded, shorter below ``low``."""
    share = sum(tries) / len(tries)
    return length * 1.5 if share > high else length / 1.5 if share < low else length
