"""Basic iterative method: small steps of FGSM, each brought back into the ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Loss


@evasion("BIM (I-FGSM)", paper="arXiv:1607.02533", norms=(INF,))
def bim(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int | None = None,
    stride: float = 1 / 255,
    loss: Loss = "ce",
) -> Tensor:
    """Take ``steps`` steps of ``stride`` from the image itself (Kurakin et al. 2017).

    Without ``steps`` there are as many as the paper takes: the lesser of e + 4 and 1.25 e, e being ``eps`` in
    units of 1/255.
    """
    unit = float(ball.eps) * 255
    adv = x
    for _ in range(steps or math.ceil(min(unit + 4, 1.25 * unit))):
        x, adv = oracle.live(x, adv)
        _, grad = oracle.gradient(adv, loss)
        adv = ball.project(torch.sub(adv, grad.sign(), alpha=stride), x)
    return adv
