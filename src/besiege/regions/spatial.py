"""The images that come about by turning and shifting: the spatial region, its distance and how a pose is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from besiege.core.threat import Ball, Norm, Uniform, rowwise

SHIFT, TURN = 0.1, 30.0
"""The limits at eps 1: a share of the image's side, and degrees."""

LIKE = 1e-4
"""How far a pixel may be from where a pose puts it."""

COARSE = (7, 7, 31)
"""So many shifts right, shifts down and turns are compared with an image before the nearest are refined."""


@dataclass(frozen=True, eq=False)
class Spatial(Ball):
    """The images that arise from turning the original about its centre and then shifting it.

    ``eps`` 1 allows shifts of up to a tenth of each side and turns of up to 30 degrees, as in Engstrom et al. 2019
    (arXiv:1712.02779); another ``eps`` scales all three limits. In between pixels the image is bilinear, beyond its
    edges black.

    `distance` is the largest share that a pose takes of its limits, of the poses that lead to the image the smallest
    one found; it is inf where none within twice eps (at eps inf: twice the limits) leads there.
    """

    norm: Norm = field(default="spatial", init=False)
    eps: float | Tensor

    def sized(self, eps: float | Tensor) -> Spatial:
        """The region of another size."""
        return Spatial(eps)

    @property
    def reach(self) -> float | Tensor:
        """The radius, and the tolerance with which a pose is recovered."""
        return self.eps * 1.02

    def distance(self, adv: Tensor, x: Tensor) -> Tensor:
        """(n,) the share of the limits that the pose of ``adv`` takes."""
        return (self.pose(adv, x) / limits(x)).abs().amax(1).to(x)

    def size(self, delta: Tensor) -> Tensor:
        """Refused: a difference of images has no pose."""
        raise NotImplementedError("a spatial distance is one of two images, not of their difference")

    def pose(self, adv: Tensor, x: Tensor) -> Tensor:
        """(n, 3) the smallest pose that was found to lead from ``x`` to ``adv``, inf where none was.

        A grid is compared first; from the nearest of it and from standing still Gauss-Newton steps go on.
        """
        x, adv = x.double(), adv.double()
        wide = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device).expand(len(x))
        wide = torch.where(wide.isfinite(), wide, 1)
        sides = [torch.linspace(-1.1, 1.1, count, dtype=x.dtype, device=x.device) for count in COARSE]
        grid = torch.cartesian_prod(*sides) * limits(x)
        found = [_recovered(*pair) for pair in zip(x, adv, wide[:, None, None] * grid, strict=True)]
        return torch.stack(found) if found else x.new_zeros(0, 3)

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """``adv`` where a pose leads to it, else ``x``."""
        return torch.where(rowwise(self.distance(adv, x) <= self.eps, x), adv, x)

    def farthest(self, x: Tensor, direction: Tensor) -> Tensor:
        """Of a grid of poses, the image furthest along ``direction``."""
        best, gain = x, x.new_full((len(x),), -math.inf)
        for pose in grid(5, 31).to(x):
            moved = warped(x, pose * self._scale(x))
            further = (moved * direction).flatten(1).sum(1)
            best = torch.where(rowwise(further > gain, x), moved, best)
            gain = torch.maximum(gain, further)
        return best

    def sample(self, x: Tensor, rng: Uniform) -> Tensor:
        """A pose drawn uniformly."""
        return warped(x, (2 * rng.rand(3).to(x) - 1) * self._scale(x))

    def _scale(self, x: Tensor) -> Tensor:
        """(3,) or (n, 3) the largest pose."""
        return limits(x) * (self.eps[:, None] if isinstance(self.eps, Tensor) else self.eps)


def limits(x: Tensor) -> Tensor:
    """(3,) right and down in pixels, and degrees, that eps 1 allows images like ``x``."""
    h, w = x.shape[-2:]
    return x.new_tensor([SHIFT * w, SHIFT * h, TURN])


def grid(shifts: int, turns: int) -> Tensor:
    """(shifts² · turns, 3) shares of the limits, evenly spaced from -1 to 1, the largest poses first."""
    side = torch.linspace(-1, 1, shifts)
    every = torch.cartesian_prod(side, side, torch.linspace(-1, 1, turns))
    return every[every.square().sum(1).argsort(descending=True, stable=True)]


def warped(x: Tensor, pose: Tensor) -> Tensor:
    """``x`` (n, c, h, w) turned clockwise about its centre, then shifted; ``pose`` (3,) or (n, 3) as in `limits`."""
    h, w = x.shape[2:]
    right, down, turn = pose.to(x).expand(len(x), 3)[:, :, None, None].unbind(1)
    cos, sin = (turn * math.pi / 180).cos(), (turn * math.pi / 180).sin()
    across, along = ((2 * torch.arange(edge, device=x.device).to(x) + 1) / edge - 1 for edge in (w, h))
    column = cos * across + sin * h / w * along[:, None] - (cos * right + sin * down) * 2 / w
    row = cos * along[:, None] - sin * w / h * across + (sin * right - cos * down) * 2 / h
    places = torch.stack([column, row], 3)
    return F.grid_sample(x, places, padding_mode="zeros", align_corners=False).clamp(0, 1)


def _recovered(x: Tensor, adv: Tensor, grid: Tensor, starts: int = 8, rounds: int = 30) -> Tensor:
    """(3,) the smallest pose that leads from ``x`` (c, h, w) to ``adv``, from the best ``starts`` of ``grid`` on."""
    if bool(((x - adv).abs() < LIKE).all()):
        return grid.new_zeros(3)
    apart = torch.cat([_apart(x.float(), adv.float(), part.float()).square().sum(1) for part in grid.split(64)])
    pose = torch.cat([grid[apart.topk(starts, largest=False).indices], grid.new_zeros(1, 3)])
    damp, probes = torch.full_like(pose[:, 0], 1e-3), 1e-5 * torch.eye(3).to(pose)
    base = _apart(x, adv, pose)
    for _ in range(rounds):
        ahead, behind = (_apart(x, adv, (pose[:, None] + way * probes).flatten(0, 1)) for way in (1, -1))
        slope = ((ahead - behind) / 2e-5).view(len(pose), 3, -1)
        bend = slope @ slope.mT
        bend = bend + damp[:, None, None] * torch.diag_embed(bend.diagonal(dim1=1, dim2=2) + 1e-9)
        tried = pose - torch.linalg.solve(bend, slope @ base[:, :, None])[:, :, 0]
        there = _apart(x, adv, tried)
        won = there.square().sum(1) < (1 - 1e-6) * base.square().sum(1)
        if not bool(won.any()) and bool((damp > 1).all()):
            break
        pose, base = torch.where(won[:, None], tried, pose), torch.where(won[:, None], there, base)
        damp = torch.where(won, damp / 5, damp * 5).clamp(1e-12, 1e6)
    fits = pose[base.abs().amax(1) < LIKE]
    if not len(fits):
        return pose.new_full((3,), math.inf)
    return fits[(fits / limits(x)).abs().amax(1).argmin()]


def _apart(x: Tensor, adv: Tensor, pose: Tensor) -> Tensor:
    """(m, c·h·w) what ``pose`` (m, 3) leaves between the images."""
    return (warped(x.expand(len(pose), *x.shape), pose) - adv).flatten(1)
