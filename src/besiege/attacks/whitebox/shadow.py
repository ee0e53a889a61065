"""Shadow attack: a large change, but smooth and nearly grey, to spoof a certificate of robustness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, Loss, rowwise


@evasion("Shadow", paper="arXiv:2003.08937", norms=(INF,))
def shadow(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 50,
    stride: float = 0.05,
    plain: bool = False,
    variation: float = 0.3,
    colour: float = 1.0,
    similarity: float = 0.5,
    grey: bool = True,
    loss: Loss = "margin",
) -> Tensor:
    """Descend the loss and what makes the change unnatural, weighed by the last three weights (`unnatural`).

    ``grey`` gives all channels the same change. The radius bounds no more than a pixel: 1 leaves only [0, 1], as the
    paper has it (Ghiasi et al. 2020). It is meant for a certificate, behind which only an image of the wrong class
    whose certificate is large enough is a success (`besiege.defenses.input.randomized_smoothing`).

    Departs from the paper, whose method is ``plain=True, steps=300, stride=0.1``, gradient descent from a uniform
    change of up to a half: it sets out from the image, with momentum, in steps whose root mean square is ``stride``
    radii at first and falls along a cosine; the weights fall too, to nothing, for what cannot be had naturally.
    """
    shape = (1 if grey else x.shape[1], *x.shape[2:])
    change = rng.rand(*shape).to(x) - 0.5 if plain else x.new_zeros(len(x), *shape)
    momentum = torch.zeros_like(change)
    longest = stride * float(ball.eps) * math.sqrt(change[0].numel())
    for i in range(steps):
        _, grad = oracle.gradient(ball.project(x + change, x), loss)
        x, change, momentum, grad = oracle.live(x, change, momentum, grad)
        pull = _slope(change, variation, colour, similarity)
        slope = grad.sum(1, keepdim=True) if grey else grad
        if plain:
            change = change - stride * (slope + pull)
            continue
        slope = slope + (1 - i / steps) * pull
        momentum = 0.75 * momentum + slope / rowwise(slope.flatten(1).norm(dim=1).clamp_min(1e-30), slope)
        change = change - longest / 4 * (1 + math.cos(math.pi * i / steps)) / 2 * momentum
        change = change.clamp(-float(ball.eps), float(ball.eps))
    return ball.project(x + change, x)


def unnatural(change: Tensor, variation: float, colour: float, similarity: float) -> Tensor:
    """(n,) how rough the change (n, c, h, w) is, how large, and how coloured, each times its weight.

    The squared differences of neighbours, the squared mean size of each channel, and the norm of the squared
    differences between the three channels of a colour image.
    """
    down, right = change.diff(dim=2), change.diff(dim=3)
    rough = down.square().flatten(1).sum(1) + right.square().flatten(1).sum(1)
    cost = variation * rough + colour * change.abs().flatten(2).mean(2).square().sum(1)
    if change.shape[1] == 3:
        cost = cost + similarity * (change - change.roll(1, 1)).square().sum(1).flatten(1).norm(dim=1)
    return cost


def _slope(change: Tensor, variation: float, colour: float, similarity: float) -> Tensor:
    leaf = change.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(unnatural(leaf, variation, colour, similarity).sum(), leaf)
    return slope
