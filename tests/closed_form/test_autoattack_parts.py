"""APGD, APGD-T, FAB-T and AutoAttack against analytic distances and a scalar transcript of the paper."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from besiege.attacks.whitebox.apgd import apgd, checkpoints
from besiege.attacks.whitebox.apgd_t import apgd_t, rivals
from besiege.attacks.whitebox.autoattack import autoattack
from besiege.attacks.whitebox.fab_t import fab_t, to_plane
from besiege.core.images import Images
from besiege.core.meter import Meter
from besiege.core.method import Attack
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, ThreatModel
from besiege.engine.evasion import Outcome, evade
from besiege.engine.judge import judge

SHAPE = (2, 3, 4)
DUAL = {1: INF, 2: 2, INF: 1}


def linear(classes: int, *, shift: float = 0.0, seed: int = 0) -> tuple[Target, Images]:
    """A linear classifier and images in the middle of the box, so close to its planes that the box never binds."""
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, math.prod(SHAPE), generator=draws, dtype=torch.float64)
    x = 0.5 + 0.02 * torch.randn(2, *SHAPE, generator=draws, dtype=torch.float64)
    layer = nn.Linear(math.prod(SHAPE), classes, dtype=torch.float64)
    layer.weight.data, layer.bias.data = weight, shift - 0.5 * weight.sum(1)
    target = Target.of(nn.Sequential(nn.Flatten(), layer), classes=classes, shape=SHAPE)
    return target, Images.of(x, target.labels(x))


def needed(target: Target, images: Images, norm: float) -> Tensor:
    """(n, classes) the distance to every other class's plane, inf for the own."""
    assert isinstance(target.module, nn.Sequential)
    weight, scores = target.module[1].weight.detach(), target.scores(images.x)
    between = torch.linalg.vector_norm(weight[images.y][:, None] - weight, ord=DUAL[norm], dim=2)
    gap = scores.gather(1, images.y[:, None]) - scores
    return (gap / between).scatter(1, images.y[:, None], INF)


def siege(attack: Attack, target: Target, images: Images, norm: float, eps: float, **options: Any) -> Outcome:
    threat = ThreatModel(Access.GRADIENTS, Ball(norm, eps), targeted="target_class" in options)
    return evade(attack, target, images, threat, **options)


TWO = [(attack, 2, norm) for attack in (apgd(), apgd(loss="dlr"), apgd_t()) for norm in (1, 2, INF)]
MORE = [(a, 3, norm) for a in (apgd(loss="dlr"), apgd(loss="margin"), apgd_t()) for norm in (2, INF)]


@pytest.mark.parametrize(("attack", "classes", "norm"), [*TWO, *MORE, (apgd_t(), 6, 2), (apgd_t(), 6, INF)], ids=str)
def test_apgd_succeeds_just_beyond_the_analytic_distance_and_not_before(
    attack: Attack, classes: int, norm: float
) -> None:
    target, images = linear(classes)
    for row, distance in enumerate(needed(target, images, norm).amin(1).tolist()):
        one = images[row : row + 1]
        near, far = (siege(attack, target, one, norm, f * distance) for f in (0.95, 1.05))
        assert not bool(near.success.any())
        assert bool(judge(far, target, one).success.all())


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_fab_t_finds_the_analytic_minimum(classes: int, norm: float) -> None:
    target, images = linear(classes)
    outcome = siege(fab_t(steps=40), target, images, norm, INF)
    assert bool(judge(outcome, target, images).success.all())
    factor = outcome.distance / needed(target, images, norm).amin(1)
    assert float(factor.min()) >= 1 - 1e-9
    assert float(factor.max()) <= 1.02


@pytest.mark.parametrize("attack", [apgd(loss="margin"), apgd_t(), fab_t()], ids=str)
def test_a_class_to_reach_is_reached_at_its_own_distance(attack: Attack) -> None:
    target, images = linear(5)
    for row, (distance, nearest) in enumerate(
        zip(*(v.tolist() for v in needed(target, images, 2).min(1)), strict=True)
    ):
        one = images[row : row + 1]
        near, far = (siege(attack, target, one, 2, f * distance, target_class=nearest) for f in (0.95, 1.05))
        assert not bool((near.success & (near.distance <= distance)).any())
        assert bool(judge(far, target, one).success.all())


