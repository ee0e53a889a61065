"""Targeted universal perturbation: one small change that takes most images to the same class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from besiege.attacks.whitebox.apgd_t import rivals
from besiege.attacks.whitebox.uap import climbed, within
from besiege.core.method import universal
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball
from besiege.core.trigger import Shift


@universal("Targeted UAP", paper="arXiv:1911.06502", norms=(2, INF), targeted=True)
def targeted_uap(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    search: Literal["gradient", "fgsm"] = "gradient",
    epochs: int = 10,
    batch: int = 32,
    ceiling: float = 3.0,
    stride: float = 0.1,
) -> Shift:
    """Fit the perturbation toward the goal's class in up to ``epochs`` passes over mini-batches of ``batch`` images.

    Without a class to reach it is the one that most images come second to, and leaving the own class is what counts.
    ``search="fgsm"`` is the paper's loop (Hirano & Takemoto 2020), and with ``batch=1`` its very order: one gradient
    step, ``stride`` times ``eps`` long, from each image that is not in the class yet, is added where it leads there.

    Departs from the paper by default: ``search="gradient"`` climbs the mean loss of all images by steps that shrink,
    and so does not wait for a single step to succeed. An image that is in the class by ``ceiling`` logits no longer
    counts.
    """
    if not oracle.goal.targeted:
        commonest = rivals(oracle, x, 1).squeeze(1).mode().values
        oracle = oracle.toward(commonest.expand(len(x)))
    if search == "gradient":
        return climbed(oracle, x, ball, rng, epochs, batch, ceiling)
    shift, length, reached = torch.zeros_like(x[:1]), stride * float(ball.eps), oracle.goal.labels
    for _ in range(epochs):
        waiting = 0
        for rows in rng.rand().argsort().split(batch):
            moved = ball.project(x[rows] + shift, x[rows])
            out = oracle.labels(moved, rows) != reached[rows]
            rows, moved = rows[out], moved[out]
            waiting += len(rows)
            if not len(rows):
                continue
            _, grad = oracle.gradient(moved, "ce", rows)
            ahead = (moved - length * ball.steepest(grad)).clamp(0, 1)
            there = oracle.labels(ahead, rows) == reached[rows]
            if bool(there.any()):
                shift = within(ball, shift + (ahead - moved)[there].sum(0, keepdim=True))
        if not waiting:
            break
    return Shift(shift)
