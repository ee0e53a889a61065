"""Wasserstein attack: gradient steps, each brought back to where moving brightness leads."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Loss
from besiege.regions.wasserstein import Wasserstein


@evasion("Wasserstein", paper="arXiv:1902.07906", norms=("wasserstein",))
def wasserstein(
    oracle: Oracle,
    x: Tensor,
    ball: Wasserstein,
    rng: Rng,
    *,
    steps: int = 100,
    stride: float = 2.0,
    direction: Literal["linf", "l2"] = "l2",
    strength: float = 30.0,
    sweeps: int = 5,
    warm: bool = True,
    window: int = 5,
    growth: float = 1.0,
    loss: Loss = "ce",
) -> Tensor:
    """Take ``steps`` of length ``stride`` in a norm's ``direction`` and project by ``sweeps`` Sinkhorn iterations.

    ``strength`` weighs nearness against the entropy of the moves (`Wasserstein.approach`); no move leaves a
    ``window`` or that of the region. With ``growth`` above 1 the radius begins at 0.01 and grows by it every tenth
    step, until it is eps.

    Departs from the paper (Wong et al. 2019): it projects anew each time, up to 400 sweeps, with an entropy so heavy
    that the image stays well inside the ball, and then clamps it, which takes mass away. Here a projection goes on
    from the last one's dual variables (unless not ``warm``) and takes few sweeps, the weight of entropy is a tenth,
    and [0, 1] is part of the projection. The paper's way is ``strength=4`` on MNIST and 0.3 on CIFAR-10,
    ``direction="linf", stride=0.1, sweeps=400, warm=False, growth=1.1``, 400 steps.
    """
    if growth < 1:
        raise BadInput(f"wasserstein: growth must be at least 1, not {growth}")
    steep, narrow = Ball(2 if direction == "l2" else INF, 1.0), replace(ball, kernel=min(window, ball.kernel))
    adv, potential, price = x, torch.zeros_like(x), torch.ones_like(x[:, 0, 0, 0])
    for step in range(steps):
        _, grad = oracle.gradient(adv, loss)
        x, adv, grad, potential, price = oracle.live(x, adv, grad, potential, price)
        if growth > 1:
            narrow = narrow.sized(min(float(ball.eps), 0.01 * growth ** (step // 10)))
        begun = (potential, price) if warm else ()
        tried = adv - stride * steep.steepest(grad)
        adv, potential, price = narrow.approach(tried, x, *begun, strength=strength, sweeps=sweeps)
    return adv
