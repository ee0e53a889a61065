"""Houdini: where it has to succeed on a linear classifier, and through the gradients of another model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from besiege.attacks.blackbox.houdini import houdini
from besiege.core.images import Images
from besiege.core.lens import Surrogate
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade


class Plane(nn.Module):
    """Class 0 on one side of a hyperplane through the middle of the box, class 1 on the other."""

    def __init__(self, normal: Tensor) -> None:
        super().__init__()
        self.normal = normal

    def forward(self, x: Tensor) -> Tensor:
        side = ((x - 0.5) * self.normal).flatten(1).sum(1)
        return torch.stack([side, -side], 1)


NORMAL = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0))


def images() -> Images:
    """Four images near the middle, at a known distance from the boundary: 1 and 2 units of the normal."""
    unit = NORMAL / NORMAL.norm()
    x = torch.stack([0.5 + side * unit for side in (0.2, 0.4, -0.2, -0.4)])
    return Images.of(x, torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("norm", [2, INF])
def test_those_fall_whose_boundary_is_within_reach(norm: float) -> None:
    dual = NORMAL.norm() if norm == 2 else NORMAL.abs().sum()
    nearest = 0.2 * float(NORMAL.norm() / dual)
    target = Target.of(Plane(NORMAL), classes=2, shape=(1, 6, 6))
    for share, expected in ((0.98, [False] * 4), (1.02, [True, False] * 2), (2.04, [True] * 4)):
        threat = ThreatModel(Access.GRADIENTS, Ball(norm, share * nearest))
        assert evade(houdini(steps=10), target, images(), threat).success.tolist() == expected


def test_it_transfers_from_a_model_that_resembles_the_target() -> None:
    given, target = images(), Target.of(Plane(NORMAL), classes=2, shape=(1, 6, 6)).granting(Access.LABELS)
    threat = ThreatModel(Access.LABELS, Ball(2, 0.5))
    like = NORMAL + 0.2 * torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1))
    for normal, expected in ((like, [True] * 4), (-NORMAL, [False] * 4)):
        known = Target.of(Plane(normal), classes=2, shape=(1, 6, 6))
        found = evade(
            houdini(), target, given, threat, lens=lambda meter, x, rng, known=known: Surrogate(meter, known, x)
        )
        assert found.success.tolist() == expected
        assert int(found.backward.sum()) == 0 and int(found.forward.max()) <= 5
