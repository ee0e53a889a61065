"""DeepFool, C&W, FMN and DDN against linear classifiers whose nearest adversarial points are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from besiege.attacks.whitebox.brendel_bethge import brendel_bethge
from besiege.attacks.whitebox.cw_l0 import cw_l0
from besiege.attacks.whitebox.cw_l2 import cw_l2
from besiege.attacks.whitebox.cw_linf import cw_linf
from besiege.attacks.whitebox.ddn import ddn
from besiege.attacks.whitebox.deepfool import deepfool
from besiege.attacks.whitebox.ead import ead
from besiege.attacks.whitebox.fmn import fmn
from besiege.attacks.whitebox.lbfgs import lbfgs
from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import Attack
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Answer, Ball, Goal, ThreatModel
from besiege.engine.evasion import Outcome, evade

DUAL = {1: INF, 2: 2, INF: 1}
ALL = [
    (deepfool(), 2, 1.021),
    (deepfool(), INF, 1.025),
    (cw_l2(), 2, 1.02),
    (ddn(), 2, 1.25),
    (fmn(), 1, 1.25),
    (fmn(), 2, 1.02),
    (fmn(), INF, 1.02),
    (cw_linf(), INF, 1.05),
    (ead(), 1, 1.2),
    (ead(), 2, 1.02),
    (lbfgs(), 2, 1.02),
    (brendel_bethge(), 1, 1.2),
    (brendel_bethge(), 2, 1.02),
    (brendel_bethge(), INF, 1.02),
]
L2 = [attack for attack, norm, _ in ALL if norm == 2]
TARGETED = [(attack, norm, factor) for attack, norm, factor in ALL if attack.card.targeted]


def linear(
    classes: int,
    shape: tuple[int, int, int] = (3, 4, 5),
    *,
    shift: float = 0.0,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Target, Images]:
    """A linear classifier and the four of 200 images furthest from its planes; a large ``spread`` binds the box."""
    draws, size = torch.Generator().manual_seed(classes), math.prod(shape)
    weight = torch.randn(classes, size, generator=draws, dtype=dtype)
    x = (0.5 + (torch.rand(200, *shape, generator=draws, dtype=dtype) - 0.5) * spread).clamp(0, 1)
    layer = nn.Linear(size, classes, dtype=dtype)
    layer.weight.data, layer.bias.data = weight, shift - 0.5 * weight.sum(1)
    target = Target.of(nn.Sequential(nn.Flatten(), layer), classes=classes, shape=shape)
    images = Images.of(x, target.labels(x))
    return target, images[distances(target, images, 2).amin(1).topk(4).indices.sort().values]


def distances(target: Target, images: Images, norm: float) -> Tensor:
    """(n, classes) how far the plane between the image's class and each other lies, inf for its own."""
    assert isinstance(target.module, nn.Sequential)
    weight, scores = target.module[1].weight.detach(), target.scores(images.x)
    between = torch.linalg.vector_norm(weight[images.y][:, None] - weight, ord=DUAL[norm], dim=2)
    return ((scores.gather(1, images.y[:, None]) - scores) / between).scatter(1, images.y[:, None], INF)


def siege(attack: Attack, target: Target, images: Images, norm: float, **options: Any) -> Outcome:
    """The outcome; every image attacked has fallen, up to rounding at the boundary, inside the box."""
    threat = ThreatModel(Access.GRADIENTS, Ball(norm, INF), targeted="target_class" in options)
    outcome = evade(attack, target, images, threat, **options)
    assert torch.equal(outcome.success, outcome.attacked)
    margin = Goal(outcome.goal, "target_class" in options).margin(Answer(target.scores(outcome.adv)))
    assert float(margin[outcome.attacked].max()) <= 1e-5
    assert 0 <= float(outcome.adv.min()) and float(outcome.adv.max()) <= 1
    return outcome


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize(("attack", "norm", "factor"), ALL, ids=str)
def test_the_nearest_plane_is_found(attack: Attack, norm: float, factor: float, classes: int) -> None:
    target, images = linear(classes)
    ratio = siege(attack, target, images, norm).distance / distances(target, images, norm).amin(1)
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) <= factor + 1e-3


