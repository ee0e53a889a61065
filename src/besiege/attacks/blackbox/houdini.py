"""Houdini: descend a smooth stand-in for the task's own loss."""

from __future__ import annotations

from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball


@evasion("Houdini", paper="arXiv:1707.05373", norms=(1, 2, INF))
def houdini(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, *, steps: int = 40, stride: float = 2.5) -> Tensor:
    """Take ``steps`` steps of ``stride * eps / steps`` from the image itself down the surrogate (Cissé et al. 2017).

    The task of a classifier is to be right, its loss 0 or 1. Houdini weighs it with the probability that standard
    normal noise exceeds the gap between the own class and the best other one, which has a slope where the task's loss
    has none. What the steps end in is a success on the target, whatever the gradients are those of: a `Surrogate`
    lens takes them from another model.
    """
    step, adv = stride * float(ball.eps) / steps, x
    for _ in range(steps):
        x, adv = oracle.live(x, adv)
        _, grad = oracle.gradient(adv, "houdini")
        adv = ball.project(adv + step * ball.steepest(-grad, adv, step), x)
    return adv
