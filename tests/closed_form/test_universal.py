"""Universal perturbations of a linear classifier, where the best one is known: along the normal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from besiege.attacks.whitebox.targeted_uap import targeted_uap
from besiege.attacks.whitebox.uap import uap
from besiege.core.images import Images
from besiege.core.method import Attack
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Norm, ThreatModel
from besiege.engine.evasion import evade

SHAPE = (1, 5, 6)


def linear(classes: int) -> tuple[Target, Images]:
    """A linear classifier of grey images, all of which it takes for class 0."""
    draws = torch.Generator().manual_seed(classes)
    layer = nn.Linear(30, classes)
    layer.weight.data = torch.randn(classes, 30, generator=draws)
    layer.bias.data = -0.5 * layer.weight.data.sum(1)
    layer.bias.data[0] += 1.0
    target = Target.of(nn.Sequential(nn.Flatten(), layer), classes=classes, shape=SHAPE)
    x = 0.5 + 0.1 * (torch.rand(300, *SHAPE, generator=draws) - 0.5)
    images = Images.of(x, target.labels(x))
    return target, images[(images.y == 0).nonzero().squeeze(1)[:80]]


def gap(target: Target, images: Images, goal: int) -> tuple[Tensor, Tensor]:
    """How far each image is from being in class ``goal`` instead of 0, and the direction of fastest change."""
    assert isinstance(target.module, nn.Sequential)
    weight, scores = target.module[1].weight.detach(), target.scores(images.x)
    return scores[:, 0] - scores[:, goal], weight[goal] - weight[0]


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize(
    "attack",
    [
        uap(),
        uap(search="deepfool"),
        uap(search="deepfool", batch=1),
        targeted_uap(),
        targeted_uap(search="fgsm", stride=1.0),
    ],
    ids=str,
)
def test_all_fall_soon_after_the_best_perturbation_makes_them(attack: Attack, norm: Norm) -> None:
    target, images = linear(2)
    fitted, judged = images[:40], images[40:]
    distance, slope = gap(target, images, 1)
    size = slope.norm() if norm == 2 else slope.abs().sum()
    needed = float(distance.max() / size)
    goal = 1 if attack.card.targeted else None
    for share, fell in ((1.3, 1.0), (0.3, 0.0)):
        threat = ThreatModel(Access.GRADIENTS, Ball(norm, share * needed), targeted=goal is not None)
        found = evade(attack, target, judged, threat, training=fitted, target_class=goal)
        assert float(found.success.float().mean()) == fell
        assert int(found.forward.max()) <= 3
        assert found.setup_forward > 0


def test_the_class_to_reach_is_reached() -> None:
    target, images = linear(5)
    for goal in (1, 3):
        distance, slope = gap(target, images, goal)
        eps = 2 * float(distance.max() / slope.abs().sum())
        threat = ThreatModel(Access.GRADIENTS, Ball(INF, eps), targeted=True)
        for attack in (targeted_uap(), targeted_uap(search="fgsm", batch=1, stride=1.0)):
            found = evade(attack, target, images[40:], threat, training=images[:40], target_class=goal)
            assert target.labels(found.adv[found.success]).eq(goal).all()
            assert float(found.success.float().mean()) > 0.9