@pytest.mark.parametrize(("attack", "norm", "factor"), TARGETED, ids=str)
def test_a_class_to_reach_is_reached_at_its_own_distance(attack: Attack, norm: float, factor: float) -> None:
    target, images = linear(3)
    for goal in range(3):
        outcome = siege(attack, target, images, norm, target_class=goal)
        assert bool((outcome.distance >= distances(target, images, norm)[:, goal] * (1 - 1e-4))[outcome.attacked].all())
        nearest = distances(target, images, norm).argmin(1) == goal
        ratio = (outcome.distance / distances(target, images, norm)[:, goal])[nearest & outcome.attacked]
        assert not len(ratio) or float(ratio.max()) <= factor + 1e-3


def test_deepfool_needs_one_step_on_a_linear_classifier() -> None:
    target, images = linear(6)
    outcome = siege(deepfool(), target, images, 2)
    assert set(outcome.backward.tolist()) == {6 + 3}
    assert float((outcome.distance / distances(target, images, 2).amin(1)).min()) >= 1.0199


def constrained(target: Target, images: Images, row: int) -> float:
    """The L2 distance of the nearest point of the box across a plane, by a general solver."""
    assert isinstance(target.module, nn.Sequential)
    weight, bias = (v.detach().double() for v in (target.module[1].weight, target.module[1].bias))
    x, own = images.x[row].flatten().double().numpy(), int(images.y[row])
    best = INF
    for other in range(target.classes):
        if other != own:
            normal, offset = (weight[own] - weight[other]).numpy(), float(bias[own] - bias[other])
            solution = minimize(
                lambda z: ((z - x) ** 2).sum(),
                x,
                jac=lambda z: 2 * (z - x),
                bounds=[(0, 1)] * len(x),
                constraints={
                    "type": "ineq",
                    "fun": lambda z, normal=normal, offset=offset: -(normal @ z) - offset,
                    "jac": lambda z, normal=normal: -normal,
                },
            )
            if solution.success:
                best = min(best, math.sqrt(solution.fun))
    return best


@pytest.mark.parametrize(
    ("attack", "factor"), list(zip(L2, (1.5, 1.02, 1.25, 1.02, 1.02, 1.02, 1.02), strict=True)), ids=str
)
def test_the_nearest_point_of_the_box_where_the_box_binds(attack: Attack, factor: float) -> None:
    target, images = linear(3, spread=4.0)
    assert float(((images.x == 0) | (images.x == 1)).float().mean()) > 0.5
    outcome = siege(attack, target, images, 2)
    exact = torch.tensor([constrained(target, images, row) for row in range(len(images))])
    moved = (outcome.adv != images.x) & ((images.x == 0) | (images.x == 1))
    assert bool(moved.flatten(1).any(1).all())
    assert float((outcome.distance / exact).min()) >= 1 - 1e-3
    assert float((outcome.distance / exact).max()) <= factor


@pytest.mark.parametrize("attack", [fmn(), cw_l0(), brendel_bethge()], ids=str)
def test_the_fewest_pixels_are_changed(attack: Attack) -> None:
    target, images = linear(2, (3, 5, 4))
    assert isinstance(target.module, nn.Sequential)
    weight, scores = target.module[1].weight.detach(), target.scores(images.x)
    outcome = siege(attack, target, images, 0)
    for row, (x, own) in enumerate(zip(images.x, images.y.tolist(), strict=True)):
        slope = (weight[own] - weight[1 - own]).view_as(x)
        gain = torch.maximum(slope * x, slope * (x - 1)).sum(0).flatten().sort(descending=True).values
        fewest = int((gain.cumsum(0) <= scores[row, own] - scores[row, 1 - own]).sum()) + 1
        assert fewest <= float(outcome.distance[row]) <= fewest + 1


@pytest.mark.parametrize(("attack", "norm", "factor"), [*ALL, (fmn(), 0, 1.0)], ids=str)
def test_a_constant_added_to_all_logits_changes_nothing(attack: Attack, norm: float, factor: float) -> None:
    plain, moved = (siege(attack, *linear(3, shift=shift, dtype=torch.float64), norm) for shift in (0.0, -100.0))
    assert torch.allclose(plain.distance, moved.distance, rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 3, 3), (4, 2, 5)])
