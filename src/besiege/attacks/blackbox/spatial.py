"""Spatial attack: turns and shifts of the image, a grid of them or random ones."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import Access
from besiege.regions.spatial import Spatial, grid, limits, warped


@evasion("Spatial", paper="arXiv:1712.02779", norms=("spatial",), access=Access.LABELS)
def spatial(
    oracle: Oracle,
    x: Tensor,
    ball: Spatial,
    rng: Rng,
    *,
    search: Literal["grid", "random"] = "grid",
    shifts: int = 5,
    turns: int = 31,
    draws: int = 10,
) -> None:
    """Try ``shifts`` by ``shifts`` shifts and ``turns`` turns, or ``draws`` random poses (Engstrom et al. 2019).

    Each image is asked about until one pose is a success, the largest poses first. The poses of the grid are the same
    for all images, the random ones an image's own.
    """
    poses = grid(shifts, turns).to(x) * limits(x) * float(ball.eps)
    for k in range(draws if search == "random" else len(poses)):
        x, rng = oracle.live(x, rng)
        oracle.is_adversarial(ball.sample(x, rng) if search == "random" else warped(x, poses[k]))
