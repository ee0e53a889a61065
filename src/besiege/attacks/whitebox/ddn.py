"""Decoupled direction and norm: the gradient turns a perturbation whose norm follows success."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import Ball, rowwise


@evasion("DDN", paper="arXiv:1811.09600", norms=(2,), seeks="minimum")
def ddn(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    first_eps: float = 1.0,
    opening: float = 0.25,
) -> Tensor:
    """Take ``steps`` steps of length 1 to 0.01, each rescaled to a norm that changes by ``gamma`` (Rony et al. 2019).

    The norm starts at ``first_eps``. Departs from the paper: cross-entropy leads for the share ``opening`` of the
    steps, in which it chooses the class, with a probability of 1/2 for the boundary (all others, if targeted, below
    1/2); then the margin leads, whose sign is success itself.
    """
    adv, farthest = x, ball.size(torch.maximum(x, 1 - x))
    eps = torch.full_like(farthest, first_eps)
    for i in range(steps):
        if i < opening * steps:
            value, grad = oracle.gradient(adv, "ce")
            won = value < (math.log(2) if oracle.goal.targeted else -math.log(2))
        else:
            value, grad = oracle.gradient(adv)
            won = value < 0
        stride = 0.01 + 0.99 * (1 + math.cos(math.pi * i / steps)) / 2
        eps = torch.minimum(eps * torch.where(won, 1 - gamma, 1 + gamma), farthest)
        delta = adv - x - stride * ball.steepest(grad)
        adv = (x + delta * rowwise(eps / ball.size(delta).clamp_min(1e-12), x)).clamp(0, 1)
    return adv
