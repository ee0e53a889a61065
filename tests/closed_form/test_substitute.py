"""The substitute: what it asks, what it learns, and that what it does to an image is the image's alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from besiege.attacks.blackbox.substitute import substitute
from besiege.core.images import Images
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade, fit_universal
from besiege.engine.judge import judge


def split(x: torch.Tensor) -> torch.Tensor:
    """Class 1 where the left half is brighter than the right, told by labels alone; three classes, the last unused."""
    gap = (x[:, :, :, :4] - x[:, :, :, 4:]).flatten(1).mean(1)
    return torch.stack([(gap <= 0).float(), (gap > 0).float(), gap * 0 - 1], 1)


def images(n: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    x[:, :, :, 4:] += (0.4 * torch.rand(n, 1, 1, 1, generator=generator) - 0.2).clamp(0, 1)
    x = x.clamp(0, 1)
    return Images.of(x, split(x).argmax(1))


class Asked:
    """The rule, which keeps what it was asked."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return split(x)


def fitted(asked: Asked, *, goal: int | None = None, norm: float = INF, eps: float = 0.2, **options: object):
    target = Target(asked, Access.LABELS, 3, (1, 8, 8), batch=1000)
    threat = ThreatModel(Access.LABELS, Ball(norm, eps), targeted=goal is not None)
    return target, threat, *fit_universal(substitute(**options), target, images(60, 0), threat, 0, goal)


@pytest.mark.parametrize(("own", "rounds"), [(40, 1), (20, 4), (500, 3)])
def test_it_asks_once_about_each_of_a_set_that_doubles(own, rounds):
    asked = Asked()
    *_, setup = fitted(asked, own=own, rounds=rounds, epochs=1)
    assert setup.forward == min(own, 60) * 2 ** (rounds - 1) + 60  # and the labels of the images to fit on
    assert sum(map(len, asked.seen)) == setup.forward
    assert setup.backward == 0


def test_twins_lie_on_the_sign_of_a_slope_forward_and_then_backward():
    asked = Asked()
    fitted(asked, own=20, rounds=4, epochs=1, stride=0.05, flip=2)
    own, *twins = asked.seen[1:]
    for k, later in enumerate(twins):
        before = torch.cat([own, *twins[:k]])
        moved = later - before
        inside = (later > 0) & (later < 1)
        assert bool((moved.abs() <= 0.05 + 1e-6).all())
        assert bool(torch.isclose(moved[inside].abs(), torch.tensor(0.05), atol=1e-5).float().mean() > 0.9)
    first, third = (asked.seen[2] - own).sign(), (asked.seen[4][:20] - own).sign()
    assert float((first == third).float().mean()) < 0.4  # the way back


def test_it_learns_the_rule_and_what_fools_it_fools_the_target():
    target, threat, trigger, _ = fitted(Asked(), epochs=30, rounds=5)
    others = images(200, 5)
    said = trigger.network(others.x.double()).argmax(1)
    assert float((said == others.y).double().mean()) >= 0.85
    judged = images(60, 9)
    found = evade(substitute(epochs=30, rounds=5), target, judged, threat, training=images(60, 0))
    assert float(judge(found, target, judged).success[found.attacked].double().mean()) >= 0.9
    assert bool((found.forward <= 6).all())


def test_toward_a_class_it_goes_there():
    target, _, trigger, _ = fitted(Asked(), goal=1, epochs=30, rounds=5)
    judged = images(60, 9)
    left = judged[judged.y == 0]
    assert float((target.labels(trigger(left.x)) == 1).double().mean()) >= 0.8
    right = judged[judged.y == 1]
    assert float((target.labels(trigger(right.x)) == 1).double().mean()) == 1.0


@pytest.mark.parametrize(("norm", "eps"), [(INF, 0.2), (2, 1.0)])
@pytest.mark.parametrize("search", ["fgsm", "momentum"])
def test_an_image_moves_to_the_edge_of_the_ball_and_the_same_way_in_any_batch(search, norm, eps):
    _, threat, trigger, _ = fitted(Asked(), norm=norm, eps=eps, rounds=2, search=search)
    x = images(7, 3).x
    moved = trigger(x)
    assert bool(threat.ball.holds(moved, x).all())
    assert float(threat.ball.distance(moved, x).min()) > 0.7 * eps
    for i in range(7):
        assert torch.equal(trigger(x[i : i + 1]), moved[i : i + 1])
    assert len(trigger.noise) == (1 if search == "fgsm" else 12)


def test_fgsm_is_one_step_along_the_sign_of_the_substitutes_own_gradient():
    _, _, trigger, _ = fitted(Asked(), rounds=2, search="fgsm")
    x = images(5, 3).x
    leaf = x.double().requires_grad_()
    scores = trigger.network(leaf)
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, scores.argmax(1)), leaf)
    assert torch.allclose(trigger(x), (x + 0.2 * slope.sign()).clamp(0, 1).float(), atol=1e-6)
    one = dataclasses.replace(trigger, goal=2)
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(trigger.network(leaf), torch.full((5,), 2)), leaf)
    assert torch.allclose(one(x), (x - 0.2 * slope.sign()).clamp(0, 1).float(), atol=1e-6)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = fitted(Asked(), rounds=2)[2]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    x = images(3, 1).x
    assert torch.equal(first(x), fitted(Asked(), rounds=2)[2](x))
