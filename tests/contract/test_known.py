"""Models on which the answer is known beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn
from toys import (
    CARDS,
    CHANNELS,
    EPS,
    POSES,
    Linear,
    Toy,
    cases,
    curved,
    differences,
    fire,
    flat,
    generator,
    posed,
    quick,
    shape_for,
    sure,
    target_of,
)

from besiege.core.images import Images
from besiege.core.rng import Rng
from besiege.core.threat import INF, Access, Norm
from besiege.engine.judge import judge
from besiege.regions import within

FACTOR = {Access.GRADIENTS: 1.25, Access.SCORES: 2.0, Access.LABELS: 2.0}
"""How much longer than the least a minimum may be, by what the method sees."""

ENOUGH = {Access.GRADIENTS: 1.5, Access.SCORES: 2.0, Access.LABELS: 3.0}
"""At how many times the least radius every image must fall; among the few poses of an image it is not far off."""


def ample(name: str, norm: Norm) -> float:
    """How many times the least radius is enough for the method."""
    return 1.2 if norm == "spatial" else ENOUGH[CARDS[name].access]


THOROUGH = {"steps": 80, "iterations": 400, "queries": 400, "searches": 5, "trials": 1000, "epochs": 20}


def thorough(name):
    options = CARDS[name].options
    return quick(name, **{k: v for k, v in THOROUGH.items() if k in options and options[k].annotation is int})


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("name", "norm"), cases(lambda card: card.seeks == "minimum"))
def test_the_minimum_on_a_linear_model(name, norm, classes):
    toy = flat(classes, channels=CHANNELS.get(norm, 1))
    least = toy.needed(norm)
    outcome = fire(name, norm, toy, attack=thorough(name), queries=2000)
    assert bool(outcome.success.all())
    assert bool((outcome.distance.double() >= least * (1 - 1e-5) - 1e-6).all())
    slack = 2 if norm == 0 else 0
    assert bool((outcome.distance.double() <= least * FACTOR[CARDS[name].access] + slack).all())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("name", "norm"), cases(lambda card: card.seeks == "success" and sure(card)))
def test_success_on_a_linear_model_from_the_needed_radius_on(name, norm, classes):
    toy = flat(classes, channels=CHANNELS.get(norm, 1))
    least = toy.needed(norm)
    enough = float(least.max()) * ample(name, norm)
    assert bool(fire(name, norm, toy, eps=enough, attack=thorough(name), queries=1500).success.all())
    short = float(least.min()) * 0.95
    assert not bool(fire(name, norm, toy, eps=short).success.any())


@pytest.mark.parametrize(("name", "norm"), cases(lambda card: card.targeted and sure(card)))
def test_a_class_of_choice_on_a_linear_model(name, norm):
    card = CARDS[name]
    toy = flat(3, channels=CHANNELS.get(norm, 1))
    least = toy.needed(norm, goal=2)
    if card.seeks == "minimum":
        outcome = fire(name, norm, toy, target_class=2, attack=thorough(name), starts=toy.starts(), queries=2000)
        slack = 2 if norm == 0 else 0
        assert bool((outcome.distance.double() <= least * FACTOR[card.access] * 1.1 + slack).all())
    else:
        eps = float(least.max()) * ample(name, norm) * 1.2
        outcome = fire(name, norm, toy, eps=eps, target_class=2, attack=thorough(name), queries=1500)
    assert bool(outcome.success.all())
    assert toy.target().labels(outcome.adv).tolist() == [2] * len(toy.images)


@pytest.mark.parametrize(("name", "norm"), cases(sure))
def test_pixels_at_zero_and_one_can_move(name, norm):
    toy = flat(2, saturated=True, channels=CHANNELS.get(norm, 1))
    x, least = toy.images.x, toy.needed(norm)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    card = CARDS[name]
    eps = None if card.seeks == "minimum" else 1.2 * ample(name, norm) * float(least.max())
    outcome = fire(name, norm, toy, eps=eps, attack=thorough(name), queries=2000)
    assert bool(outcome.success.all())
    if card.seeks == "minimum":
        slack = 2 if norm == 0 else 0
        assert bool((outcome.distance.double() <= 1.1 * FACTOR[card.access] * least + slack).all())


def planted(norm: Norm, seed: int) -> tuple[Toy, float]:
    """A network whose last layer is fitted so that one point of the ball is misclassified, and many others are not.

    The test of Zimmermann et al. 2022 (arXiv:2206.13991): where an adversarial example surely exists, an attack
    that finds none is broken.
    """
    base = curved(shape_for(norm), classes=2)
    eps = 2 * EPS[norm] if norm else 3.0
    ball = within(norm, eps)
    g = generator(seed)
    x = torch.rand(1, *base.shape, generator=g) * 0.6 + 0.2
    many = x.expand(200, -1, -1, -1)
    inner = ball.sized(0.6 * eps).sample(many, Rng.of(seed, torch.arange(200), "inner"))
    secret = ball.farthest(x, torch.randn(x.shape, generator=g))
    features = base.model[:2]
    with torch.no_grad():
        inside, outside = features(torch.cat([x, inner]).double()), features(secret.double())
        centre = inside.mean(0)
        spread = torch.cov(inside.T) + 1e-3 * torch.eye(inside.shape[1], dtype=torch.float64)
        way = torch.linalg.solve(spread, (outside[0] - centre))
        high, reached = float((inside @ way).max()), float(outside[0] @ way)
        assert reached > high
        bias = -(high + 0.5 * (reached - high))
        scale = 4 / (reached - high)
        weight = torch.stack([-way, way]) * scale / 2
        readout = Linear(weight, torch.tensor([-bias, bias], dtype=torch.float64) * scale / 2)
    model = nn.Sequential(*features, readout).requires_grad_(False)
    images = Images.of(x, torch.zeros(1, dtype=torch.int64))
    assert model(secret.double()).argmax(1).item() == 1
    assert model(torch.cat([x, inner]).double()).argmax(1).sum() == 0
    fitted = Images.of(torch.cat([x, inner[:39]]), torch.zeros(40, dtype=torch.int64))
    return Toy(model, images, fitted, base.shape, 2), eps


@pytest.mark.parametrize(("name", "norm"), cases(sure))
def test_an_example_that_surely_exists_is_found(name, norm):
    won = 0
    for seed in range(3):
        toy, eps = planted(norm, seed)
        budget = 2000 if CARDS[name].access == Access.LABELS else 1500
        outcome = fire(name, norm, toy, eps=eps, attack=thorough(name), queries=budget)
        won += int(judge(outcome, toy.target(), toy.images).success.sum())
    assert won == 3


@pytest.mark.parametrize(("name", "norm"), cases(sure))
def test_an_image_without_a_way_out_does_not_hold_up_the_others(name, norm):
    toy = flat(2, channels=CHANNELS.get(norm, 1))
    eps = 1.2 * ample(name, norm) * float(toy.needed(norm).max())
    x = torch.cat([stuck(toy, norm, eps), toy.images.x])
    images = Images.of(x, torch.zeros(len(x), dtype=torch.int64))
    outcome = fire(name, norm, toy, images, eps=eps, attack=thorough(name), queries=2000)
    assert outcome.success.tolist() == [False, *[True] * len(toy.images)]
    others = fire(name, norm, toy, images[1:], eps=eps, attack=thorough(name), queries=2000)
    assert differences(others, outcome, slice(1, None)) == []


def stuck(toy, norm, eps):
    """An image as deep in class 0 as the box allows; in a region one without room for its changes."""
    if norm == "wasserstein":
        return torch.ones(1, *toy.shape)
    if norm == "color":
        weight = toy.model.weight.view(2, *toy.shape).sum(1)
        return (weight[0] > weight[1]).float().expand(1, *toy.shape).clone()
    if norm == "spatial":
        weight, bias = ((part[0] - part[1]).numpy() for part in (toy.model.weight, toy.model.bias))
        pixels = torch.eye(weight.size).view(-1, *toy.shape)
        margins = np.stack([posed(x, POSES * eps).reshape(len(POSES), -1) @ weight for x in pixels], 1)
        solved = linprog(
            np.append(np.zeros(weight.size), -1.0),
            A_ub=np.hstack([-margins, np.ones((len(POSES), 1))]),
            b_ub=np.full(len(POSES), bias),
            bounds=[(0, 1)] * weight.size + [(0.5, None)],
        )
        return torch.from_numpy(solved.x[:-1]).float().view(1, *toy.shape)
    deep = toy.model.weight[0] > toy.model.weight[1]
    return deep.view(1, *toy.shape).float()


@pytest.mark.parametrize(("name", "norm"), cases())
def test_where_there_is_no_way_out_at_all_nothing_is_claimed(name, norm):
    toy = curved(shape_for(norm))
    target = target_of(lambda x: toy.model(x) * 1e-3 + torch.tensor([9.0, 0, 0]).double(), toy.shape, 3)
    images = replace(toy.images, y=torch.zeros_like(toy.images.y))
    outcome = fire(name, norm, toy, images, target=target)
    assert not bool(outcome.success.any())
    assert torch.equal(outcome.adv, images.x)
    assert bool(outcome.distance.isinf().all())
    assert outcome.needed.tolist() == [-1] * len(images)


SILENT = {
    "flat": lambda x: (x * 0).flatten(1)[:, :3] + torch.tensor([0.2, 0.1, 0.0]).double(),
    "rounding": lambda x: x.flatten(1)[:, :3].round() * 1e-3 + torch.tensor([0.2, 0.1, 0.0]).double(),
    "not a number": lambda x: (x - x.detach()).flatten(1)[:, :3].abs().sqrt() + torch.tensor([0.2, 0.1, 0.0]).double(),
}


@pytest.mark.parametrize("silent", SILENT)
@pytest.mark.parametrize(("name", "norm"), cases())
def test_gradients_that_say_nothing_do_no_harm(name, norm, silent):
    toy = curved(shape_for(norm), n=3)
    images = replace(toy.images, y=torch.zeros_like(toy.images.y))
    outcome = fire(name, norm, toy, images, target=target_of(SILENT[silent], toy.shape, 3))
    assert not bool(outcome.success.any())
    assert torch.equal(outcome.adv, images.x)


@pytest.mark.parametrize(("name", "norm"), cases())
def test_a_constant_added_to_all_logits_changes_nothing(name, norm):
    toy = curved(shape_for(norm), images=torch.float64)
    plain = fire(name, norm, toy)
    for constant in (-128.0, 128.0):
        moved = fire(name, norm, toy, model=lambda x, constant=constant: toy.model(x) + constant)
        assert torch.equal(moved.success, plain.success)
        assert torch.allclose(moved.distance, plain.distance, rtol=1e-4)


@pytest.mark.parametrize("saturated", [False, True])
def test_the_radii_that_the_toys_claim_are_those_of_a_linear_program(saturated):
    toy = flat(2, saturated=saturated)
    weight, bias = toy.model.parameters()
    slope = (weight[1] - weight[0]).numpy()
    for x, far, near in zip(toy.images.x.double(), toy.needed(INF), toy.needed(1), strict=True):
        start = x.flatten().numpy()
        gap = -float(slope @ start + bias[1] - bias[0])
        # up and down apart, and one more number that is above them all: the radius
        both = np.concatenate([slope, -slope, [0]])
        room = [*((0, v) for v in 1 - start), *((0, v) for v in start), (0, None)]
        above = np.hstack([np.eye(72), -np.ones((72, 1))])
        sup = linprog([0] * 72 + [1], np.vstack([-both, above]), [-gap, *[0] * 72], bounds=room)
        total = linprog([1] * 72 + [0], -both[None], [-gap], bounds=room)
        assert float(far) == pytest.approx(sup.fun, rel=1e-6)
        assert float(near) == pytest.approx(total.fun, rel=1e-6)
