"""FAB-T: jumps to the linearized boundary of one class after another, staying near the image."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.whitebox.apgd_t import rivals
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Norm, rowwise


@evasion("FAB-T", paper="arXiv:1907.02044", norms=(1, 2, INF), seeks="minimum")
def fab_t(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 100,
    targets: int = 9,
    overshoot: float = 1.05,
    pull: float = 0.1,
    back: float = 0.9,
) -> None:
    """Approach each of the ``targets`` highest other classes in ``steps`` steps (Croce & Hein 2020).

    A step goes ``overshoot`` of the way to the boundary, drawn toward the image by at most ``pull``; from a
    success the next one begins at ``back`` of its distance. Unlike the authors we linearize at the success
    itself, which saves a pass, take the target's boundary with whichever class stands highest there, and leave
    out the final search.
    """
    ranked = rivals(oracle, x, targets)
    for k in range(ranked.shape[1]):
        x, ranked = oracle.live(x, ranked)
        _approach(oracle.toward(ranked[:, k]), x, ball, steps, overshoot, pull, back)


def _approach(oracle: Oracle, x: Tensor, ball: Ball, steps: int, overshoot: float, pull: float, back: float) -> None:
    adv = x
    for _ in range(steps):
        gap, slope = oracle.gradient(adv)
        x, adv, gap, slope = oracle.live(x, adv, gap, slope)
        kept = torch.where(gap < 0, back, 1.0)
        start, rise = x + rowwise(kept, x) * (adv - x), (slope * (adv - x)).flatten(1).sum(1)
        near = to_plane(start, slope, gap - (1 - kept) * rise, ball.norm)
        far = to_plane(x, slope, gap - rise, ball.norm)
        reach, whole = ball.size(near), ball.size(far)
        share = rowwise((reach / (reach + whole).clamp_min(1e-12)).clamp_max(pull), x)
        adv = torch.lerp(start + overshoot * near, x + overshoot * far, share).clamp_(0, 1)
    oracle.is_adversarial(adv)


def to_plane(x: Tensor, slope: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The shortest step in ``norm`` that stays in [0, 1] and changes ``slope * x`` by ``-gap`` (n,).

    Where none does, the step that comes closest.
    """
    origin, weight = x.flatten(1), slope.flatten(1) * -gap.sign()[:, None]
    length = _greedy if norm == 1 else _even
    return length(weight, weight.sign() if norm == INF else weight, -origin, 1 - origin, gap.abs()).view_as(x)


def _even(weight: Tensor, speed: Tensor, low: Tensor, high: Tensor, gap: Tensor) -> Tensor:
    """``scale * speed`` within the bounds, for the scale at which it closes the gap.

    What it closes is concave in the scale, so Newton's method climbs to the answer from zero without passing it.
    """
    gain = weight * speed
    whole = gain.sum(1)
    scale = gap / whole.clamp_min(1e-30)
    while True:
        wanted = scale[:, None] * speed
        step = wanted.clamp(low, high)
        rate = whole - (gain * (wanted - step).sign().abs()).sum(1)
        more = (gap - (weight * step).sum(1)) / rate.clamp_min(1e-30)
        more = more.where((more > 1e-5 * scale) & (rate > 1e-6 * whole), 0)
        if not bool(more.any()):
            return step
        scale = scale + more


def _greedy(weight: Tensor, speed: Tensor, low: Tensor, high: Tensor, gap: Tensor) -> Tensor:
    """The steepest coordinates go as far as they can, until the gap is closed."""
    ranked, order = weight.abs().sort(1, descending=True)
    room = (2 * speed.sign()).clamp(low, high).abs().gather(1, order)
    closed = ranked * room
    left = (gap[:, None] - closed.cumsum(1) + closed).clamp_min(0)
    length = torch.minimum(left / ranked.clamp_min(1e-30), room)
    return torch.zeros_like(weight).scatter(1, order, length) * speed.sign()
