"""The step of Brendel & Bethge's attack against a general solver, and in norm 0 against every choice of pixels."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, NonlinearConstraint, lsq_linear, minimize
from torch import Tensor

from besiege.attacks.whitebox.brendel_bethge import best_step
from besiege.core.threat import INF

N = 12


def problem(shape: tuple[int, int, int], radius: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where the walk stands, images many of whose values are 0 or 1, normals, changes, and the radius, in float64."""
    draws = torch.Generator().manual_seed(3)
    x, adv, normal = (torch.randn(N, *shape, generator=draws, dtype=torch.float64) for _ in range(3))
    x = (0.5 + 0.5 * x).clamp(0, 1)
    adv = torch.lerp(x, (0.5 + 0.5 * adv).clamp(0, 1), torch.rand(N, 1, 1, 1, generator=draws, dtype=torch.float64))
    change = torch.randn(N, generator=draws, dtype=torch.float64) * 0.5 * radius * normal.flatten(1).norm(dim=1)
    return adv, x, normal, change, torch.full((N,), radius, dtype=torch.float64)


def least(norm: float, adv: Tensor, x: Tensor, normal: Tensor, change: float, radius: float) -> float | None:
    """How near to ``x`` a step can end, by SLSQP; None where no step of that radius brings the change."""
    at, origin, slope = (part.flatten().numpy() for part in (adv, x, normal))
    size = len(at)
    heavy = 1e4 * slope / np.linalg.norm(slope)
    shortest = lsq_linear(
        np.vstack([np.eye(size), heavy]), np.append(np.zeros(size), 1e4 * change / np.linalg.norm(slope)), (-at, 1 - at)
    ).x
    if abs(slope @ shortest - change) > 1e-4 or np.linalg.norm(shortest) > radius:
        return None
    back, spare = origin - at, {1: size, 2: 0, INF: 1}[norm]

    def distance(z: NDArray[np.float64]) -> float:
        return float(((z[:size] - back) ** 2).sum() if norm == 2 else z[size:].sum())

    reach = np.eye(size) if norm == 1 else np.ones((size, spare))
    sides = np.vstack([np.hstack([-np.eye(size), reach]), np.hstack([np.eye(size), reach])])
    solution = minimize(
        distance,
        np.append(shortest, np.full(spare, np.abs(shortest - back).max() + 0.01)),
        method="SLSQP",
        bounds=Bounds(np.append(-at, np.zeros(spare)), np.append(1 - at, np.full(spare, 9.0))),
        constraints=[
            LinearConstraint(np.append(slope, np.zeros(spare)), change, change),
            NonlinearConstraint(lambda z: z[:size] @ z[:size], 0, radius**2),
            *([LinearConstraint(sides, np.append(-back, back), INF)] if spare else []),
        ],
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert solution.status in (0, 8)  # 8: no descent in the last digits
    return float(solution.fun**0.5 if norm == 2 else solution.fun)


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize(("shape", "radius"), [((1, 3, 4), 0.3), ((3, 2, 3), 1.0), ((2, 3, 3), 0.05), ((1, 4, 4), 3.0)])
def test_the_step_is_the_best_within_its_radius(norm: float, shape: tuple[int, int, int], radius: float) -> None:
    adv, x, normal, change, radii = problem(shape, radius)
    best = best_step(norm, adv, x, normal, change, radii)
    assert 0 <= float(best.min()) and float(best.max()) <= 1
    assert bool(((best - adv).flatten(1).norm(dim=1) <= radius * (1 + 1e-6)).all())
    solved = 0
    for row in range(N):
        known = least(norm, adv[row], x[row], normal[row], float(change[row]), radius)
        if known is not None:
            solved += 1
            changed = ((best[row] - adv[row]) * normal[row]).sum()
            assert float((changed - change[row]).abs()) <= 1e-4
            assert float(torch.linalg.vector_norm(best[row] - x[row], norm)) <= known * 1.001 + 1e-5
    assert solved >= 4


def test_where_the_change_is_out_of_reach_the_step_comes_closest_to_it() -> None:
    adv, x, normal, _, radii = problem((1, 3, 4), 0.3)
    best = best_step(2, adv, x, normal, torch.full((N,), 1e3, dtype=torch.float64), radii)
    for row in range(N):
        low, high = (-adv[row]).flatten().numpy(), (1 - adv[row]).flatten().numpy()
        slope = normal[row].flatten().numpy()
        known = minimize(
            lambda z, slope=slope: -slope @ z,
            np.zeros(len(slope)),
            method="SLSQP",
            bounds=Bounds(low, high),
            constraints=NonlinearConstraint(lambda z: z @ z, 0, 0.09),
            options={"ftol": 1e-12},
        )
        assert float(((best[row] - adv[row]) * normal[row]).sum()) >= -known.fun * (1 - 1e-4)


def test_in_norm_0_nearly_as_few_pixels_move_as_can() -> None:
    shape, radius = (3, 2, 4), 1.0
    adv, x, normal, change, radii = problem(shape, radius)
    moved = (best_step(0, adv, x, normal, change, radii) != x).any(1).flatten(1).sum(1)
    excess = []
    for row in range(N):
        fewest = next(
            (
                k
                for k in range(9)
                if any(
                    reaches(adv[row], x[row], normal[row], float(change[row]), radius, list(free))
                    for free in combinations(range(8), k)
                )
            ),
            None,
        )
        if fewest is not None:
            excess.append(int(moved[row]) - fewest)
    assert len(excess) >= 6
    assert min(excess) >= 0 and max(excess) <= 1 and sum(excess) <= len(excess) / 2


def reaches(adv: Tensor, x: Tensor, normal: Tensor, change: float, radius: float, free: list[int]) -> bool:
    """Whether the shortest step that moves no pixel but ``free`` off ``x`` brings the change within the radius."""
    at, origin, slope = (part.flatten(1) for part in (adv, x, normal))
    home = origin - at
    held = torch.ones(at.shape[1], dtype=torch.bool)
    held[free] = False
    left = change - float((home * slope)[:, held].sum())
    if free:
        low, high, part = (
            (-at)[:, free].flatten().numpy(),
            (1 - at)[:, free].flatten().numpy(),
            slope[:, free].flatten().numpy(),
        )
        heavy = 1e4 / np.linalg.norm(part)
        matrix = np.vstack([np.eye(len(part)), heavy * part])
        found = lsq_linear(matrix, np.append(np.zeros(len(part)), heavy * left), (low, high)).x
        left -= part @ found
        home[:, free] = torch.from_numpy(found).view(len(at), -1)
    return abs(left) <= 1e-4 and float(home.norm()) <= radius
