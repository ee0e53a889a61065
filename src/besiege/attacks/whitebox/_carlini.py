"""What Carlini & Wagner's attacks and the elastic net share: Adam in tanh space, searches for c, an opening."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from besiege.attacks.whitebox.apgd_t import rivals
from besiege.attacks.whitebox.fmn import fmn
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, rowwise


class Walk:
    """Adam on w, where ``image = (tanh(w) + 1) / 2`` never leaves [0, 1]."""

    def __init__(self, start: Tensor) -> None:
        self.w = ((2 * start - 1) * (1 - 1e-4)).atanh()
        self.mean, self.square, self.taken = torch.zeros_like(self.w), torch.zeros_like(self.w), 0
        self.image = (self.w.tanh() + 1) / 2

    def step(self, grad: Tensor, lr: Tensor) -> None:
        """Go down ``grad`` (n, c, h, w), the objective's gradient at the images, by ``lr`` (n,)."""
        self.taken += 1
        slope = grad * 2 * self.image * (1 - self.image)
        self.mean, self.square = self.mean.lerp(slope, 0.1), self.square.lerp(slope.square(), 0.001)
        rate = lr / (1 - 0.9**self.taken)
        self.w = self.w - rowwise(rate, slope) * self.mean / ((self.square / (1 - 0.999**self.taken)).sqrt() + 1e-8)
        self.image = (self.w.tanh() + 1) / 2

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.w, self.mean, self.square, self.image = (p[rows] for p in (self.w, self.mean, self.square, self.image))


def bisected(
    descend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    c: Tensor,
    searches: int,
    warm: bool,
) -> None:
    """Search ``searches`` times for the least c (n,) that succeeds: ten times as much at first, then bisection.

    ``descend(start, c, rows)`` gives the distance of the nearest success, inf where there is none, and that success.
    If ``warm``, a search begins at the nearest so far, and an image leaves once one has not brought it 1 % nearer.
    """
    rows = torch.arange(len(start), device=start.device)
    low, high, nearest = torch.zeros_like(c), torch.full_like(c, INF), torch.full_like(c, INF)
    for _ in range(searches):
        size, near = descend(start[rows], c[rows], rows)
        found, gained = size < INF, size < 0.99 * nearest[rows]
        low[rows], high[rows] = torch.where(found, low[rows], c[rows]), torch.where(found, c[rows], high[rows])
        c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        nearest[rows] = torch.minimum(size, nearest[rows])
        if warm:
            closer = size <= nearest[rows]
            start = start.index_copy(0, rows[closer], near[closer])
            rows = rows[gained | ~nearest[rows].isfinite()]
            if not len(rows):
                return


def raised(
    oracle: Oracle,
    start: Tensor,
    c: Tensor,
    lr: Tensor,
    rows: Tensor,
    steps: int,
    doublings: int,
    shown: Callable[[Tensor, Tensor], Tensor],
    judged: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk from ``start`` until each image is solved; c doubles, ``doublings`` times, after ``steps`` without that.

    ``shown(image, at)`` is what is asked about, for the images ``at`` of ``rows``; ``judged(adv, margin, grad, c, at)``
    the objective's gradient, and which are solved. Returns which were, what solved them, the margin's gradient
    there, and each one's c.
    """
    found, near, slope, c = torch.zeros_like(rows, dtype=torch.bool), start.clone(), torch.zeros_like(start), c.clone()
    walk, at = Walk(start), torch.arange(len(rows), device=rows.device)
    for i in range(steps * (doublings + 1)):
        if i and i % steps == 0:
            c[at] *= 2
        adv = shown(walk.image, at)
        margin, grad = oracle.gradient(adv, "margin", rows[at])
        down, won = judged(adv, margin, grad, c[at], at)
        walk.step(down, lr[at])
        if bool(won.any()):
            found[at[won]], near[at[won]], slope[at[won]] = True, adv[won], grad[won]
            walk.keep(~won)
            at = at[~won]
            if not len(at):
                break
    return found, near, slope, c


def opened(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, steps: int, targets: int) -> Tensor:
    """The nearest of the points where ``steps`` of FMN toward each of the ``targets`` highest other classes end."""
    ends = [
        fmn.function(oracle.toward(target), x, ball, rng, steps=steps)
        for target in rivals(oracle, x, targets).unbind(1)
    ]
    nearest = torch.stack([ball.distance(end, x) for end in ends]).argmin(0)
    return torch.stack(ends, 1)[torch.arange(len(x), device=x.device), nearest]
