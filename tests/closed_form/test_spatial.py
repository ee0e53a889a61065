"""Turns and shifts: where pixels go, how a pose is found again, what the grid asks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from besiege.attacks.blackbox.spatial import spatial
from besiege.core.images import Images
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import Access, ThreatModel
from besiege.engine.evasion import evade
from besiege.engine.judge import _drawn, judge
from besiege.regions import Spatial
from besiege.regions.spatial import grid, limits, warped


def pictures(n: int, shape: tuple[int, int, int] = (3, 7, 10)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))


def test_pixels_go_where_a_shift_and_a_quarter_turn_lead() -> None:
    x = pictures(2)
    assert torch.allclose(warped(x, torch.zeros(3)), x, atol=1e-6)
    moved = warped(x, torch.tensor([2.0, 1.0, 0.0]))
    assert torch.allclose(moved[:, :, 1:, 2:], x[:, :, :-1, :-2], atol=1e-5)
    assert float(moved[:, :, 0].abs().max()) < 1e-5 and float(moved[..., :2].abs().max()) < 1e-5
    square = pictures(1, (1, 6, 6))
    turned = warped(square, torch.tensor([0.0, 0.0, 90.0]))
    assert torch.allclose(turned, square.rot90(-1, (2, 3)), atol=1e-5)
    both = warped(turned, torch.tensor([1.0, 2.0, 0.0]))
    assert torch.allclose(warped(square, torch.tensor([1.0, 2.0, 90.0])), both, atol=1e-5)


def test_the_judge_draws_the_same_by_itself() -> None:
    x = pictures(5).double()
    pose = (2 * pictures(5, (1, 1, 3)).flatten(1).double() - 1) * 2 * limits(x)
    assert torch.allclose(_drawn(x, pose), warped(x, pose), atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14)])
def test_a_pose_is_found_again(shape: tuple[int, int, int]) -> None:
    x = pictures(6, shape)
    region = Spatial(1.0)
    moved = region.sample(x, Rng.of(0, torch.arange(6), "poses"))
    share = 2 * Rng.of(0, torch.arange(6), "poses").rand(3) - 1
    assert torch.allclose(region.distance(moved, x), share.abs().amax(1), atol=1e-3)
    assert bool(region.holds(moved, x).all())
    assert region.distance(x, x).tolist() == [0] * 6
    assert bool(region.distance((moved + 0.02 * torch.randn_like(moved)).clamp(0, 1), x).isinf().all())
    far = warped(x, limits(x) * 1.5)
    assert not bool(region.holds(far, x).any())
    assert torch.equal(region.project(far, x), x)


def test_an_image_that_looks_the_same_in_any_pose_has_not_moved() -> None:
    black = torch.zeros(1, 1, 9, 9)
    assert Spatial(1.0).distance(warped(black, torch.tensor([0.5, 0.0, 28.0])), black).tolist() == [0]


def test_the_grid_is_the_papers_and_begins_with_the_largest() -> None:
    every = grid(5, 31)
    assert len(every) == 775 and len({tuple(pose) for pose in every.tolist()}) == 775
    sizes = every.square().sum(1)
    assert bool((sizes[:-1] >= sizes[1:]).all()) and float(sizes[-1]) == pytest.approx(0, abs=1e-12)
    assert limits(pictures(1, (3, 20, 50))).tolist() == pytest.approx([5.0, 2.0, 30.0])


class Upright(nn.Module):
    """Class 0 while the bar down the middle column stands; what leaves the column counts as class 1."""

    def forward(self, x: Tensor) -> Tensor:
        side = x[:, 0, :, x.shape[3] // 2].sum(1) - 0.8 * 9
        return torch.stack([side, -side], 1)


def bars(n: int) -> Images:
    x = torch.zeros(n, 1, 9, 9)
    x[..., 4] = 1
    return Images.of(x, torch.zeros(n, dtype=torch.int64))


def test_a_bar_falls_to_a_turn_and_what_is_claimed_is_confirmed() -> None:
    images, target = bars(3), Target.of(Upright(), classes=2, shape=(1, 9, 9))
    threat = ThreatModel(Access.LABELS, Spatial(1.0))
    found = evade(spatial(), target, images, threat)
    verdict = judge(found, target, images)
    assert verdict.success.tolist() == [True] * 3
    assert bool((verdict.distance <= 1.02).all()) and int(found.forward.max()) <= 3
    small = evade(spatial(), target, images, ThreatModel(Access.LABELS, Spatial(0.1)))
    assert small.success.tolist() == [False] * 3 and small.forward.tolist() == [775] * 3


def test_random_poses_are_an_images_own() -> None:
    images, target = bars(4), Target.of(Upright(), classes=2, shape=(1, 9, 9))
    threat = ThreatModel(Access.LABELS, Spatial(1.0))
    found = evade(spatial(search="random", draws=50), target, images, threat)
    assert bool(found.success.all())
    assert len({tuple(adv.flatten().tolist()) for adv in found.adv}) == 4
    assert not math.isinf(float(found.distance.max()))
