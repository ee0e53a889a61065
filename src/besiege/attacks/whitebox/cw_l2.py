"""Carlini & Wagner's L2 attack: Adam on distance plus c times margin, with c found by bisection."""

from __future__ import annotations

import torch
from torch import Tensor

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
    n, start, rows = len(x), x, torch.arange(len(x), device=x.device)
    c, rate, low = x.new_full((n,), first_c), x.new_full((n,), lr), x.new_zeros(n)
    high, nearest = x.new_full((n,), INF), x.new_full((n,), INF)
    if opening:
        start = fmn.function(oracle, x, ball, rng, steps=opening)
        _, grad = oracle.gradient(start)
        reach = ball.distance(start, x)
        c, rate = 4 * reach / ball.size(grad).clamp_min(1e-12), lr * reach.clamp_max(1)
    for _ in range(searches):
        size, near = _descend(oracle, x[rows], start[rows], c[rows], rate[rows], rows, steps, decay)
        found, gained = size < INF, size < 0.99 * nearest[rows]
        low[rows], high[rows] = torch.where(found, low[rows], c[rows]), torch.where(found, c[rows], high[rows])
        c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        nearest[rows] = torch.minimum(size, nearest[rows])
        if opening:
            closer = size <= nearest[rows]
            start = start.index_copy(0, rows[closer], near[closer])
            rows = rows[gained | ~nearest[rows].isfinite()]
            if not len(rows):
                return


def _descend(
    oracle: Oracle, x: Tensor, start: Tensor, c: Tensor, lr: Tensor, rows: Tensor, steps: int, decay: float
) -> tuple[Tensor, Tensor]:
    """One search: the distance of the nearest success (inf where there is none) and that success, an image each."""
    w = ((2 * start - 1) * (1 - 1e-4)).atanh()
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    least = before = torch.full_like(c, INF)
    best, size, at = start.clone(), torch.full_like(c, INF), torch.arange(len(x), device=x.device)
    for i in range(steps):
        adv = (w.tanh() + 1) / 2
        margin, grad = oracle.gradient(adv, "margin", rows)
        distance = (adv - x).flatten(1).norm(dim=1)
        closer = (margin < 0) & (distance < size[at])
        size[at[closer]], best[at[closer]] = distance[closer], adv[closer]
        least = torch.minimum(least, distance.square() + c * margin.clamp_min(0))
        slope = (2 * (adv - x) + rowwise(c * (margin > 0), x) * grad) * 2 * adv * (1 - adv)
        mean, square = mean.lerp(slope, 0.1), square.lerp(slope.square(), 0.001)
        step = lr * decay ** (i / steps) / (1 - 0.9 ** (i + 1))
        w = w - rowwise(step, w) * mean / ((square / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
        if i % max(1, steps // 10) == 0:
            falling = least < 0.9999 * before
            if not bool(falling.all()):
                if not bool(falling.any()):
                    break
                w, mean, square, x, c, lr, least, rows, at = (
                    part[falling] for part in (w, mean, square, x, c, lr, least, rows, at)
                )
            before = least
    return size, best
