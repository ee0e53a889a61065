"""The images that come about by moving brightness: the Wasserstein ball, its distance and its projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.threat import Ball, Norm, Uniform, rowwise

NOTHING = -1e30
"""The logarithm of zero, as a number that can be computed with."""

LOST = 1e-5
"""How much of a channel's mass rounding may take or give."""

CHUNK = 1 << 20
"""So many entries of transport plans are worked on at once: about what a processor's cache holds."""


@dataclass(frozen=True, eq=False)
class Wasserstein(Ball):
    """The images that arise from moving the original's brightness about, and lie in [0, 1].

    Moving a share m of the image's whole brightness by d pixels costs m d², and ``eps`` is the most that all moves
    may cost together: the squared 2-Wasserstein distance between the images normalized to mass 1, in squared pixels
    (Wong et al. 2019, arXiv:1902.07906). Each channel keeps its mass, and no move leaves a window of ``kernel`` x
    ``kernel`` pixels. With a wider window the distance can only be shorter.

    `distance` is the least cost, solved as a linear program; it is inf where a channel's mass changed by more than
    rounding, `LOST` of itself. `holds` takes up to 1.02 eps.
    """

    norm: Norm = field(default="wasserstein", init=False)
    eps: float | Tensor
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise BadInput(f"a window of transport is odd and at least 3 pixels wide, not {self.kernel}")

    def sized(self, eps: float | Tensor) -> Wasserstein:
        """The ball of another radius."""
        return Wasserstein(eps, self.kernel)

    @property
    def reach(self) -> float | Tensor:
        """The radius, and the tolerance of the cost."""
        return self.eps * 1.02

    def distance(self, adv: Tensor, x: Tensor) -> Tensor:
        """(n,) the least cost of leading ``x`` to ``adv``; what the window keeps apart crosses the whole image."""
        moved = self.plan(adv, x)
        own, other = (image.double().sum((2, 3)) for image in (x, adv))
        left = (1 - moved.sum((1, 2, 3, 4))).clamp_min(0) * (x.flatten(1).amax(1) > 0)
        cost = (moved.sum((1, 3, 4)) * _costs(self.kernel, moved)).sum(1)
        cost = cost + left * sum((side - 1) ** 2 for side in x.shape[2:])
        return torch.where(((own - other).abs() <= LOST * own).all(1), cost, torch.inf).to(x)

    def size(self, delta: Tensor) -> Tensor:
        """Refused: the cost of a change depends on the image."""
        raise NotImplementedError("a Wasserstein distance is one of two images, not of their difference")

    def plan(self, adv: Tensor, x: Tensor) -> Tensor:
        """The cheapest moves (n, c, kernel², h, w; float64) from ``x`` to ``adv``, each normalized to mass 1.

        An entry is the share of the image's mass that moves from a pixel to one of its window, the window read row by
        row. Whatever of a channel cannot be moved within the window is in no entry.
        """
        whole = x.double().sum((1, 2, 3), keepdim=True).clamp_min(1e-30)
        own, other = (image.double().sum((2, 3), keepdim=True) for image in (x, adv))
        source, sink = x.double() / whole, adv.double() * (own / other.clamp_min(1e-30)) / whole
        moves = torch.zeros(*x.shape[:2], self.kernel**2, *x.shape[2:], dtype=torch.float64)
        for to, a, b in zip(moves.flatten(0, 1), source.flatten(0, 1).cpu(), sink.flatten(0, 1).cpu(), strict=True):
            to.copy_(_cheapest(a, b, self.kernel))
        return moves.to(x.device)

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """``adv`` where it lies in the ball, else the point of it that `approach` finds."""
        return torch.where(rowwise(self.holds(adv, x), x), adv, self.approach(adv, x)[0])

    def approach(
        self,
        adv: Tensor,
        x: Tensor,
        potential: Tensor | None = None,
        price: Tensor | None = None,
        *,
        strength: float = 30.0,
        sweeps: int = 100,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A point of the ball near ``adv`` by projected Sinkhorn iterations, in logarithms and all images at once.

        The square of the distance to ``adv`` weighs ``strength`` against the entropy of the moves, in units of the
        mean pixel. Entropy spreads the moves: where it is heard (the paper's weights are 4 on MNIST and 0.3 on
        CIFAR-10 in this unit) the point costs far less than eps. Whatever the ascent has reached after ``sweeps``,
        the plan that it ends with is thinned to eps, and what finds no room below 1 stays where it was: the point
        keeps each channel's mass and lies in the ball, converged or not.

        Returns it with the dual variables (n, c, h, w) and (n,), from which a later call may go on.
        """
        potential = torch.zeros_like(x) if potential is None else potential
        price = torch.ones_like(x[:, 0, 0, 0]) if price is None else price
        weight = strength * x[0].numel()

        def work(adv: Tensor, x: Tensor, eps: Tensor, g: Tensor, price: Tensor) -> tuple[Tensor, ...]:
            return _ascend(adv, x, eps, g, price, weight, sweeps, self.kernel)

        near, potential, price = _by_parts(work, self.kernel, adv, x, self._radii(x), potential, price)
        return near, potential, price

    def steepest(self, grad: Tensor, at: Tensor | None = None, step: float = 0.0) -> Tensor:
        """The gradient, brought to L2 norm 1; 0 where it vanishes."""
        return Ball(2, 1.0).steepest(grad)

    def farthest(self, x: Tensor, direction: Tensor) -> Tensor:
        """Where the moves of cost eps gain most along ``direction``; what finds no room below 1 stays at home."""

        def work(x: Tensor, direction: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
            return (_climb(x, direction, eps, self.kernel),)

        return _by_parts(work, self.kernel, x, direction, self._radii(x))[0]

    def sample(self, x: Tensor, rng: Uniform) -> Tensor:
        """Moves drawn at random, of a cost uniform in [0, eps]."""

        def work(x: Tensor, share: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
            share = share * (_windows(torch.zeros_like(x), self.kernel) == 0)
            source, mass = x / _mass(x), _mass(x)
            moves = share / share.sum(2, keepdim=True) * source.unsqueeze(2)
            return ((_landed(moves, source, eps, 1 / mass, self.kernel) * mass).clamp_(0, 1),)

        share = rng.rand(x.shape[1], self.kernel**2, *x.shape[2:]).to(x).clamp_min(1e-6)
        return _by_parts(work, self.kernel, x, share, rng.rand().to(x) * self._radii(x))[0]

    def _radii(self, x: Tensor) -> Tensor:
        return self.eps.to(x) if isinstance(self.eps, Tensor) else x.new_full((len(x),), self.eps)


def _ascend(
    adv: Tensor, x: Tensor, eps: Tensor, g: Tensor, price: Tensor, weight: float, sweeps: int, kernel: int
) -> tuple[Tensor, ...]:
    """Block ascent of the dual, for which the moves are ``exp(f_i + g_j - price * C_ij)``.

    In turn ``f`` makes every row the pixel's mass; a Newton step moves the price of the cost; ``g`` makes every
    column the pixel z that lies nearest to the one wanted: ``weight * z`` solves ``y + log y = v``, or z is 1.
    """
    mass, costs = _mass(x), _costs(kernel, x)
    source, wanted, top = x / mass, adv / mass, 1 / mass
    log = torch.where(source > 0, source.clamp_min(1e-38).log(), NOTHING)
    for _ in range(sweeps):
        share, total = _shares(g, price, costs, kernel)
        moved = (share * source.unsqueeze(2)).flatten(3).sum((1, 3))
        spent, slope = (moved * costs).sum(1), (moved * costs.square()).sum(1)
        price = (price + (spent - eps) / slope.clamp_min(1e-12)).clamp_min(0)
        into = (_windows(log - total, kernel) - _charge(price, costs)).logsumexp(2)
        z = _omega(into + weight * wanted + torch.log(torch.full_like(top, weight))) / weight
        g = torch.where(z < top, weight * (wanted - z), top.log() - into)
    share, _ = _shares(g, price, costs, kernel)
    return (_landed(share * source.unsqueeze(2), source, eps, top, kernel) * mass).clamp_(0, 1), g, price


def _shares(g: Tensor, price: Tensor, costs: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """How each pixel's mass divides over its window, and the logarithm of what it was divided by."""
    drawn = _windows(g, kernel) - _charge(price, costs)
    total = drawn.logsumexp(2)
    return (drawn - total.unsqueeze(2)).exp(), total


def _charge(price: Tensor, costs: Tensor) -> Tensor:
    return (price[:, None] * costs)[:, None, :, None, None]


def _omega(v: Tensor) -> Tensor:
    """The y > 0 with ``y + log y = v``: Lambert's function of ``exp(v)``, which itself would overflow."""
    y = torch.where(v > 1, v - v.clamp_min(1).log(), (v.clamp_max(1) - 1).exp()).clamp_min(1e-30)
    for _ in range(4):
        rest = v - y - y.log()
        bend = 2 * (1 + y) * (1 + y + 2 * rest / 3)
        y = (y * (1 + rest / (1 + y) * (bend - rest) / (bend - 2 * rest))).clamp_min(1e-30)
    return torch.where(v > -60, y, 0)


def _landed(moves: Tensor, source: Tensor, eps: Tensor, top: Tensor, kernel: int) -> Tensor:
    """Where ``moves``, thinned to cost ``eps``, lead; what would rise above ``top`` is sent back home.

    Sent back it may be too much there, and so on. A rest of a millionth may be cut; where after 100 rounds there is
    more, the image stays as near its origin as [0, 1] asks.
    """
    home = kernel**2 // 2

    def balanced(moves: Tensor) -> Tensor:
        moves[:, :, home] = 0
        moves[:, :, home] = (source - moves.sum(2)).clamp_min(0)
        return moves

    spent = (moves.flatten(3).sum((1, 3)) * _costs(kernel, source)).sum(1)
    moves = balanced(moves * rowwise((eps / spent.clamp_min(1e-30)).clamp_max(1), moves))
    z = _gathered(moves, kernel)
    for _ in range(100):
        full = (z > top) & rowwise((z - top).clamp_min(0).flatten(1).sum(1) > 1e-6, z)
        if not bool(full.any()):
            return z
        stays = moves[:, :, home]
        keep = torch.where(full, ((top - stays) / (z - stays).clamp_min(1e-30)).clamp(0, 1), 1)
        moves = balanced(moves * _windows(keep, kernel).clamp_min(0))
        z = _gathered(moves, kernel)
    room = torch.where(z > top, (top - source).clamp_min(0) / (z - source).clamp_min(1e-30), 1).flatten(1).amin(1)
    over = (z - top).clamp_min(0).flatten(1).sum(1) > 1e-6
    return torch.lerp(source, z, rowwise(torch.where(over, room, 1), z))


def _climb(x: Tensor, direction: Tensor, eps: Tensor, kernel: int) -> Tensor:
    """Every pixel moves where gain less price times cost is most; the price is bisected, its two sides mixed to eps."""
    mass, costs = _mass(x), _costs(kernel, x)
    source = x / mass
    gain = _windows(direction / rowwise(direction.flatten(1).abs().amax(1).clamp_min(1e-30), x), kernel)

    def moves(price: Tensor) -> tuple[Tensor, Tensor]:
        best = (gain - _charge(price, costs)).argmax(2, keepdim=True)
        chosen = torch.zeros_like(gain).scatter_(2, best, source.unsqueeze(2))
        return chosen, (chosen.flatten(3).sum((1, 3)) * costs).sum(1)

    low, high = torch.zeros_like(eps), torch.full_like(eps, 3.0)
    for _ in range(30):
        middle = (low + high) / 2
        over = moves(middle)[1] > eps
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    (dear, more), (cheap, less) = moves(low), moves(high)
    mixed = torch.lerp(cheap, dear, rowwise(((eps - less) / (more - less).clamp_min(1e-30)).clamp(0, 1), cheap))
    return (_landed(mixed, source, eps, 1 / mass, kernel) * mass).clamp_(0, 1)


def _cheapest(source: Tensor, sink: Tensor, kernel: int) -> Tensor:
    """The moves (kernel², h, w) from ``source`` (h, w) to ``sink``; what cannot get there is left out."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    h, w = source.shape
    size, cells = kernel**2, h * w
    numbers = torch.arange(cells, dtype=torch.float64).view(1, 1, h, w)
    ends = _windows(numbers, kernel)[0, 0].flatten(1).numpy()
    starts = np.broadcast_to(np.arange(cells), (size, cells))
    a, b = source.flatten().numpy() * cells, sink.flatten().numpy() * cells
    moves = np.zeros((size, cells))
    possible = (ends >= 0) & (a > 0) & (b[np.maximum(ends, 0).astype(int)] > 0)
    i, j = starts[possible], ends[possible].astype(int)
    count, beyond = len(i), float((h - 1) ** 2 + (w - 1) ** 2)
    cost = np.broadcast_to(_costs(kernel, numbers).numpy()[:, None], (size, cells))[possible]
    every = np.arange(2 * cells)
    rows, columns = np.concatenate([i, cells + j, every]), np.concatenate([np.arange(count)] * 2 + [count + every])
    sums = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(2 * cells, count + 2 * cells)).tocsr()
    solved = linprog(
        np.concatenate([cost, np.full(2 * cells, beyond / 2)]), A_eq=sums, b_eq=np.concatenate([a, b]), method="highs"
    )
    if solved.x is not None:
        moves[possible] = np.maximum(solved.x[:count], 0) / cells
    return torch.from_numpy(moves).view(size, h, w)


def _costs(kernel: int, like: Tensor) -> Tensor:
    """(kernel²,) the squared way from a pixel to each of its window."""
    way = (torch.arange(kernel, device=like.device, dtype=like.dtype) - kernel // 2).square()
    return (way[:, None] + way).flatten()


def _mass(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1).clamp_min(1e-12).reshape(-1, 1, 1, 1)


def _windows(value: Tensor, kernel: int) -> Tensor:
    """(n, c, kernel², h, w) the values of each pixel's window; `NOTHING` beyond the image."""
    n, c, h, w = value.shape
    return F.unfold(F.pad(value, [kernel // 2] * 4, value=NOTHING), kernel).view(n, c, kernel**2, h, w)


def _gathered(moves: Tensor, kernel: int) -> Tensor:
    """(n, c, h, w) what arrives at each pixel."""
    n, c, size, h, w = moves.shape
    return F.fold(moves.reshape(n, c * size, h * w), (h, w), kernel, padding=kernel // 2)


def _by_parts(work: Callable[..., tuple[Tensor, ...]], kernel: int, *state: Tensor) -> tuple[Tensor, ...]:
    """``work`` on a few images at a time, its results joined."""
    size = max(1, CHUNK // max(1, state[0][0].numel() * kernel**2))
    parts = zip(*(torch.split(part, size) for part in state), strict=True)
    return tuple(torch.cat(column) for column in zip(*(work(*part) for part in parts), strict=True))
