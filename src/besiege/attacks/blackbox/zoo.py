"""Zeroth-order optimization: C&W's objective, its slopes measured a few coordinates at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from besiege.attacks.blackbox.simba import Basis, _cosine
from besiege.attacks.whitebox._carlini import bisected
from besiege.attacks.whitebox.fmn import fmn
from besiege.core.lens import Lens
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Access, Ball, Loss, rowwise

Solver = Literal["adam", "newton"]


@evasion("ZOO", paper="arXiv:1708.03999", norms=(2,), access=Access.SCORES, seeks="minimum")
def zoo(
    oracle: Oracle,
    x: Tensor,
    ball: Ball,
    rng: Rng,
    *,
    iterations: int = 16,
    searches: int = 2,
    coordinates: int = 32,
    lr: float = 0.015,
    decay: float = 0.3,
    first_c: float = 0.01,
    h: float = 0.05,
    solver: Solver = "adam",
    basis: Basis = "dct",
    side: int = 14,
    importance: bool = True,
    opening: int = 5,
    coarse: int = 8,
) -> None:
    """Minimise ``|x' - x|^2 + c * max(margin, 0)``, ``coordinates`` of ``x'`` an iteration (Chen et al. 2017).

    ``searches`` values of c are tried. The basis is that of single values or of the ``side * side`` lowest frequencies
    of each channel; with ``importance`` a coordinate is chosen the more often the more it has changed. ADAM goes by
    ``lr``, which falls to the share ``decay`` of itself; Newton's method by ``lr`` times the whole step.

    Departs from the paper, whose method is ``basis="pixel", importance=False, opening=0, decay=1, lr=0.01, h=1e-4,
    coordinates=128, iterations=3000, searches=9``: the first search starts where ``opening`` steps of FMN end, along
    all of the ``coarse * coarse`` lowest frequencies, as C&W's does here. Slopes are measured over ``2 * h``, far
    enough for the difference to survive float32; the distance's own slope is known and costs nothing. Where the paper
    has tanh, points are brought back into [0, 1].
    """
    start, c, rate = x, x.new_full((len(x),), first_c), x.new_full((len(x),), lr)
    if opening:
        probes = Probes(oracle, Grid.of(x, basis, coarse), h)
        start = fmn.function(probes, x, ball, rng, steps=opening)
        _, grad = probes.gradient(start)
        reach = ball.distance(start, x)
        c, rate = 4 * reach / ball.size(grad).clamp_min(1e-12), lr * reach.clamp_max(1)
    grid = Grid.of(x, basis, side)

    def descend(start: Tensor, c: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One search: the distance of the nearest success, inf where there is none, and that success."""
        adv, origin, draws = start, x[rows], rng[rows]
        adam = Adam(x.new_zeros(len(rows), grid.count))
        best, size = start.clone(), torch.full_like(c, INF)
        for i in range(iterations):
            margin, distance = oracle.loss(adv, "margin", rows), ball.distance(adv, origin)
            closer = (margin < 0) & (distance < size)
            best, size = torch.where(rowwise(closer, adv), adv, best), torch.where(closer, distance, size)
            away = grid.parts(adv - origin)
            at = _chosen(away, draws, coordinates, importance)
            up, down = (value.clamp_min(0) for value in probed(oracle, adv, grid, at, h, rows))
            grad = 2 * away.gather(1, at) + c[:, None] * _known((up - down) / (2 * h))
            if solver == "adam":
                move = adam.step(at, grad)
            else:
                bend = 2 + c[:, None] * _known((up + down - 2 * margin.clamp_min(0)[:, None]) / h**2)
                move = grad / torch.where(bend <= 0, 1, bend.clamp_min(0.1))
            fall = rate[rows] * decay ** (i / iterations)
            adv = (adv - grid.image(at, fall[:, None] * move)).clamp(0, 1)
        return size, best

    bisected(descend, start, c, searches, warm=opening > 0)


