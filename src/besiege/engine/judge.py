"""Believes nothing: looks at every claimed success afresh, on the clean target. Shares no code with the search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from besiege.core.errors import BadOutcome
from besiege.core.images import Images
from besiege.core.target import Target
from besiege.core.threat import Ball, Norm
from besiege.engine.evasion import Outcome
from besiege.regions import Color, Spatial, Wasserstein
from besiege.regions.color import shifted, to_lab

DRAWS = 20
"""How often a random target is asked."""

TOLERANCE: Mapping[Norm, float] = {"wasserstein": 0.02, "spatial": 0.02, "color": 0.002}
"""How far beyond eps a region allows, relative to it, where that is more than rounding."""

ASTRAY = 3e-5
"""What share of an image's brightness its moves may leave unexplained."""

ASIDE = 2e-4
"""How far a pixel may be from where its pose puts it."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What stands of an outcome, one row an image.

    ``success`` is a claim that a fresh forward pass confirmed, ``success_8bit`` one that survives rounding to
    8 bits toward the original, ``noise`` whether a random perturbation of the same size does as well;
    ``distance`` is measured again, in float64, inf where there is no success.
    """

    success: Tensor
    success_8bit: Tensor
    noise: Tensor
    distance: Tensor
    label: Tensor
    confidence: Tensor


def judge(outcome: Outcome, target: Target, images: Images) -> Verdict:
    """Verify ``outcome`` against the images it came from.

    Raises:
        BadOutcome: it is not of these images, or a claimed success is not finite, outside [0, 1] or out of
            its ball. A claim that the target's label does not confirm is no error: it is not a success.
    """
    if outcome.adv.shape != images.x.shape or not torch.equal(outcome.index, images.index):
        raise BadOutcome(f"{outcome.attack}: the outcome does not belong to these images")
    claimed, after = outcome.success.nonzero().squeeze(1), outcome.threat.after
    origin = images.x if outcome.via is None else outcome.via
    x, adv = origin[claimed].double(), outcome.adv[claimed].double()
    if not bool(adv.isfinite().all()):
        raise BadOutcome(f"{outcome.attack}: a claimed success holds numbers that are not finite")
    if bool((adv < 0).any()) or bool((adv > 1).any()):
        raise BadOutcome(f"{outcome.attack}: a claimed success leaves [0, 1]")
    far = _within(outcome, outcome.threat.ball, adv, x)
    if outcome.via is not None:
        if after is None or not bool(((x >= 0) & (x <= 1)).all()):
            raise BadOutcome(f"{outcome.attack}: a claimed success has been where its threat model does not let it go")
        _within(outcome, after, x, images.x[claimed].double())

    n, device = len(images), images.x.device
    success = torch.zeros(n, dtype=torch.bool, device=device)
    rounded = torch.zeros(n, dtype=torch.bool, device=device)
    noise = torch.zeros(n, dtype=torch.bool, device=device)
    distance = torch.full((n,), math.inf, dtype=torch.float64, device=device)
    label = outcome.clean.clone()
    confidence = torch.zeros(n, device=device)
    if len(claimed):
        targeted, goal = outcome.threat.targeted, outcome.goal[claimed]
        won, label[claimed], confidence[claimed] = _fresh(target, outcome.adv[claimed], goal, targeted)
        success[claimed] = won
        distance[claimed] = torch.where(won, far, math.inf)
        rounded[claimed] = won & _fresh(target, eight_bits(outcome.adv[claimed], origin[claimed]), goal, targeted)[0]
    _noise(outcome, target, images, far, claimed, noise)
    return Verdict(success, rounded, noise, distance, label, confidence)


def _within(outcome: Outcome, ball: Ball, adv: Tensor, x: Tensor) -> Tensor:
    """(n,) how far ``adv`` lies from ``x``; refused where that is beyond the ball."""
    far, eps = _far(ball, adv, x), float(ball.eps)
    if bool((far > eps * (1 + TOLERANCE.get(ball.norm, 1e-6)) + 1e-7).any()):
        raise BadOutcome(f"{outcome.attack}: a claimed success lies {float(far.max()):.6g} away, beyond eps {eps:.6g}")
    return far


def eight_bits(adv: Tensor, x: Tensor) -> Tensor:
    """``adv`` on the grid of 8-bit pixels, every change rounded toward ``x``."""
    grid = adv.double() * 255
    toward = torch.where(adv > x, (grid + 1e-4).floor(), torch.where(adv < x, (grid - 1e-4).ceil(), grid.round()))
    return (toward / 255).clamp(0, 1).to(adv)


