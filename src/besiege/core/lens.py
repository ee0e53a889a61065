"""Lenses: oracles that an adversary builds on another oracle. Any white-box attack runs through any of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from besiege.core.meter import Meter
from besiege.core.oracle import Oracle, State
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Answer, Ball, Goal, Loss


@dataclass
class Lens:
    """Passes every question on to ``oracle``; a lens changes the answers that it is there to change."""

    oracle: Oracle

    @property
    def goal(self) -> Goal:
        """See `Oracle.goal`."""
        return self.oracle.goal

    @property
    def classes(self) -> int:
        """See `Oracle.classes`."""
        return self.oracle.classes

    def is_adversarial(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.is_adversarial`."""
        return self.oracle.is_adversarial(x, rows)

    def labels(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.labels`."""
        return self.oracle.labels(x, rows)

    def loss(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> Tensor:
        """See `Oracle.loss`."""
        return self.oracle.loss(x, loss, rows)

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.scores`."""
        return self.oracle.scores(x, rows)

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Oracle.gradient`."""
        return self.oracle.gradient(x, loss, rows)

    def jacobian(self, x: Tensor, classes: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Oracle.jacobian`."""
        return self.oracle.jacobian(x, classes, rows)

    def toward(self, classes: Tensor) -> Oracle:
        """See `Oracle.toward`."""
        view = copy.copy(self)
        view.oracle = self.oracle.toward(classes)
        return view

    def live(self, *state: *State) -> tuple[*State]:
        """See `Oracle.live`."""
        return self.oracle.live(*state)


@dataclass
class Nes(Lens):
    """Estimates ``gradient`` from scores by antithetic sampling (Ilyas et al. 2018, arXiv:1804.08598)."""

    rng: Rng
    samples: int = 50
    sigma: float = 0.001

    def live(self, *state: *State) -> tuple[*State]:
        """See `Oracle.live`; the lens's own streams follow."""
        (*left, self.rng) = self.oracle.live(*state, self.rng)
        return cast(tuple[*State], tuple(left))

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss at ``x``, and its slope from ``samples`` scores more, in pairs either side of it.

        The first score tells whether the image has fallen; if it has, the others are not asked for.
        """
        value, half = self.oracle.loss(x, loss, rows), self.samples // 2
        of = torch.arange(len(x), device=x.device) if rows is None else rows
        noise = self.noise(self.rng[of], half, x)
        tried = (x[:, None] + self.sigma * torch.cat([noise, -noise], 1)).flatten(0, 1)
        ahead, behind = self.oracle.loss(tried, loss, of.repeat_interleave(2 * half)).view(len(x), 2, half).unbind(1)
        rise = ahead - behind
        grad = torch.einsum("ns,ns...->n...", torch.where(rise.isfinite(), rise, 0), noise) / (2 * half * self.sigma)
        return value, grad

    def noise(self, rng: Rng, count: int, x: Tensor) -> Tensor:
        """(n, count, c, h, w) directions to look in."""
        return rng.randn(count, *x.shape[1:]).to(x)


@dataclass
class Spsa(Nes):
    """The same with signs for noise (Uesato et al. 2018, arXiv:1802.05666)."""

    sigma: float = 0.01

    def noise(self, rng: Rng, count: int, x: Tensor) -> Tensor:
        """Random sign vectors."""
        return rng.signs(count, *x.shape[1:]).to(x)


@dataclass
class Votes(Nes):
    """Estimates ``gradient`` from labels: how many noisy copies reach the goal, and on which side they lie.

    The slope is that of the share under noise (Stein's identity), whatever the loss asked for. Copies are clamped to
    [0, 1]. Only wide noise, under which both answers occur, says anything.
    """

    samples: int = 200
    sigma: float = 0.5

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The share of copies that do not reach the goal, and its slope."""
        half, of = self.samples // 2, torch.arange(len(x), device=x.device) if rows is None else rows
        noise = self.noise(self.rng[of], half, x)
        tried = (x[:, None] + self.sigma * torch.cat([noise, -noise], 1)).clamp(0, 1).flatten(0, 1)
        hit = self.oracle.is_adversarial(tried, of.repeat_interleave(2 * half)).view(len(x), 2, half).to(x)
        ahead, behind = hit.unbind(1)
        return 1 - hit.mean((1, 2)), torch.einsum("ns,ns...->n...", behind - ahead, noise) / (2 * half * self.sigma)


@dataclass
class Eot(Lens):
    """Averages ``gradient`` over random transformations (Athalye et al. 2018, arXiv:1707.07397).

    ``transform(x, rng)`` is differentiable and keeps the shape; the identity averages a randomized target.
    """

    rng: Rng
    transform: Callable[[Tensor, Rng], Tensor] = lambda x, rng: x
    samples: int = 10

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss and gradient over ``samples`` draws an image."""
        of = torch.arange(len(x), device=x.device) if rows is None else rows
        total, slope = x.new_zeros(len(x)), torch.zeros_like(x)
        for _ in range(self.samples):
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                moved = self.transform(leaf, self.rng[of])
            value, grad = self.oracle.gradient(moved.detach(), loss, rows)
            total += value
            slope += grad if moved is leaf else torch.autograd.grad(moved, leaf, grad)[0]
        return total / self.samples, slope / self.samples

    def live(self, *state: *State) -> tuple[*State]:
        """See `Oracle.live`; the lens's own streams follow."""
        (*left, self.rng) = self.oracle.live(*state, self.rng)
        return cast(tuple[*State], tuple(left))


class Bpda(Lens):
    """Takes gradients from ``stand_in``, which answers as the target does but can be differentiated.

    Backward pass differentiable approximation (Athalye et al. 2018, arXiv:1802.00420); see `straight_through`.
    """

    def __init__(self, oracle: Meter, stand_in: Callable[[Tensor], Tensor | Answer]) -> None:
        view = copy.copy(oracle)
        view.target, view.access = replace(oracle.target, call=stand_in), max(oracle.access, Access.GRADIENTS)
        super().__init__(view)


def straight_through(
    step: Callable[[Tensor], Tensor], smooth: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[Tensor], Tensor]:
    """``step`` forwards, the gradient of ``smooth`` backwards."""

    def apply(x: Tensor) -> Tensor:
        near = smooth(x)
        return near + (step(x) - near).detach()

    return apply


class Surrogate(Lens):
    """Takes gradients from another model; labels and scores stay the target's. Its passes are not queries."""

    def __init__(self, oracle: Oracle, surrogate: Target, x: Tensor) -> None:
        super().__init__(oracle)
        self.own = Meter(surrogate, x, oracle.goal, Ball(INF, INF), seeks="optimum")

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The surrogate's loss and gradient."""
        return self.own.gradient(x, loss, rows)

    def toward(self, classes: Tensor) -> Oracle:
        """See `Oracle.toward`; the surrogate aims there too."""
        view = copy.copy(self)
        view.oracle, view.own = self.oracle.toward(classes), self.own.toward(classes)
        return view

    def live(self, *state: *State) -> tuple[*State]:
        """See `Oracle.live`; the surrogate's rows follow."""
        (*left, kept) = self.oracle.live(*state, torch.arange(len(self.own.rows)))
        self.own.rows, self.own.whole = self.own.rows[kept], False
        return cast(tuple[*State], tuple(left))


class Transfer(Surrogate):
    """A surrogate that asks the target at every step whether the goal stands reached there: a query each.

    The margin has the surrogate's size and the target's sign, so that an attack that seeks the nearest adversarial
    image walks along the target's boundary.
    """

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The surrogate's gradient; the margin tells whether the target is fooled."""
        value, slope = self.own.gradient(x, loss, rows)
        won = self.oracle.is_adversarial(x, rows)
        return (torch.where(won, -value.abs(), value.abs()) if loss == "margin" else value), slope
