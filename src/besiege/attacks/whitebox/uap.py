"""Universal adversarial perturbation: one small change that makes most images leave their class."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.core.method import universal
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball
from besiege.core.trigger import Shift


@universal("UAP", paper="arXiv:1610.08401", norms=(2, INF))
def uap(
    oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, *, epochs: int = 10, batch: int = 32, ceiling: float = 3.0
) -> Shift:
    """Climb the mean loss of mini-batches of ``batch`` images by steps that shrink over ``epochs`` passes.

    An image whose margin is lost by ``ceiling`` logits no longer counts, so that no single image draws the
    perturbation to itself.

    Departs from the paper (Moosavi-Dezfooli et al. 2017): its loop over DeepFool is replaced by stochastic
    gradients on a clipped loss (Shafahi et al. 2020, arXiv:1811.11304), which fools more images for fewer passes.
    """
    n, shift, momentum = len(x), torch.zeros_like(x[:1]), torch.zeros_like(x[:1])
    total = epochs * -(-n // batch)
    for step in range(total):
        if step % -(-n // batch) == 0:
            order = rng.rand().argsort()
        rows = order[(step * batch) % n :][:batch]
        moved = ball.project(x[rows] + shift, x[rows])
        margin, grad = oracle.gradient(moved, "margin", rows)
        slope = (grad * (margin > -ceiling).to(grad).reshape(-1, 1, 1, 1)).sum(0, keepdim=True)
        momentum = 0.9 * momentum + slope / slope.abs().mean().clamp_min(1e-12)
        stride = ball.eps * (1 - step / total) / 4
        shift = _within(ball, shift - stride * ball.steepest(momentum))
    return Shift(shift)


def _within(ball: Ball, shift: Tensor) -> Tensor:
    """The perturbation itself brought into the ball, apart from any image."""
    if ball.norm == INF:
        return shift.clamp(-float(ball.eps), float(ball.eps))
    return shift * (ball.eps / ball.size(shift).clamp_min(1e-12)).clamp_max(1)
