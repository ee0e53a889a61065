"""Carlini & Wagner's L2 attack: Adam on distance plus c times margin, with c found by bisection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    searches: int = 5,
    lr: float = 0.1,
    first_c: float = 0.0,
    shrink: float = 0.01,
    warm: int = 1,
    decay: float = 0.1,
    up: float = 2.0,
    beta2: float = 0.999,
    tol: float = 1e-4,
    op: int = 0,
    frac: float = 1.0,
) -> None:
    """Minimise ``|x' - x|^2 + c * max(margin, 0)``."""
    n = len(x)
    origin = ((2 * x - 1) * (1 - shrink)).atanh()
    start = origin.clone()
    if first_c:
        c = x.new_full((n,), first_c)
    else:
        margin, grad = oracle.gradient(x)
        c = up * 2 * margin.abs() / grad.flatten(1).square().sum(1).clamp_min(1e-12)
    low, high, nearest = torch.zeros(n), torch.full((n,), INF), torch.full((n,), INF)
    for s in range(searches):
        rows = torch.arange(n)
        w = start.clone()
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        found, before = torch.zeros(n, dtype=torch.bool), torch.full((n,), INF)
        for i in range(steps):
            t = w.tanh()
            adv = (t + 1) / 2
            if s < op and i < frac * steps:
                margin, grad = oracle.gradient(adv, "ce", rows)
                q = (-torch.expm1(margin)).clamp_min(1e-30)
                margin, grad = margin - q.log(), grad / rowwise(q, grad)
            else:
                margin, grad = oracle.gradient(adv, "margin", rows)
            delta = adv - x[rows]
            dist = delta.flatten(1).square().sum(1)
            won = margin < 0
            found[rows] |= won
            closer = won & (dist < nearest[rows])
            nearest[rows[closer]] = dist[closer]
            if warm:
                start[rows[closer]] = w[closer]
            value = dist + c[rows] * margin.clamp_min(0)
            slope = (2 * delta + rowwise(c[rows] * (margin > 0), x) * grad) * (1 - t * t) / 2
            mean = mean.lerp(slope, 0.1)
            square = square.lerp(slope * slope, 1 - beta2)
            rate = lr * (decay ** (i / steps) if decay else 1)
            w = w - rate / (1 - 0.9 ** (i + 1)) * mean / ((square / (1 - beta2 ** (i + 1))).sqrt() + 1e-8)
            if i % max(1, steps // 10) == 0:
                go = value < (1 - tol) * before[rows]
                before[rows] = value
                if not bool(go.all()):
                    rows, w, mean, square = rows[go], w[go], mean[go], square[go]
                    if not len(rows):
                        break
        low, high = torch.where(found, low, c), torch.where(found, c, high)
        c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