def test_apgd_t_aims_once_where_the_goal_names_a_class() -> None:
    target, images = linear(5)
    outcome = siege(apgd_t(steps=10), target, images, 2, 1e-6, target_class=3)
    assert set(outcome.forward[outcome.attacked].tolist()) == {11}


def test_rivals_are_the_highest_other_classes() -> None:
    target, images = linear(6)
    meter = Meter(target, images.x, Goal(images.y), Ball(2, 1.0))
    for count in (2, 5, 9):
        expected = [
            [c for c in row.argsort(descending=True).tolist() if c != own][:count]
            for row, own in zip(target.scores(images.x), images.y.tolist(), strict=True)
        ]
        assert rivals(meter, images.x, count).tolist() == expected


def small_net(shift: float = 0.0) -> tuple[Target, Images]:
    """A curved classifier in float64 on which the step length is halved at some checkpoints and kept at others."""
    draws = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    for weight in net.parameters():
        weight.data = torch.randn(weight.shape, generator=draws, dtype=torch.float64)
    net[3].bias.data += shift
    target = Target.of(net, classes=5, shape=SHAPE)
    x = torch.rand(8, *SHAPE, generator=draws, dtype=torch.float64)
    return target, Images.of(x, target.labels(x))


ALL = [apgd(restarts=2), apgd(loss="dlr"), apgd_t(steps=30), fab_t(steps=15), autoattack(steps=15, queries=50)]


@pytest.mark.parametrize("attack", ALL, ids=str)
@pytest.mark.parametrize("norm", [1, 2, INF])
def test_a_row_alone_equals_the_row_in_a_batch(attack: Attack, norm: float) -> None:
    if norm not in attack.card.norms:
        return
    target, images = small_net()
    eps = {1: 1.7, 2: 0.75, INF: 0.22}[norm]
    whole = siege(attack, target, images, norm, eps)
    assert 0 < int(whole.success.sum()) < len(images)
    for row in (0, 3, 7):
        alone = siege(attack, target, images[row : row + 1], norm, eps)
        assert torch.allclose(alone.adv[0], whole.adv[row], atol=1e-7)
        assert alone.forward.tolist() == whole.forward[row : row + 1].tolist()


@pytest.mark.parametrize("attack", ALL, ids=str)
def test_a_constant_on_all_logits_changes_nothing(attack: Attack) -> None:
    (plain, images), (shifted, _) = small_net(), small_net(shift=-100.0)
    one, two = (siege(attack, target, images, 2, 0.75) for target in (plain, shifted))
    assert torch.equal(one.success, two.success)
    assert torch.allclose(one.adv, two.adv, atol=1e-6)


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_apgd_takes_the_steps_of_algorithm_1(row: int, norm: float) -> None:
    target, images = small_net()
    one, eps, steps = images[row : row + 1], 0.3, 50
    ball, visited = Ball(norm, eps), []
    net = target.module
    assert net is not None
    handle = net.register_forward_pre_hook(lambda module, inputs: visited.append(inputs[0].detach()[0].clone()))
    meter = Meter(target, one.x, Goal(one.y), ball, seeks="optimum")
    apgd(steps=steps, loss="margin").bound()(meter, one.x, ball, Rng.of(0, one.index, "apgd"))
    handle.remove()
    first = ball.sample(one.x, Rng.of(0, one.index, "apgd"))[0]
    expected, lengths = algorithm_1(net, one.x[0], int(one.y[0]), first, ball, steps)
    assert len(set(lengths)) > 1
    assert len(visited) == len(expected) == steps + 1
    for k in range(steps + 1):
        assert torch.allclose(visited[k], expected[k], atol=1e-9), k


