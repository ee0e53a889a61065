"""Projected gradient descent: many small steps, each brought back into the ball."""

from __future__ import annotations

from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Loss


@evasion("PGD", paper="arXiv:1706.06083", norms=(1, 2, INF))
def pgd(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 40,
    stride: float = 2.5,
    restarts: int = 1,
    loss: Loss = "ce",
) -> None:
    """Take ``steps`` steps of ``stride * eps / steps`` down ``loss``, from each of ``restarts`` random starts."""
    step = stride * float(ball.eps) / steps
    for _ in range(restarts):
        x, rng = oracle.live(x, rng)
        origin, adv = x, ball.sample(x, rng)
        for _ in range(steps):
            _, grad = oracle.gradient(adv, loss)
            adv = ball.project(adv + step * ball.steepest(-grad, adv, step), origin)
            origin, adv, x, rng = oracle.live(origin, adv, x, rng)
        oracle.is_adversarial(adv)
