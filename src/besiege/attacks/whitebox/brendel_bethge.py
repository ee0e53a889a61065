"""Brendel & Bethge: walks along the boundary toward the image, each step the best within a radius."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besiege.attacks.whitebox.fab_t import to_plane
from besiege.attacks.whitebox.fmn import gap_to_all
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Norm

ROUNDS = 8
"""How often at most the pull toward the image is adjusted; the nearest step is then known to a thousandth."""

ROOTS = 100
"""How often at most a multiplier is adjusted; it takes 3 to 9 as a rule."""


@evasion("Brendel & Bethge", paper="arXiv:1907.01003", norms=(0, 1, 2, INF), seeks="minimum", start=True)
def brendel_bethge(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    start: Tensor,
    steps: int = 100,
    opening: float = 0.1,
    region: float = 1.0,
    halvings: int = 7,
    momentum: float = 0.5,
    overshoot: float = 1.1,
    depth: float = 0.05,
) -> Tensor:
    """Take ``steps`` steps, each the best for the linearized boundary within a radius (Brendel et al. 2019).

    The radius is ``region`` times the number of values, at most the distance to the image, and falls by half
    ``halvings`` times. A step aims ``overshoot`` times as far as the boundary, or as much short of it from within.

    Departs from the paper, whose method is ``opening=0, depth=0, region=1e-3, halvings=20, momentum=0.8, steps=1000``:
    for the share ``opening`` of the steps the walk leads from the image to the boundary with all other classes
    together, which chooses the class, and only what has not fallen by half of the steps goes on from its start. A step
    ends ``depth`` beyond the boundary, as a share of the image's own gap; that falls after a success and grows after a
    miss, so that the walk returns to the far side whatever the curvature.
    """
    first, resort = round(opening * steps), steps // 2 if opening else 0
    adv, fallen = x, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    normal, radius, whole = torch.zeros_like(x), x.new_full((len(x),), INF), x.new_zeros(len(x))
    beyond = torch.full_like(radius, depth)
    for i in range(steps):
        if i == resort:
            adv = _at_starts(oracle, x, adv, start, ball, fallen)
        if i in (first, resort):
            way = (adv - x).flatten(1).norm(dim=1)
            way = way.where(way > 0, INF).clamp_max(region * x[0].numel())
            radius = radius.where(fallen & (i > first), way)
        gap, grad = gap_to_all(oracle, adv) if i < first else oracle.gradient(adv)
        won = gap < 0
        if i == 0:
            whole = gap.abs()
        x, start, adv, gap, grad, won, fallen, normal, radius, whole, beyond = oracle.live(
            x, start, adv, gap, grad, won, fallen | won, normal, radius, whole, beyond
        )
        normal = grad if i in (0, first) else momentum * normal + (1 - momentum) * grad
        beyond = (beyond * torch.where(won, 0.8, 1.2)).clamp_max(1)
        change = -gap * torch.where(won, 2 - overshoot, overshoot) - beyond * whole
        adv = best_step(ball.norm, adv, x, normal, change, radius)
        radius = radius * 0.5 ** (halvings / max(1, steps - first))
    return adv


def _at_starts(oracle: Oracle, x: Tensor, adv: Tensor, start: Tensor, ball: Ball, fallen: Tensor) -> Tensor:
    """``adv``; where it has not ``fallen``, the nearest success in ten halvings of the ball that holds ``start``."""
    rows = (~fallen & (ball.distance(start, x) > 0)).nonzero().squeeze(1)
    if not len(rows):
        return adv
    x, start = x[rows], start[rows]
    low, high = x.new_zeros(len(x)), ball.distance(start, x)
    for _ in range(10):
        middle = (low + high) / 2
        won = oracle.is_adversarial(ball.sized(middle).project(start, x), rows)
        low, high = torch.where(won, low, middle), torch.where(won, middle, high)
    return adv.index_copy(0, rows, ball.sized(high).project(start, x))


@dataclass
class _Steps:
    """The steps (n, d) within ``low``, ``high`` and ``radius`` (n,) that rise by ``reach`` (n,) along ``slope``.

    ``back`` (n, d) is the one that leads to the image.
    """

    slope: Tensor
    reach: Tensor
    low: Tensor
    high: Tensor
    radius: Tensor
    back: Tensor

    def __getitem__(self, rows: Tensor) -> _Steps:
        return _Steps(*(part[rows] for part in vars(self).values()))


def best_step(norm: Norm, adv: Tensor, x: Tensor, normal: Tensor, change: Tensor, radius: Tensor) -> Tensor:
    """The image nearest to ``x``, at most ``radius`` (n,) from ``adv`` in L2, where ``normal`` changed by ``change``.

    Where there is none, the one of that region that comes closest to the change. Exact in the norms 1, 2 and inf; in
    norm 0, where finding the fewest pixels means trying every choice of them, the choice is a ranking's.
    """
    at, origin, slope = (part.flatten(1).double() for part in (adv, x, normal))
    size = slope.norm(dim=1).clamp_min(1e-30) * torch.where(change < 0, -1, 1)
    slope = slope / size[:, None]
    slope = torch.where(slope.abs() < 1e-6, 0, slope)
    steps = _Steps(slope, change.double() / size, -at, 1 - at, radius.double(), origin - at)
    near = _shortest(slope, steps.reach, steps.low, steps.high)
    fits = (_dot(slope, near) >= steps.reach - 1e-6) & (near.norm(dim=1) <= steps.radius)
    best = Ball(2, steps.radius.clamp_max(at.shape[1])).farthest(at, slope) - at
    rows = fits.nonzero().squeeze(1)
    if len(rows) and norm == 0:
        best[rows] = _fewest(steps[rows], near[rows], x.shape[1])
    elif len(rows):
        best[rows] = _nearest(steps[rows], near[rows], norm)
    moved = torch.where(best == steps.back, origin, at + best).clamp(0, 1)
    return moved.to(x).view_as(x)


def _nearest(steps: _Steps, near: Tensor, norm: Norm) -> Tensor:
    """The step that ends nearest to the image; ``near`` is the shortest.

    The nearest of any length is known; where it is too long, the pull toward the image that just fits the radius is
    bracketed between the two, and what the ends of the bracket give is mixed.
    """
    short = _dot(steps.slope, steps.back) - steps.reach
    best = steps.back + to_plane(steps.back - steps.low, steps.slope, short, norm)
    rows = (best.norm(dim=1) > steps.radius).nonzero().squeeze(1)
    if not len(rows):
        return best
    steps, near, far = steps[rows], near[rows], best[rows]
    weak, strong = torch.zeros_like(steps.reach), torch.ones_like(steps.reach)
    widest, least = ((end - steps.back).abs().amax(1) for end in (near, far))
    for k in range(ROUNDS):
        under, over = (end.norm(dim=1) - steps.radius for end in (near, far))
        open_ = torch.minimum(-under, over) > 1e-5 * steps.radius
        if not bool(open_.any()):
            break
        share = (under / (under - over)).clamp(0.01, 0.99) if k % 2 == 0 else 0.5
        pull = weak + share * (strong - weak)
        tried = _pulled(steps, pull, norm, widest, least)
        fits = tried.norm(dim=1) <= steps.radius
        up, down = open_ & fits, open_ & ~fits
        weak, near = torch.where(up, pull, weak), torch.where(up[:, None], tried, near)
        strong, far = torch.where(down, pull, strong), torch.where(down[:, None], tried, far)
    along = far - near
    a, b, c = _dot(along, along).clamp_min(1e-30), _dot(near, along), _dot(near, near) - steps.radius.square()
    share = ((b.square() - a * c).clamp_min(0).sqrt() - b) / a
    best[rows] = near + share.clamp(0, 1)[:, None] * along
    return best


def _pulled(steps: _Steps, pull: Tensor, norm: Norm, widest: Tensor, least: Tensor) -> Tensor:
    """The step of the least length, from which the distance to the image subtracts by a ``pull`` (n,) from 0 to 1.

    In norm inf the distance itself goes from ``widest`` (n,) to ``least``.
    """
    slope, reach, low, high, back = steps.slope, steps.reach, steps.low, steps.high, steps.back
    if norm == 2:
        part = pull[:, None] * back
        return part + _shortest(slope, reach - _dot(slope, part), low - part, high - part)
    if norm == INF:
        size = torch.lerp(widest, least, pull)[:, None]
        return _shortest(slope, reach, torch.maximum(low, back - size), torch.minimum(high, back + size))
    slack = (widest * pull / (1 - pull))[:, None]
    lows, highs = torch.cat([low - slack, back + slack], 1), torch.cat([back - slack, high + slack], 1)
    free = _multiplier(slope.repeat(1, 2), reach + _dot(slope, back), lows, highs)[:, None] * slope
    return _within(_within(back, free - slack, free + slack), low, high)


def _fewest(steps: _Steps, near: Tensor, channels: int) -> Tensor:
    """The step that moves the fewest pixels off the image; all others go home. ``near`` is the shortest.

    Their number is bisected. Which they are is chosen by what the multiplier of the best step so far says that each
    would save, and once more by that of the step which this gives.
    """
    n, d = near.shape
    best = near
    kept = _multiplier(steps.slope, steps.reach, steps.low, steps.high)
    few, many = torch.zeros_like(kept, dtype=torch.int64), torch.full_like(kept, d // channels, dtype=torch.int64)
    for _ in range((d // channels).bit_length()):
        count, multiplier = (few + many) // 2, kept
        for _ in range(2):
            free = multiplier[:, None] * steps.slope
            saved = (steps.back - free).square() - (_within(free, steps.low, steps.high) - free).square()
            saved = saved.view(n, channels, -1).sum(1)
            least = saved.sort(1, descending=True).values.gather(1, (count - 1).clamp_min(0)[:, None])
            move = ((saved >= least) & (count > 0)[:, None]).repeat(1, channels)
            low, high = torch.where(move, steps.low, steps.back), torch.where(move, steps.high, steps.back)
            multiplier = _multiplier(steps.slope, steps.reach, low, high)
            tried = _within(multiplier[:, None] * steps.slope, low, high)
            fits = ((_dot(steps.slope, tried) - steps.reach).abs() <= 1e-6) & (tried.norm(dim=1) <= steps.radius)
            best = torch.where(fits[:, None], tried, best)
            kept, many = torch.where(fits, multiplier, kept), torch.where(fits, count, many)
        few = torch.where(many == count, few, count)
    return best


def _shortest(slope: Tensor, reach: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The shortest step within the bounds that rises by ``reach`` along ``slope``, or comes closest to it."""
    return _within(_multiplier(slope, reach, low, high)[:, None] * slope, low, high)


