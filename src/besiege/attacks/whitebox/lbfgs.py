"""L-BFGS: distance plus c times the cross-entropy, minimised within the box by a quasi-Newton method."""

from __future__ import annotations

import torch
from torch import Tensor

from besiege.attacks.whitebox._carlini import bisected
from besiege.attacks.whitebox.fmn import fmn, gap_to_all
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball, rowwise


@evasion("L-BFGS", paper="arXiv:1312.6199", norms=(2,), seeks="minimum")
def lbfgs(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    steps: int = 20,
    searches: int = 3,
    first_c: float = 1e-2,
    memory: int = 8,
    opening: int = 20,
) -> None:
    """Minimise ``|x' - x|^2 - c * log P`` over [0, 1] by L-BFGS-B (Szegedy et al. 2014).

    P is the probability of the class to reach, or of any but the image's own. ``searches`` values of c are tried,
    ``steps`` passes each; the curvature is that of the last ``memory`` steps.

    Departs from the paper, whose method is ``opening=0, steps=1000, searches=5``: one solver steps for all images,
    each with a line search of its own. The first search starts where ``opening`` steps of FMN end, with the c that
    balances distance and loss there, later ones at the nearest success; an image leaves a search once it has
    converged, and the attack once a search has not brought it 1 % nearer.
    """
    start, c = x, x.new_full((len(x),), first_c)
    if opening:
        start = fmn.function(oracle, x, ball, rng, steps=opening)
        gap, grad = gap_to_all(oracle, start)
        c = 2 * ball.distance(start, x) / (gap.sigmoid() * ball.size(grad)).clamp_min(1e-12)
    bisected(
        lambda start, c, rows: _descend(oracle, x[rows], start, c, rows, steps, memory),
        start,
        c,
        searches,
        warm=opening > 0,
    )


def _descend(
    oracle: Oracle, x: Tensor, point: Tensor, c: Tensor, rows: Tensor, steps: int, memory: int
) -> tuple[Tensor, Tensor]:
    """One search: how far from the image it ends, inf unless that is a success, and where."""

    def objective(adv: Tensor) -> tuple[Tensor, Tensor]:
        gap, grad = gap_to_all(oracle, adv, rows[at])
        apart, weight = adv - x[at], c[at]
        loss = apart.square().flatten(1).sum(1) + weight * torch.nn.functional.softplus(gap)
        return loss, 2 * apart + rowwise(weight * gap.sigmoid(), x) * grad

    end, at = point.clone(), torch.arange(len(x), device=x.device)
    value, slope = objective(point)
    curve = _Curvature(point, memory)
    length = torch.ones_like(value)
    for _ in range(steps - 1):
        way = curve.newton(point, slope)
        trial = (point + rowwise(length, point) * way).clamp(0, 1)
        new, grad = objective(trial)
        moved = trial - point
        fall = (slope * moved).flatten(1).sum(1)
        took = new <= value + 1e-4 * fall
        curve.learn(moved, grad - slope, took)
        settled = torch.where(took, value - new < 1e-5 * value, length < 1e-3)
        at_took = rowwise(took, point)
        point, slope = torch.where(at_took, trial, point), torch.where(at_took, grad, slope)
        value, length = torch.where(took, new, value), torch.where(took, 1.0, length / 2)
        end[at] = point
        if bool(settled.any()):
            point, slope, value, length, at = (part[~settled] for part in (point, slope, value, length, at))
            curve.keep(~settled)
            if not len(at):
                break
    won = oracle.is_adversarial(end, rows)
    return torch.where(won, (end - x).flatten(1).norm(dim=1), INF), end


class _Curvature:
    """What the last steps tell of each objective's second derivatives: (n, memory, d) steps and changes of slope."""

    def __init__(self, point: Tensor, memory: int) -> None:
        n, d = len(point), point[0].numel()
        self.steps, self.changes = point.new_zeros(n, memory, d), point.new_zeros(n, memory, d)

    def learn(self, step: Tensor, change: Tensor, rows: Tensor) -> None:
        """Remember the newest of ``rows`` in place of the oldest, unless the slope fell along it."""
        step, change = step.flatten(1), change.flatten(1)
        at = (rows & ((step * change).sum(1) > 1e-10 * change.square().sum(1))).nonzero().squeeze(1)
        for past, new in ((self.steps, step), (self.changes, change)):
            past[at] = torch.cat([past[at, 1:], new[at, None]], 1)

    def newton(self, point: Tensor, slope: Tensor) -> Tensor:
        """The two-loop recursion on the coordinates that the box does not hold; without a past, half the slope."""
        grad = slope.flatten(1)
        free = ~(((point <= 0) & (slope > 0)) | ((point >= 1) & (slope < 0))).flatten(1)
        steps, changes = self.steps * free[:, None], self.changes * free[:, None]
        inner = (steps * changes).sum(2)
        known = inner > 1e-12
        share = torch.where(known, 1 / inner.where(known, 1), 0)
        way, weights = grad * free, []
        for k in range(steps.shape[1] - 1, -1, -1):
            weights.append(share[:, k] * (steps[:, k] * way).sum(1))
            way = way - weights[-1][:, None] * changes[:, k]
        newest = torch.where(known[:, -1], inner[:, -1] / changes[:, -1].square().sum(1).clamp_min(1e-30), 0.5)
        way = way * newest[:, None]
        for k in range(steps.shape[1]):
            back = share[:, k] * (changes[:, k] * way).sum(1)
            way = way + (weights.pop() - back)[:, None] * steps[:, k]
        return -(way * free).view_as(point)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.steps, self.changes = self.steps[rows], self.changes[rows]