def _fresh(target: Target, x: Tensor, goal: Tensor, targeted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Success, label and confidence (n,) by a new forward pass; of a random target, what most of 20 say."""
    draws = DRAWS if target.stochastic else 1
    wins = torch.zeros(len(x), device=x.device)
    mean = torch.zeros(len(x), target.classes, dtype=torch.float64, device=x.device)
    with torch.no_grad(), target.ready():
        for _ in range(draws):
            answers = [target.answer(part) for part in torch.split(x, target.batch)]
            scores = torch.cat([answer.scores for answer in answers])
            said = scores.argmax(1)
            won = ((said == goal) if targeted else (said != goal)) & scores.isfinite().all(1)
            if answers[0].excess is not None:
                won &= torch.cat([answer.excess for answer in answers if answer.excess is not None]) <= 0
            wins += won
            mean += scores.double().softmax(1) / draws
    top = mean.max(1)
    return wins * 2 > draws, top.indices, top.values.float()


def _far(ball: Ball, adv: Tensor, x: Tensor) -> Tensor:
    """(n,) the norm of the change; in a region the size of what is seen to lead from x to adv: moves, or a pose."""
    if isinstance(ball, Wasserstein):
        return _carried(ball.plan(adv, x), adv, x)
    if isinstance(ball, Spatial):
        return _turned(ball.pose(adv, x), adv, x)
    if isinstance(ball, Color):
        return _recolored(adv, x)
    return _norm(adv - x, float(ball.norm))


def _carried(moves: Tensor, adv: Tensor, x: Tensor) -> Tensor:
    """(n,) what ``moves`` cost, inf where they do not start at ``x`` or do not end at ``adv``.

    How they were found does not matter: whatever plan holds is an upper bound on the distance.
    """
    (h, w), side = x.shape[2:], math.isqrt(moves.shape[2])
    mass = x.sum((1, 2, 3), keepdim=True).clamp_min(1e-30)
    there = x.new_zeros(*x.shape[:2], h + side - 1, w + side - 1)
    cost = x.new_zeros(len(x))
    for k, part in enumerate(moves.unbind(2)):
        down, right = divmod(k, side)
        there[:, :, down : down + h, right : right + w] += part
        cost += part.sum((1, 2, 3)) * ((down - side // 2) ** 2 + (right - side // 2) ** 2)
    end = torch.nn.functional.pad(adv / mass, [side // 2] * 4)
    astray = (moves.sum(2) - x / mass).abs().sum((1, 2, 3)) + (there - end).abs().sum((1, 2, 3))
    return torch.where((astray <= ASTRAY) & (moves >= 0).flatten(1).all(1), cost, math.inf)


def _turned(pose: Tensor, adv: Tensor, x: Tensor) -> Tensor:
    """(n,) what share ``pose`` (n, 3) takes of a tenth of a side and 30 degrees, inf where it does not lead there."""
    limits = pose.new_tensor([0.1 * x.shape[3], 0.1 * x.shape[2], 30.0])
    known = pose.isfinite().all(1)
    drawn = _drawn(x, torch.where(known[:, None], pose, 0))
    there = known & ((drawn - adv).abs().flatten(1).amax(1) <= ASIDE)
    return torch.where(there, (pose / limits).abs().amax(1), math.inf)


def _drawn(x: Tensor, pose: Tensor) -> Tensor:
    """``x`` turned clockwise by ``pose[:, 2]`` degrees about its centre, then shifted right and down by the others."""
    n, c, h, w = x.shape
    right, down, turn = (part.view(n, 1, 1) for part in pose.unbind(1))
    cos, sin = torch.cos(turn * math.pi / 180), torch.sin(turn * math.pi / 180)
    across = torch.arange(w).to(x) - (w - 1) / 2 - right
    along = torch.arange(h).to(x)[:, None] - (h - 1) / 2 - down
    column, row = cos * across + sin * along + (w - 1) / 2, cos * along - sin * across + (h - 1) / 2
    drawn = torch.zeros_like(x)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at, beside = row.floor() + i, column.floor() + j
        weight = (1 - (row - at).abs()) * (1 - (column - beside).abs())
        weight = weight * ((at >= 0) & (at < h) & (beside >= 0) & (beside < w))
        place = (at.clamp(0, h - 1) * w + beside.clamp(0, w - 1)).long().flatten(1)[:, None].expand(-1, c, -1)
        drawn += weight[:, None] * x.flatten(2).gather(2, place).view_as(x)
    return drawn


def _recolored(adv: Tensor, x: Tensor) -> Tensor:
    """(n,) the largest move of a or b of CIE Lab in units of 127, inf where a pixel became lighter or darker."""
    (light, *colors), (was, *before) = _lab(adv), _lab(x)
    far = torch.stack([(now - then).abs() for now, then in zip(colors, before, strict=True)], 1)
    kept = (light - was).abs().flatten(1).amax(1) <= 0.01
    return torch.where(kept, far.flatten(1).amax(1) / 127, math.inf)


def _lab(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L, a and b (n, h, w) of sRGB images, by the definitions of IEC 61966-2-1 and CIE 15."""
    red, green, blue = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055).abs().pow(2.4)).unbind(1)
    across = (0.4124564 * red + 0.3575761 * green + 0.1804375 * blue) / 0.95047
    up = 0.2126729 * red + 0.7151522 * green + 0.0721750 * blue
    deep = (0.0193339 * red + 0.1191920 * green + 0.9503041 * blue) / 1.08883
    f, g, h = (
        torch.where(part > (6 / 29) ** 3, part.abs().pow(1 / 3), part * (29 / 6) ** 2 / 3 + 4 / 29)
        for part in (across, up, deep)
    )
    return 116 * g - 16, 500 * (f - g), 200 * (g - h)


