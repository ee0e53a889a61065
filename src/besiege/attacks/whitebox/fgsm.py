"""Fast gradient sign method: one step along the loss's steepest direction."""

from __future__ import annotations

from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Loss


@evasion("FGSM", paper="arXiv:1412.6572", norms=(1, 2, INF))
def fgsm(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, *, loss: Loss = "ce") -> Tensor:
    """Spend all of ``eps`` in one step down ``loss`` from the image itself (Goodfellow et al. 2015)."""
    _, grad = oracle.gradient(x, loss)
    return ball.farthest(x, -grad)