@pytest.mark.parametrize(("attack", "norm", "factor"), [*ALL, (fmn(), 0, 1.0)], ids=str)
def test_a_row_alone_equals_the_row_in_a_batch(
    attack: Attack, norm: float, factor: float, shape: tuple[int, int, int]
) -> None:
    target, images = linear(4, shape, dtype=torch.float64)
    together = siege(attack, target, images, norm)
    for row in range(len(images)):
        alone = siege(attack, target, images[row : row + 1], norm)
        assert torch.allclose(alone.adv[0], together.adv[row], atol=1e-4)
        assert int(alone.backward) == int(together.backward[row])


def test_cw_as_in_the_paper_and_as_mended() -> None:
    target, images = linear(3)
    exact = distances(target, images, 2).amin(1)
    paper = siege(cw_l2(opening=0, decay=1, steps=300, searches=6), target, images, 2)
    mended = siege(cw_l2(), target, images, 2)
    assert float((paper.distance / exact).max()) <= 1.05
    assert float((mended.distance / exact).max()) <= 1.02
    assert float(mended.forward.double().mean()) < 0.2 * float(paper.forward.double().mean())


@pytest.mark.parametrize(
    ("mended", "paper", "norm", "factor"),
    [
        (cw_linf(), cw_linf(opening=0, steps=200, lr=0.005, doublings=21, precision=1.0, least=1 / 256), INF, 1.15),
        (ead(), ead(searches=6, steps=300, stride=0.01, beta=1e-3), 1, 1.6),
        (ead(), ead(searches=6, steps=300, stride=0.01, beta=1e-3), 2, 1.15),
        (lbfgs(), lbfgs(opening=0, steps=1000, searches=9), 2, 1.15),
        (
            brendel_bethge(),
            brendel_bethge(steps=1000, opening=0, depth=0, region=1e-3, halvings=20, momentum=0.8),
            2,
            1.3,
        ),
    ],
    ids=str,
)
def test_the_mended_way_is_no_further_than_the_papers(
    mended: Attack, paper: Attack, norm: float, factor: float
) -> None:
    target, images = linear(3)
    exact = distances(target, images, norm).amin(1)
    near, far = (siege(attack, target, images, norm) for attack in (mended, paper))
    assert float((far.distance / exact).max()) <= factor
    assert float(near.distance.mean()) <= 1.01 * float(far.distance.mean())
    assert float(near.forward.double().mean()) <= float(far.forward.double().mean())


def test_cw_l0_as_in_the_paper() -> None:
    target, images = linear(2, (3, 5, 4))
    paper = siege(cw_l0(share=0.3, opening=0, steps=100, lr=0.01, doublings=31), target, images, 0)
    mended = siege(cw_l0(), target, images, 0)
    assert bool((paper.distance <= mended.distance + 3).all())
    assert float(mended.forward.double().mean()) < 0.2 * float(paper.forward.double().mean())


@pytest.mark.parametrize("options", [{"classes": 1}, {"rivals": 0}])
def test_deepfool_refuses_to_look_at_no_class(options: dict[str, int]) -> None:
    target, images = linear(3)
    with pytest.raises(BadInput):
        siege(deepfool(**options), target, images, 2)


@pytest.mark.parametrize("overshoot", [0.02, 0.1, 0.5])
def test_deepfool_goes_beyond_the_boundary_by_its_overshoot_once(overshoot: float) -> None:
    """Peers have applied it at every step, or not at all: on a plane one step is all there is."""
    target, images = linear(2)
    found = evade(deepfool(overshoot=overshoot), target, images, ThreatModel(Access.GRADIENTS, Ball(2, INF)))
    exact = evade(deepfool(overshoot=0.001), target, images, ThreatModel(Access.GRADIENTS, Ball(2, INF)))
    assert bool(found.success.all()) and found.backward.unique().tolist() == exact.backward.unique().tolist()
    assert torch.allclose(found.distance / exact.distance, torch.tensor((1 + overshoot) / 1.001), rtol=1e-3)