@dataclass(frozen=True)
class Grid:
    """The coordinates: in each of ``channels``, products of a row of ``down`` (k, h) and one of ``across`` (m, w)."""

    channels: int
    down: Tensor
    across: Tensor

    @classmethod
    def of(cls, x: Tensor, basis: Basis, side: int) -> Grid:
        """Single values, or the ``side * side`` lowest frequencies, of images like ``x`` (n, c, h, w)."""
        down, across = (
            torch.eye(edge).to(x)
            if basis == "pixel"
            else _cosine(torch.arange(min(side, edge), device=x.device), edge, x)
            for edge in x.shape[2:]
        )
        return cls(x.shape[1], down, across)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.channels * len(self.down) * len(self.across)

    def parts(self, image: Tensor) -> Tensor:
        """(n, count) what of ``image`` (n, c, h, w) lies along each; by sums, as products of matrices mix rows."""
        rows = (image[:, :, None] * self.down[:, :, None]).sum(3)
        return (rows[:, :, :, None] * self.across).sum(4).flatten(1)

    def direction(self, index: Tensor) -> Tensor:
        """(n, c, h, w) the unit vectors numbered ``index`` (n,)."""
        plane = index % (len(self.down) * len(self.across))
        down, across = self.down[plane // len(self.across)], self.across[plane % len(self.across)]
        own = index[:, None] // (len(self.down) * len(self.across)) == torch.arange(self.channels, device=index.device)
        return own[:, :, None, None] * (down[:, :, None] * across[:, None])[:, None]

    def image(self, index: Tensor, parts: Tensor) -> Tensor:
        """(n, c, h, w) the sum of the unit vectors numbered ``index`` (n, m), each times its own of ``parts``."""
        total = torch.zeros(())
        for at, part in zip(index.unbind(1), parts.unbind(1), strict=True):
            total = total + part[:, None, None, None] * self.direction(at)
        return total


class Adam:
    """ADAM in which each coordinate counts its own steps, and stands still while it is not chosen."""

    def __init__(self, zeros: Tensor) -> None:
        self.mean, self.square, self.taken = zeros, zeros, zeros

    def step(self, at: Tensor, grad: Tensor) -> Tensor:
        """(n, m) how far to go down, before the rate, along the coordinates ``at`` (n, m) with slopes ``grad``."""
        mean = self.mean.gather(1, at).lerp(grad, 0.1)
        square = self.square.gather(1, at).lerp(grad.square(), 0.001)
        taken = self.taken.gather(1, at) + 1
        self.mean, self.square = self.mean.scatter(1, at, mean), self.square.scatter(1, at, square)
        self.taken = self.taken.scatter(1, at, taken)
        return mean / (1 - 0.9**taken) / ((square / (1 - 0.999**taken)).sqrt() + 1e-8)


@dataclass
class Probes(Lens):
    """Measures ``gradient`` along every coordinate of ``grid``, at ``h`` either side; the rest of it is 0."""

    grid: Grid
    h: float

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``2 * count + 1`` scores an image."""
        of = torch.arange(len(x), device=x.device) if rows is None else rows
        value = self.oracle.loss(x, loss, of)
        every = torch.arange(self.grid.count, device=x.device).expand(len(x), -1)
        up, down = probed(self.oracle, x, self.grid, every, self.h, of, loss)
        return value, self.grid.image(every, _known((up - down) / (2 * self.h)))


def probed(
    oracle: Oracle, x: Tensor, grid: Grid, at: Tensor, h: float, rows: Tensor, loss: Loss = "margin"
) -> tuple[Tensor, Tensor]:
    """(n, m) losses ``h`` up and ``h`` down each of the coordinates ``at`` (n, m), brought into [0, 1].

    One probe of every image at a time: all of them together are hundreds of times the images, and fill no more calls.
    """
    values = []
    for index in at.unbind(1):
        move = h * grid.direction(index)
        values += [oracle.loss((x + way).clamp(0, 1), loss, rows) for way in (move, -move)]
    up, down = torch.stack(values, 1).view(len(x), -1, 2).unbind(2)
    return up, down


def _known(slopes: Tensor) -> Tensor:
    """0 where an image that is done gave no answer."""
    return torch.where(slopes.isfinite(), slopes, 0)


def _chosen(away: Tensor, rng: Rng, count: int, importance: bool) -> Tensor:
    """(n, count) different coordinates, uniform or by their share ``away`` (n, d) of the change and the mean's."""
    n, d = away.shape
    if count >= d:
        return torch.arange(d, device=away.device).expand(n, -1)
    change = away.abs()
    weight = change + change.mean(1, keepdim=True) + 1e-12 if importance else torch.ones_like(change)
    # The largest of log(weight) + Gumbel noise are a draw by weight without putting back (Efraimidis & Spirakis 2006).
    noise = -(-rng.rand(d).to(away).clamp(1e-7, 1 - 1e-7).log()).log()
    return (weight.log() + noise).topk(count, dim=1).indices