def _norm(delta: Tensor, norm: float) -> Tensor:
    if norm == 0:
        return (delta.abs().amax(1) > 0).flatten(1).sum(1).double()
    size: Tensor = torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)
    return size


def _noise(outcome: Outcome, target: Target, images: Images, far: Tensor, claimed: Tensor, noise: Tensor) -> None:
    """A random perturbation as large as the attack's (as eps, where it failed): the floor of any attack."""
    eps, norm = float(outcome.threat.ball.eps), outcome.threat.ball.norm
    size = torch.full((len(images),), eps, dtype=torch.float64, device=images.x.device)
    size[claimed] = far
    rows = (outcome.attacked & size.isfinite()).nonzero().squeeze(1)
    if not len(rows):
        return
    moved = []
    for row in rows.tolist():
        one = torch.Generator().manual_seed(int(images.index[row]) + 1_000_003 * outcome.seed)
        wild = torch.randn(images.x.shape[1:], generator=one).to(images.x)
        x, reach = images.x[row], float(size[row])
        if norm == "wasserstein":
            step = _scattered(x, reach, one) - x
        elif norm == "spatial":
            share = 2 * torch.rand(3, generator=one) - 1
            limits = torch.tensor([0.1 * x.shape[2], 0.1 * x.shape[1], 30.0])
            step = _drawn(x[None], (reach * share / share.abs().max() * limits)[None].to(x))[0] - x
        elif norm == "color":
            way = 2 * torch.rand(2, generator=one).to(x) - 1
            way = (way / way.abs().max() * 127 * reach).view(1, 2, 1, 1).expand(1, 2, *x.shape[1:])
            step = shifted(to_lab(x[None]), way)[0] - x
        elif norm == math.inf:
            step = wild.sign() * reach
        elif norm == 0:
            order = torch.rand(x.shape[1:], generator=one).to(x).flatten().argsort().argsort().view(x.shape[1:])
            step = (wild.sign() - x) * (order < reach)
        else:
            step = wild * reach / torch.linalg.vector_norm(wild, ord=float(norm))
        moved.append((x + step).clamp(0, 1))
    noise[rows] = _fresh(target, torch.stack(moved), outcome.goal[rows], outcome.threat.targeted)[0]


def _scattered(x: Tensor, reach: float, one: torch.Generator) -> Tensor:
    """Every pixel of ``x`` (c, h, w) sends one share to a random pixel near it, at the cost ``reach`` in all."""
    h, w = x.shape[1:]
    rows, columns = torch.arange(h)[:, None], torch.arange(w)
    down, right = (torch.randint(-2, 3, x.shape, generator=one) for _ in range(2))
    down, right = (rows + down).clamp(0, h - 1) - rows, (columns + right).clamp(0, w - 1) - columns
    ends = ((rows + down) * w + columns + right).flatten(1).to(x.device)
    cost = float(((down.square() + right.square()).to(x) * x).sum() / x.sum().clamp_min(1e-30))
    sent = x.flatten(1) * min(1.0, reach / max(cost, 1e-30))
    return (x.flatten(1) - sent).scatter_add(1, ends, sent).view_as(x)
