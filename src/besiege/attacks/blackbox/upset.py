"""UPSET: a generator makes one perturbation that takes most images to a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from besiege.attacks.whitebox.apgd_t import rivals
from besiege.core.method import universal
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng, Stream
from besiege.core.threat import INF, Ball, rowwise
from besiege.core.trigger import Shift, Trigger

WIDTH = 64
"""The hidden numbers of the generator."""


@universal("UPSET", paper="arXiv:1707.01159", norms=(2, INF), targeted=True)
def upset(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    epochs: int = 20,
    batch: int = 32,
    lr: float = 0.003,
    fidelity: float = 0.0,
) -> Trigger:
    """Fit the generator in ``epochs`` passes over mini-batches of ``batch`` images (Sarkar et al. 2017).

    From the one-hot code of the class it makes a perturbation, by two dense layers that end in the ball. The loss is
    the cross-entropy toward the class, and ``fidelity`` times the square of what share of the ball the perturbation
    takes. Without a class to reach it is the one that most images come second to. The fit needs gradients, in the paper
    those of classifiers at hand (a `Surrogate` lens); what it makes asks for nothing.

    Departs from the paper: the ball bounds the perturbation, where the paper scales it and weighs its size alone, so
    ``fidelity`` is 0 unless asked for; and one class is fitted at a time.
    """
    oracle = aimed(oracle, x)
    goal, weights = oracle.goal.labels[:1], drawn(rng.stream(0), dense(oracle, x), x)

    def shift(rows: Tensor) -> Tensor:
        return bounded(decoded(goal, weights, x), ball)

    fit(oracle, x, ball, rng, shift, weights, epochs=epochs, batch=batch, lr=lr, fidelity=fidelity)
    return Shift(shift(goal).detach())


def aimed(oracle: Oracle, x: Tensor) -> Oracle:
    """The oracle with a class to reach: the goal's, or else the one that most images come second to."""
    if oracle.goal.targeted:
        return oracle
    return oracle.toward(rivals(oracle, x, 1).squeeze(1).mode().values.expand(len(x)))


def dense(oracle: Oracle, x: Tensor) -> list[tuple[float, tuple[int, ...]]]:
    """The size and shape of the two dense layers' weights."""
    return [(1.0, (oracle.classes, WIDTH)), (0.01, (WIDTH, x[0].numel()))]


def decoded(goal: Tensor, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """(1, c, h, w) what the two dense layers make of the one-hot code of ``goal`` (1,)."""
    inner, outer = weights
    return (inner[goal].tanh() @ outer).view(1, *x.shape[1:])


def drawn(rng: Stream, layers: Sequence[tuple[float, tuple[int, ...]]], like: Tensor) -> list[Tensor]:
    """Normal weights of that standard deviation and shape, to be fitted."""
    return [(size * rng.randn(*shape)).to(like).requires_grad_() for size, shape in layers]


def bounded(raw: Tensor, ball: Ball) -> Tensor:
    """Any numbers (n, c, h, w) as perturbations within the ball."""
    if ball.norm == INF:
        return ball.eps * raw.tanh()
    return raw * rowwise(ball.eps / (1 + ball.size(raw).square()).sqrt(), raw)


def fit(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    shift: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    *,
    epochs: int,
    batch: int,
    lr: float,
    fidelity: float,
) -> None:
    """Fit the ``weights`` of a generator by ADAM; ``shift(rows)`` (m or 1, c, h, w) is what it makes of images.

    What [0, 1] cuts off keeps its slope: else a pixel pushed beyond the edge of most images would never come back.
    """
    optimizer = torch.optim.Adam(weights, lr)
    whole = float(ball.eps) ** 2 * (1 if ball.norm == 2 else x[0].numel())
    for _ in range(epochs):
        for rows in rng.rand().argsort().split(batch):
            with torch.enable_grad():
                change = shift(rows)
            _, slope = oracle.gradient((x[rows] + change.detach()).clamp(0, 1), "ce", rows)
            optimizer.zero_grad()
            with torch.enable_grad():
                size = change.square().flatten(1).sum(1).mean() / whole
                ((change * slope).sum() / len(rows) + fidelity * size).backward()
            optimizer.step()
