"""ANGRI: a generator makes for each image the perturbation that takes it to a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from besiege.attacks.blackbox.upset import aimed, bounded, decoded, dense, drawn, fit
from besiege.core.method import universal
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball
from besiege.core.trigger import Trigger, moved

WIDTH = 16
"""The channels of the generator."""


@universal("ANGRI", paper="arXiv:1707.01159", norms=(2, INF), targeted=True)
def angri(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    epochs: int = 20,
    batch: int = 32,
    lr: float = 0.003,
    fidelity: float = 0.1,
) -> Trigger:
    """Fit the generator in ``epochs`` passes over mini-batches of ``batch`` images (Sarkar et al. 2017).

    It adds up what UPSET's makes of the class and what four convolutions, 17 pixels across, make of the image. The
    loss is the cross-entropy toward the class, and ``fidelity`` times the square of what share of the ball the
    perturbations take. Without a class to reach it is the one that most images come second to. The fit needs gradients,
    in the paper those of classifiers at hand (a `Surrogate` lens); what it makes asks for nothing.

    Departs from the paper: the ball bounds the perturbation, where the paper weighs its size alone; the generator makes
    the perturbation, not the perturbed image; and one class is fitted at a time.
    """
    oracle, channels = aimed(oracle, x), x.shape[1]
    seeing = [((9 * inside) ** -0.5, (WIDTH, inside, 3, 3)) for inside in (channels, WIDTH, WIDTH)]
    layers = [*dense(oracle, x), *seeing, (0.01, (channels, WIDTH, 3, 3))]
    goal, weights = oracle.goal.labels[:1], drawn(rng.stream(0), layers, x)

    def shift(rows: Tensor) -> Tensor:
        return bounded(decoded(goal, weights[:2], x) + _convolved(x[rows], weights[2:]), ball)

    fit(oracle, x, ball, rng, shift, weights, epochs=epochs, batch=batch, lr=lr, fidelity=fidelity)
    base, *others = (part.detach().double() for part in (decoded(goal, weights[:2], x), *weights[2:]))
    return Generated(base, tuple(others), ball)


@dataclass(frozen=True, eq=False)
class Generated:
    """Adds to images (n, c, h, w) ``base`` (1, c, h, w) and what convolutions make of them, within ``ball``."""

    base: Tensor
    weights: tuple[Tensor, ...]
    ball: Ball

    def __call__(self, x: Tensor) -> Tensor:
        """The changed images, in [0, 1]."""
        return moved(x, bounded(self.base + _convolved(x.double(), self.weights), self.ball))


def _convolved(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    *inner, last = weights
    seen = 2 * x - 1
    for spread, weight in zip((1, 2, 4), inner, strict=True):
        seen = F.leaky_relu(F.conv2d(seen, weight, padding=spread, dilation=spread))
    return F.conv2d(seen, last, padding=1)
