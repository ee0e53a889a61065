"""Fast minimum norm: the gradient turns a perturbation in a ball whose radius follows success."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Norm, rowwise

DUAL: dict[Norm, Norm] = {1: INF, 2: 2, INF: 1}


@evasion("FMN", paper="arXiv:2102.12827", norms=(0, 1, 2, INF), seeks="minimum")
def fmn(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 100,
    stride: float = 1.0,
    gamma: float = 0.05,
    opening: float = 0.25,
) -> Tensor:
    """Take ``steps`` steps of length ``stride`` in a ball resized by ``gamma`` (Pintor et al. 2021).

    Both fall along a cosine, to a hundredth and to 0.001. Departs from the paper: for the share ``opening`` of the
    steps the gap to all other classes together leads (cross-entropy's direction), which chooses the class better than
    the margin does; no point leaves [0, 1], and norm 0 counts pixels.
    """
    adv, farthest = x, ball.size(torch.maximum(x, 1 - x))
    nearest, eps = farthest.clone(), torch.ones_like(farthest)
    found = torch.zeros_like(eps, dtype=torch.bool)
    for i in range(steps):
        early = i < opening * steps
        gap, grad = gap_to_all(oracle, adv) if early else oracle.gradient(adv)
        won, size = gap < 0, ball.distance(adv, x)
        if not early:
            found |= won
            nearest = torch.where(won, torch.minimum(nearest, size), nearest)
        fall = (1 + math.cos(math.pi * i / steps)) / 2
        change = 0.001 + (gamma - 0.001) * fall
        if ball.norm == 0:
            less = torch.minimum(eps - 1, eps * (1 - change)).floor().clamp_min(0)
            more = torch.maximum(eps + 1, eps * (1 + torch.where(found, change, 2 * gamma))).floor()
        else:
            reach = size + gap.abs() / Ball(DUAL[ball.norm], 1.0).size(grad).clamp_min(1e-12)
            less, more = eps * (1 - change), torch.where(found, eps, reach) * (1 + change)
            less = torch.minimum(less, size)
        eps = torch.where(won, torch.minimum(less, nearest), more).minimum(farthest)
        adv = adv - stride * (0.01 + 0.99 * fall) * Ball(2, 1.0).steepest(grad)
        now = ball.sized(eps)
        adv = now.shorten(adv, x) if ball.norm == 2 else now.project(adv, x)
    return adv


def gap_to_all(oracle: Oracle, adv: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log(p / (1 - p)) and its gradient; below zero once the image's class has less than half of the probability."""
    value, grad = oracle.gradient(adv, "ce", rows)
    log_p = -value if oracle.goal.targeted else value
    other = (-torch.expm1(log_p)).clamp_min(1e-30)
    gap = log_p - other.log()
    return (-gap if oracle.goal.targeted else gap), grad / rowwise(other, grad)
