"""NewtonFool against its own formula, written out slowly, and on classifiers whose boundaries are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from besiege.attacks.whitebox.newtonfool import newtonfool
from besiege.core.images import Images
from besiege.core.method import Attack
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import Outcome, evade

SHAPE = (3, 4, 5)


def linear(
    classes: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float64, n: int = 8
) -> tuple[Target, Images, Tensor]:
    """A linear classifier, images well inside the box, and (n,) how far the nearest plane is from each."""
    draws = torch.Generator().manual_seed(classes)
    weight = scale * torch.randn(classes, 60, generator=draws, dtype=torch.float64)
    layer = nn.Linear(60, classes, dtype=dtype)
    layer.weight.data, layer.bias.data = weight.to(dtype), (-0.5 * weight.sum(1)).to(dtype)
    x = (0.5 + (torch.rand(n, *SHAPE, generator=draws, dtype=torch.float64) - 0.5) * 0.3).to(dtype)
    target = Target(nn.Sequential(nn.Flatten(), layer), Access.WEIGHTS, classes, SHAPE, dtype=dtype)
    images = Images.of(x, target.labels(x))
    scores, own = target.scores(x), images.y[:, None]
    away = torch.linalg.vector_norm(layer.weight.detach()[images.y][:, None] - layer.weight.detach(), dim=2)
    return target, images, ((scores.gather(1, own) - scores) / away).scatter(1, own, INF).amin(1)


def siege(attack: Attack, target: Target, images: Images) -> Outcome:
    outcome = evade(attack, target, images, ThreatModel(Access.GRADIENTS, Ball(2, INF)), execution="plain")
    assert bool(outcome.success.all())
    return outcome


def slowly(target: Target, x: Tensor, label: int, steps: int, eta: float) -> tuple[Tensor, int]:
    """The paper's algorithm on one image (1, c, h, w), word for word; how many steps it took."""
    adv, size = x.clone(), float(x.norm())
    for step in range(steps):
        leaf = adv.clone().requires_grad_()
        scores = target.answer(leaf).scores
        if int(scores.argmax()) != label:
            return adv, step
        value = scores.softmax(1)[0, label]
        (grad,) = torch.autograd.grad(value, leaf)
        p = float(value.detach())
        delta = min(eta * size * float(grad.norm()), p - 1 / scores.shape[1])
        adv = (adv - delta * grad / grad.norm().square()).clamp(0, 1)
    return adv, steps


@pytest.mark.parametrize("eta", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_each_image_walks_as_in_the_paper(classes: int, eta: float) -> None:
    target, images, _ = linear(classes)
    outcome = siege(newtonfool(eta=eta, returns=0), target, images)
    for row, (x, label) in enumerate(zip(images.x, images.y.tolist(), strict=True)):
        adv, steps = slowly(target, x[None], label, 100, eta)
        assert 0 < steps < 100
        assert torch.allclose(outcome.adv[row], adv[0], atol=1e-9)
        assert int(outcome.backward[row]) in (steps, steps + 1)


def test_with_two_classes_the_first_step_has_a_closed_form() -> None:
    target, images, far = linear(2, scale=0.5)
    scores = target.scores(images.x)
    gap = scores.gather(1, images.y[:, None]).squeeze(1) - scores.gather(1, 1 - images.y[:, None]).squeeze(1)
    p = gap.sigmoid()
    step = (p - 0.5) / (p * (1 - p) * gap / far)
    outcome = siege(newtonfool(eta=10, returns=0), target, images)
    assert torch.allclose(outcome.distance, step, rtol=1e-9)
    assert outcome.backward.tolist() == [2] * len(images)


def test_a_certain_network_is_left_in_single_precision() -> None:
    target, images, _ = linear(3, scale=40.0, dtype=torch.float32)
    probability = target.scores(images.x).softmax(1).amax(1)
    assert float(probability.max()) == 1.0
    assert float((target.scores(images.x).topk(2).values.diff().abs()).max()) > 20
    siege(newtonfool(returns=0), target, images)


def test_turning_back_ends_at_the_nearest_plane() -> None:
    for classes in (2, 3, 6):
        target, images, far = linear(classes)
        plain = siege(newtonfool(returns=0, eta=0.05), target, images).distance / far
        mended = siege(newtonfool(eta=0.05), target, images).distance / far
        assert float(mended.min()) >= 1 - 1e-6
        assert float(mended.max()) <= 1.021
        assert float(mended.mean()) < float(plain.mean())


def test_an_image_that_is_never_left_ends_after_its_steps() -> None:
    target, images, _ = linear(3)
    few = evade(newtonfool(steps=2, eta=1e-4, returns=0), target, images, ThreatModel(Access.GRADIENTS, Ball(2, INF)))
    assert not bool(few.success.any())
    assert few.backward.tolist() == [2] * len(images)
    assert math.isinf(float(few.distance[0]))
