"""UPSET and ANGRI where it is known what they should make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from besiege.attacks.blackbox.angri import angri
from besiege.attacks.blackbox.upset import bounded, upset
from besiege.core.images import Images
from besiege.core.lens import Surrogate
from besiege.core.method import Attack
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.core.trigger import Trigger
from besiege.engine.evasion import Setup, evade, fit_universal
from besiege.engine.judge import judge

SHAPE = (1, 6, 6)
WEIGHT = torch.randn(3, 36, generator=torch.Generator().manual_seed(4))


def linear(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1) @ WEIGHT.T


def grey(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.4 + 0.3


def fitted(attack: Attack, call, images: Images, ball: Ball, goal: int | None) -> tuple[Trigger, Setup]:
    target = Target(call, Access.GRADIENTS, 3, SHAPE)
    threat = ThreatModel(Access.GRADIENTS, ball, targeted=goal is not None)
    return fit_universal(attack, target, images, threat, 0, goal)


@pytest.mark.parametrize("attack", [upset(), angri(fidelity=0.0)], ids=str)
@pytest.mark.parametrize("norm", [2, INF])
def test_on_a_linear_model_it_gains_nearly_all_that_the_ball_allows(attack, norm):
    """Toward class 2 from class 0 and 1 alike the way is known: up the weights of 2, down those of the class ahead."""
    ball, x = Ball(norm, {2: 0.5, INF: 0.05}[norm]), grey(80)
    weight = WEIGHT.clone()
    weight[1] = weight[0]  # two classes in truth, so that the gain has one direction

    def call(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight.T

    images = Images.of(x, call(x).argmax(1))
    trigger, _ = fitted(attack, call, images, ball, 2)
    slope = (weight[2] - weight[0]).view(1, *SHAPE)
    others = grey(20, 1)
    gain = ((trigger(others) - others) * slope).flatten(1).sum(1)
    most = 0.05 * slope.abs().sum() if norm == INF else 0.5 * slope.norm()
    assert bool((gain >= 0.85 * most).all())
    assert bool((gain <= most * (1 + 1e-5)).all())


def halves(x: torch.Tensor) -> torch.Tensor:
    """Class 2 where the left half is dark and gets darker, or is bright and gets brighter: no shift serves both."""
    left = x[:, 0, :, :3].mean((1, 2))
    lean = (left - 0.5).abs() - 0.3
    return torch.stack([left * 0 + 0.0, left * 0 - 5, 40 * lean], 1)


def lit(n: int, seed: int) -> Images:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPE, generator=g) * 0.1 + 0.45
    x[:, :, :, :3] += torch.where(torch.rand(n, 1, 1, 1, generator=g) < 0.5, -0.2, 0.2)
    return Images.of(x, halves(x).argmax(1))


def test_what_each_image_needs_otherwise_a_single_perturbation_cannot_give_and_angri_does():
    images, judged = lit(200, 0), lit(60, 1)
    assert set(images.y.tolist()) == {0}
    target, ball = Target(halves, Access.GRADIENTS, 3, SHAPE), Ball(INF, 0.15)
    threat = ThreatModel(Access.GRADIENTS, ball, targeted=True)
    single = evade(upset(), target, judged, threat, training=images, target_class=2)
    each = evade(angri(), target, judged, threat, training=images, target_class=2)
    assert float(single.success.double().mean()) < 0.75
    assert float(judge(each, target, judged).success.double().mean()) >= 0.95


@pytest.mark.parametrize("make", [upset, angri], ids=["upset", "angri"])
def test_fidelity_makes_the_change_smaller(make):
    images, ball = Images.of(grey(60), linear(grey(60)).argmax(1)), Ball(2, 2.0)
    others = grey(20, 1)
    sizes = []
    for fidelity in (0.0, 0.5, 50.0):
        trigger, _ = fitted(make(fidelity=fidelity, epochs=30), linear, images, ball, 1)
        sizes.append(float(ball.distance(trigger(others), others).mean()))
    assert sizes[0] > sizes[1] > 2 * sizes[2]


@pytest.mark.parametrize("attack", [upset(epochs=3), angri(epochs=3)], ids=["upset", "angri"])
@pytest.mark.parametrize("norm", [2, INF])
def test_the_change_keeps_to_the_ball_and_the_box_and_to_its_image(attack, norm):
    ball, x = Ball(norm, 0.3), torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    trigger, setup = fitted(attack, linear, Images.of(x, linear(x).argmax(1)), ball, None)
    assert torch.equal(torch.get_rng_state(), state)
    moved = trigger(x)
    assert bool(ball.holds(moved, x).all())
    assert not torch.equal(moved, x)
    for i in (0, 7, 39):
        assert torch.equal(trigger(x[i : i + 1]), moved[i : i + 1])
    assert setup.backward == 3 * 40
    assert setup.forward == 5 * 40  # the gradients', the labels to leave, and the class to reach


def test_without_a_class_to_reach_it_is_the_one_that_most_come_second_to():
    """All are of class 0, nine in ten come second to class 2; class 1 is near for the others alone."""

    def call(x: torch.Tensor) -> torch.Tensor:
        bright = x.flatten(1).mean(1)
        return torch.stack([bright * 0 + 1, 3 * (bright - 0.5), 3 * (0.5 - bright)], 1)

    x = torch.full((40, *SHAPE), 0.45)
    x[36:] = 0.55
    images = Images.of(x, torch.zeros(40, dtype=torch.int64))
    for attack in (upset(), angri()):
        trigger, _ = fitted(attack, call, images, Ball(INF, 0.2), None)
        assert bool((trigger(x[:36]) < x[:36]).flatten(1).double().mean(1).gt(0.9).all())


def test_any_numbers_become_a_perturbation_within_the_ball():
    raw = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.01, 0.1, 1, 10, 100]
    ).view(-1, 1, 1, 1)
    wide = bounded(raw, Ball(INF, 0.1))
    assert float(wide.abs().max()) <= 0.1 + 1e-7
    assert torch.allclose(wide, 0.1 * raw.tanh())
    long = bounded(raw, Ball(2, 0.5)).flatten(1).norm(dim=1)
    assert bool((long <= 0.5 + 1e-6).all())
    length = raw.flatten(1).norm(dim=1)
    assert torch.allclose(long, 0.5 * length / (1 + length**2).sqrt())


@pytest.mark.parametrize("attack", [upset(), angri()], ids=["upset", "angri"])
def test_fitted_on_a_surrogate_it_asks_the_target_for_no_gradient(attack):
    x = grey(60)
    images = Images.of(x, linear(x).argmax(1))
    narrow, known = Target(linear, Access.LABELS, 3, SHAPE), Target(lambda x: 2 * linear(x), Access.GRADIENTS, 3, SHAPE)
    threat = ThreatModel(Access.LABELS, Ball(INF, 0.1), targeted=True)
    judged = Images.of(grey(20, 1), linear(grey(20, 1)).argmax(1))
    found = evade(
        attack, narrow, judged, threat, training=images, target_class=1, lens=lambda m, x, rng: Surrogate(m, known, x)
    )
    assert (found.setup_forward, found.setup_backward) == (0, 0)
    same = evade(attack, known, judged, replace(threat, access=Access.GRADIENTS), training=images, target_class=1)
    assert torch.equal(found.adv, same.adv)
    assert float(found.success[found.attacked].double().mean()) > 0.9
