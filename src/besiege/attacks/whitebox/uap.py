"""Universal adversarial perturbation: one small change that makes most images leave their class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from besiege.attacks.whitebox.deepfool import followed
from besiege.core.method import universal
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, rowwise
from besiege.core.trigger import Shift


@universal("UAP", paper="arXiv:1610.08401", norms=(2, INF))
def uap(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    search: Literal["gradient", "deepfool"] = "gradient",
    epochs: int = 10,
    batch: int = 32,
    ceiling: float = 3.0,
    enough: float = 0.8,
) -> Shift:
    """Fit the perturbation in up to ``epochs`` passes over mini-batches of ``batch`` images.

    ``search="deepfool"`` is the paper's loop (Moosavi-Dezfooli et al. 2017), and with ``batch=1`` its very order:
    what DeepFool adds to the images that the perturbation does not fool yet is added to it, all of it, until the
    share ``enough`` is fooled.

    Departs from the paper by default: ``search="gradient"`` climbs the mean loss by steps that shrink (Shafahi et al.
    2020, arXiv:1811.11304), which fools more images for fewer passes. An image whose margin is lost by ``ceiling``
    logits no longer counts, so that no single image draws the perturbation to itself.
    """
    if search == "deepfool":
        return _by_deepfool(oracle, x, ball, rng, epochs, batch, enough)
    return climbed(oracle, x, ball, rng, epochs, batch, ceiling)


def climbed(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, epochs: int, batch: int, ceiling: float) -> Shift:
    """The perturbation that gradient steps with momentum on the goal's margin lead to."""
    n, shift, momentum = len(x), torch.zeros_like(x[:1]), torch.zeros_like(x[:1])
    total = epochs * -(-n // batch)
    for step in range(total):
        if step % -(-n // batch) == 0:
            order = rng.rand().argsort()
        rows = order[(step * batch) % n :][:batch]
        moved = ball.project(x[rows] + shift, x[rows])
        margin, grad = oracle.gradient(moved, "margin", rows)
        slope = (grad * rowwise((margin > -ceiling).to(grad), grad)).sum(0, keepdim=True)
        momentum = 0.9 * momentum + slope / slope.abs().mean().clamp_min(1e-12)
        stride = ball.eps * (1 - step / total) / 4
        shift = within(ball, shift - stride * ball.steepest(momentum))
    return Shift(shift)


def _by_deepfool(oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, epochs: int, batch: int, enough: float) -> Shift:
    shift = torch.zeros_like(x[:1])
    for _ in range(epochs):
        fooled = 0
        for rows in rng.rand().argsort().split(batch):
            moved = ball.project(x[rows] + shift, x[rows])
            standing = ~oracle.is_adversarial(moved, rows)
            fooled += int((~standing).sum())
            if bool(standing.any()):
                end, fell = followed(oracle, moved[standing], rows[standing], ball)
                if bool(fell.any()):
                    shift = within(ball, shift + (end - moved[standing])[fell].sum(0, keepdim=True))
        if fooled >= enough * len(x):
            break
    return Shift(shift)


def within(ball: Ball, shift: Tensor) -> Tensor:
    """The perturbation itself brought into the ball, apart from any image."""
    if ball.norm == INF:
        return shift.clamp(-float(ball.eps), float(ball.eps))
    return shift * (ball.eps / ball.size(shift).clamp_min(1e-12)).clamp_max(1)
