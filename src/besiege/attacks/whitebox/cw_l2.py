"""Carlini & Wagner's L2 attack: Adam on distance plus c times margin, with c found by bisection."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.whitebox._carlini import Walk, bisected
from besiege.attacks.whitebox.fmn import fmn
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, rowwise


@evasion("C&W L2", paper="arXiv:1608.04644", norms=(2,), seeks="minimum")
def cw_l2(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 100,
    searches: int = 3,
    lr: float = 0.01,
    decay: float = 0.1,
    first_c: float = 1e-3,
    opening: int = 50,
) -> None:
    """Minimise ``|x' - x|^2 + c * max(margin, 0)`` over w, where ``x' = (tanh(w) + 1) / 2`` (Carlini & Wagner 2017).

    ``searches`` values of c are tried, ``steps`` steps each; an image leaves a search once a tenth of the steps has
    not lowered its loss, and the attack once a search has not brought it 1 % nearer.

    Departs from the paper, whose method is ``opening=0, decay=1, steps=10000, searches=9``: the first search starts
    where ``opening`` steps of FMN end, with twice the c that would hold that point on the boundary, and the next
    ones start at the nearest success; Adam's ``lr`` is multiplied by that first distance where it is below 1, and
    falls to the share ``decay`` of itself.
    """
    start, c, rate = x, x.new_full((len(x),), first_c), x.new_full((len(x),), lr)
    if opening:
        start = fmn.function(oracle, x, ball, rng, steps=opening)
        _, grad = oracle.gradient(start)
        reach = ball.distance(start, x)
        c, rate = 4 * reach / ball.size(grad).clamp_min(1e-12), lr * reach.clamp_max(1)
    bisected(
        lambda start, c, rows: _descend(oracle, x[rows], start, c, rate[rows], rows, steps, decay),
        start,
        c,
        searches,
        warm=opening > 0,
    )


def _descend(
    oracle: Oracle, x: Tensor, start: Tensor, c: Tensor, lr: Tensor, rows: Tensor, steps: int, decay: float
) -> tuple[Tensor, Tensor]:
    """One search: the distance of the nearest success (inf where there is none) and that success, an image each."""
    walk = Walk(start)
    least = before = torch.full_like(c, INF)
    best, size, at = start.clone(), torch.full_like(c, INF), torch.arange(len(x), device=x.device)
    for i in range(steps):
        adv = walk.image
        margin, grad = oracle.gradient(adv, "margin", rows)
        distance = (adv - x).flatten(1).norm(dim=1)
        closer = (margin < 0) & (distance < size[at])
        size[at[closer]], best[at[closer]] = distance[closer], adv[closer]
        least = torch.minimum(least, distance.square() + c * margin.clamp_min(0))
        walk.step(2 * (adv - x) + rowwise(c * (margin > 0), x) * grad, lr * decay ** (i / steps))
        if i % max(1, steps // 10) == 0:
            falling = least < 0.9999 * before
            if not bool(falling.all()):
                if not bool(falling.any()):
                    break
                walk.keep(falling)
                x, c, lr, least, rows, at = (part[falling] for part in (x, c, lr, least, rows, at))
            before = least
    return size, best
