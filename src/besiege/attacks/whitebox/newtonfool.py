"""NewtonFool: Newton's steps down the probability of the image's class, until another class leads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from besiege.attacks.whitebox.fab_t import to_plane
from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import Ball, rowwise

HALVINGS = 5
"""How often the way to a nearer point is tried: all of it, then halved."""


@evasion("NewtonFool", paper="doi:10.1145/3134600.3134635", norms=(2,), seeks="minimum", targeted=False)
def newtonfool(
    oracle: Oracle, x: Tensor, ball: Ball, rng: Rng, *, steps: int = 100, eta: float = 0.01, returns: int = 2
) -> None:
    """Take ``steps`` steps to where the probability would be chance, none longer than ``eta`` times ``|x|``.

    An image that has fallen takes no more (Jang, Wu & Jha 2017).

    Departs from the paper: each image then turns back ``returns`` times (0 is the paper's) toward the nearest point of
    the boundary as linearized where it stands, as far as it stays fallen. The slope of p is taken as p times that of
    log p, which single precision still holds where p itself is 1 to the last digit; the box is never left.
    """
    rows, adv, last, longest = torch.arange(len(x), device=x.device), x, x.clone(), eta * x.flatten(1).norm(dim=1)
    for _ in range(steps):
        log_p, slope = oracle.gradient(adv, "ce", rows)
        unsure = (log_p < -math.log(2)).nonzero().squeeze(1)
        if len(unsure):
            standing = torch.ones_like(rows, dtype=torch.bool)
            standing[unsure] = ~oracle.is_adversarial(adv[unsure], rows[unsure])
            rows, adv, log_p, slope = (part[standing] for part in (rows, adv, log_p, slope))
            if not len(rows):
                break
        size = slope.flatten(1).norm(dim=1).clamp_min(1e-30)
        step = torch.minimum(longest[rows], (1 - (-log_p).exp() / oracle.classes) / size)
        adv = (adv - rowwise(step / size, x) * slope).clamp(0, 1)
        last[rows] = adv
    else:
        oracle.is_adversarial(adv, rows)
    for _ in range(returns):
        last = _turn_back(oracle, x, last)


def _turn_back(oracle: Oracle, x: Tensor, adv: Tensor) -> Tensor:
    """The point nearest the linearized boundary, and 2 % beyond, that is adversarial on the way there from ``adv``."""
    gap, slope = oracle.gradient(adv)
    rise = (slope * (adv - x)).flatten(1).sum(1)
    tried = low = (x + 1.02 * to_plane(x, slope, gap - rise, 2)).clamp(0, 1)
    for _ in range(HALVINGS):
        won = rowwise(oracle.is_adversarial(tried), x)
        adv, low = torch.where(won, tried, adv), torch.where(won, low, tried)
        tried = (low + adv) / 2
    return adv