def algorithm_1(
    net: nn.Module, x: Tensor, label: int, first: Tensor, ball: Ball, steps: int
) -> tuple[list[Tensor], list[float]]:
    """Croce & Hein 2020, algorithm 1, for one image and the margin, which it maximises."""

    def f(z: Tensor) -> tuple[float, Tensor]:
        z = z.clone().requires_grad_()
        scores = net(z[None])[0]
        value = max(scores[c] for c in range(len(scores)) if c != label) - scores[label]
        (slope,) = torch.autograd.grad(value, z)
        return value.item(), slope

    def project(z: Tensor) -> Tensor:
        return ball.project(z[None], x[None])[0]

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [math.ceil(round(q * steps, 9)) for q in p]
    points, values = [first], [f(first)[0]]
    visited, lengths, eta = [first], [], 2 * float(ball.eps)
    best, f_max = first, values[0]
    best_at_check, eta_at_check = f_max, None
    for k in range(steps):
        slope = f(points[k])[1]
        unit = slope.sign() if ball.norm == INF else slope / slope.norm()
        z = project(points[k] + eta * unit)
        after = z if k == 0 else project(points[k] + 0.75 * (z - points[k]) + 0.25 * (points[k] - points[k - 1]))
        points.append(after)
        visited.append(after)
        values.append(f(after)[0])
        if values[-1] > f_max:
            best, f_max = after, values[-1]
        if k + 1 in w:
            j = w.index(k + 1)
            rises = sum(values[i + 1] > values[i] for i in range(w[j - 1], w[j]))
            lengths.append(eta)
            too_few = rises < 0.75 * (w[j] - w[j - 1])
            no_better = eta_at_check == eta and best_at_check == f_max
            best_at_check, eta_at_check = f_max, eta
            if too_few or no_better:
                eta /= 2
                points[-1], values[-1] = best, f_max
    return visited, lengths


def test_checkpoints_are_the_papers() -> None:
    assert [taken for taken, _ in checkpoints(100)] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [taken for taken, _ in checkpoints(1)] == [1]


@pytest.mark.parametrize("norm", [1, 2, INF])
def test_to_plane_is_the_shortest_step_inside_the_box(norm: float) -> None:
    draws = np.random.default_rng(0)
    x = draws.uniform(-0.3, 1.3, (40, 12)).clip(0, 1)
    slope = draws.normal(size=x.shape) * (draws.random(x.shape) > 0.2)
    gap = draws.normal(size=len(x)) * 1.5
    shape = (len(x), 1, 3, 4)
    step = to_plane(torch.tensor(x).view(shape), torch.tensor(slope).view(shape), torch.tensor(gap), norm)
    step = step.flatten(1).numpy()
    open_ = 0
    for i in range(len(x)):
        assert ((x[i] + step[i] >= -1e-12) & (x[i] + step[i] <= 1 + 1e-12)).all()
        most = np.where(-gap[i] * slope[i] > 0, 1 - x[i], -x[i]) * (slope[i] != 0)
        if abs(slope[i] @ most) <= abs(gap[i]):
            assert np.allclose(step[i], most)
            continue
        open_ += 1
        assert math.isclose(slope[i] @ step[i], -gap[i], rel_tol=1e-4)
        assert math.isclose(np.linalg.norm(step[i], norm), shortest(x[i], slope[i], gap[i], norm), rel_tol=1e-4)
    assert 10 < open_ < 40


def shortest(x: np.ndarray, slope: np.ndarray, gap: float, norm: float) -> float:
    """The length of that step: by linear programming, in norm 2 by bisection on the multiplier."""
    d = len(x)
    if norm == 2:
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            step = np.clip(-np.sign(gap) * middle * slope, -x, 1 - x)
            low, high = (low, middle) if abs(slope @ step) >= abs(gap) else (middle, high)
        return float(np.linalg.norm(step))
    bounds = [(-x[i], 1 - x[i]) for i in range(d)]
    if norm == INF:
        cost = np.append(np.zeros(d), 1.0)
        above = np.block([[np.eye(d), -np.ones((d, 1))], [-np.eye(d), -np.ones((d, 1))]])
        extra: list[tuple[float, float | None]] = [(0, None)]
    else:
        cost = np.append(np.zeros(d), np.ones(d))
        above = np.block([[np.eye(d), -np.eye(d)], [-np.eye(d), -np.eye(d)]])
        extra = [(0, None)] * d
    equal = np.append(slope, np.zeros(len(extra)))[None]
    found = linprog(cost, above, np.zeros(2 * d), equal, [-gap], bounds + extra)
    return float(found.fun)
