"""The shadow attack: what it holds for natural, and a certificate that it spoofs on a classifier known in full."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from besiege.attacks.whitebox.shadow import _slope, shadow, unnatural
from besiege.core.images import Images
from besiege.core.lens import Bpda
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.defenses.input.randomized_smoothing import Smoothed, certify, randomized_smoothing
from besiege.engine.evasion import evade


def test_what_is_unnatural() -> None:
    flat = torch.full((1, 3, 4, 5), 0.2)
    assert float(unnatural(flat, 1, 0, 0)) == 0
    assert float(unnatural(flat, 0, 1, 0)) == pytest.approx(3 * 0.2**2)
    assert float(unnatural(flat, 0, 0, 1)) == 0
    edge = torch.zeros(1, 1, 4, 5)
    edge[..., 2:] = 0.5
    assert float(unnatural(edge, 1, 0, 0)) == pytest.approx(4 * 0.25)
    red = torch.zeros(1, 3, 4, 5)
    red[:, 0] = 0.1
    assert float(unnatural(red, 0, 0, 1)) == pytest.approx((20 * (2 * 0.01) ** 2) ** 0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_its_slope_by_finite_differences(channels: int) -> None:
    change = torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope, step = _slope(change, 0.3, 1.0, 0.5), 1e-6
    for at in ((0, 0, 1, 2), (1, channels - 1, 2, 0)):
        moved = change.clone()
        moved[at] += step
        risen = unnatural(moved, 0.3, 1.0, 0.5) - unnatural(change, 0.3, 1.0, 0.5)
        assert float(risen.sum() / step) == pytest.approx(float(slope[at]), rel=1e-4)


class Bright(nn.Module):
    """Class 1 where the image is brighter than one half on average."""

    def forward(self, x: Tensor) -> Tensor:
        side = 40 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-side, side], 1)


TARGET = Target.of(Bright(), classes=2, shape=(3, 6, 6))


def images() -> Images:
    x = 0.1 + 0.2 * torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return Images.of(x, torch.zeros(4, dtype=torch.int64))


def test_a_change_in_grey_is_the_same_in_all_channels() -> None:
    given = images()
    threat = ThreatModel(Access.GRADIENTS, Ball(INF, 1.0))
    change = evade(shadow(), TARGET, given, threat).adv - given.x
    assert float((change - change.mean(1, keepdim=True)).abs().max()) < 1e-6
    coloured = evade(shadow(grey=False, similarity=0), TARGET, given, threat)
    assert bool(coloured.success.all())


def test_a_certificate_is_spoofed_where_a_small_change_gets_none() -> None:
    given, sigma, radius = images(), 0.25, 0.2
    votes = randomized_smoothing(sigma=sigma, radius=radius).bound()
    smooth = votes(TARGET, given, Rng.of(0, torch.arange(4), "votes"))
    stand_in = Smoothed(TARGET, sigma=sigma, samples=50, radius=radius)
    threat = ThreatModel(Access.GRADIENTS, Ball(INF, 1.0))
    found = evade(shadow(), TARGET, given, threat)
    assert bool(found.success.all())
    near = certify(TARGET, found.adv, Rng.of(2, torch.arange(4), "near"), sigma=sigma, samples=2000)
    assert bool((near.radius < radius).any())
    known = replace(smooth, access=Access.GRADIENTS)  # to whoever knows the defense
    spoofed = evade(shadow(), known, given, threat, lens=lambda meter, x, rng: Bpda(meter, stand_in.softened))
    assert bool(spoofed.success.all())
    held = certify(TARGET, spoofed.adv, Rng.of(3, torch.arange(4), "held"), sigma=sigma, samples=2000)
    assert held.label.tolist() == [1] * 4
    assert float(held.radius.min()) >= 0.9 * radius