def _multiplier(slope: Tensor, reach: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The t (n,) for which ``t * slope``, brought within the bounds, rises by ``reach``.

    The rise is piecewise linear in t: Newton's method where it stays in the bracket; elsewhere the bracket is halved,
    on a scale that is logarithmic beyond a thousandth.
    """
    above = 2e6 * torch.maximum(low.abs(), high.abs()).amax(1)
    below, top = -above, above
    most, least = (_dot(slope, torch.where(slope > 0, *ends)) for ends in ((high, low), (low, high)))
    t = torch.where(reach >= most, above, torch.where(reach <= least, below, reach))
    square = slope.square()
    for _ in range(ROOTS):
        free = t[:, None] * slope
        step = _within(free, low, high)
        miss = reach - _dot(slope, step)
        open_ = (miss.abs() > 1e-9) & (t.abs() < above)
        if not bool(open_.any()):
            break
        below, top = torch.where(miss > 0, t, below), torch.where(miss < 0, t, top)
        newton = t + miss / _dot(square, (free == step).to(square))
        middle = ((1e3 * below).asinh() + (1e3 * top).asinh()).div(2).sinh() / 1e3
        t = torch.where(open_, torch.where((newton > below) & (newton < top), newton, middle), t)
    return t


def _within(step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(step, low), high)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
