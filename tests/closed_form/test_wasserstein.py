"""The Wasserstein ball against Python Optimal Transport and against programs that are slow and plain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from besiege.core.errors import BadInput, BadOutcome
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import Access, ThreatModel
from besiege.engine.evasion import evade
from besiege.engine.judge import judge
from besiege.regions import Wasserstein, parse, within
from besiege.regions.wasserstein import _omega


def pixels(n, shape, seed=0, zeros=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=g)
    return x * (torch.rand(x.shape, generator=g) >= zeros)


def ways(h, w):
    at = np.array([(i, j) for i in range(h) for j in range(w)], dtype=float)
    return at, ot.dist(at, at, metric="sqeuclidean")


def test_a_region_is_a_threat_by_its_text():
    ball = parse("wasserstein:1/10")
    assert str(ball) == "wasserstein:0.1"
    assert isinstance(ball, Wasserstein)
    assert isinstance(within("wasserstein", 0.1).sized(0.2), Wasserstein)
    assert str(parse("linf:8/255")) == str(within(float("inf"), 8 / 255))
    with pytest.raises(BadInput, match="above 0"):
        parse("wasserstein:0")
    with pytest.raises(BadInput, match="odd"):
        Wasserstein(0.1, kernel=4)


def test_one_pixel_that_moves_costs_its_share_times_the_squared_way():
    x = torch.zeros(1, 2, 7, 7)
    x[0, 0, 3, 3], x[0, 1, 1, 1], x[0, 1, 5, 5] = 0.5, 0.25, 0.25
    adv = x.clone()
    adv[0, 0, 3, 3], adv[0, 0, 4, 5] = 0.3, 0.2
    assert Wasserstein(1.0).distance(adv, x).item() == pytest.approx(0.2 * (1 + 4), rel=1e-5)
    assert bool(Wasserstein(0.99).holds(adv, x))
    assert not bool(Wasserstein(0.97).holds(adv, x))
    assert not bool(Wasserstein(9.0).holds(adv * 0.999, x))


@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_the_distance_is_that_of_python_optimal_transport(zeros):
    x, adv = pixels(4, (2, 5, 4), 1, zeros), pixels(4, (2, 5, 4), 2, zeros)
    adv = adv * (x.sum((2, 3), keepdim=True) / adv.sum((2, 3), keepdim=True))
    _, cost = ways(5, 4)
    for row, found in enumerate(Wasserstein(1.0, kernel=9).distance(adv, x)):
        a, b = (image[row].double().flatten(1).numpy() for image in (x, adv))
        exact = sum(ot.emd2(p, q * (p.sum() / q.sum()), cost) for p, q in zip(a, b, strict=True)) / a.sum()
        assert float(found) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_the_projection_is_the_nearest_point_of_a_general_solver(zeros):
    x, wanted = pixels(1, (1, 3, 3), 3, zeros).double(), pixels(1, (1, 3, 3), 4).double() * 1.5
    a, w, (_, cost) = x.flatten().numpy(), wanted.flatten().numpy(), ways(3, 3)
    eps = 0.2
    found = Wasserstein(eps).approach(wanted, x, strength=100.0, sweeps=2000)[0]
    rows = [{"type": "eq", "fun": lambda p: p.reshape(9, 9).sum(1) - a}]
    more = [
        {"type": "ineq", "fun": lambda p: eps * a.sum() - (p.reshape(9, 9) * cost).sum()},
        {"type": "ineq", "fun": lambda p: 1 - p.reshape(9, 9).sum(0)},
    ]
    solved = minimize(
        lambda p: ((p.reshape(9, 9).sum(0) - w) ** 2).sum(),
        np.diag(a).flatten(),
        jac=lambda p: np.tile(2 * (p.reshape(9, 9).sum(0) - w), 9),
        bounds=[(0, 1)] * 81,
        constraints=rows + more,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert solved.success
    assert float((found - wanted).square().sum()) == pytest.approx(solved.fun, rel=0.01)


@pytest.mark.parametrize("strength", [0.3, 30.0, 1e4])
@pytest.mark.parametrize("sweeps", [1, 7, 60])
def test_a_projected_image_lies_in_the_ball_converged_or_not(strength, sweeps):
    x = pixels(6, (2, 8, 8), 5, 0.8)
    x[1], x[2], x[3, 0] = 1.0, 0.0, 0.0
    x[4] = (x[4] > 0).float()
    wanted = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    ball = Wasserstein(0.3)
    found = ball.approach(wanted, x, strength=strength, sweeps=sweeps)[0]
    assert bool(ball.holds(found, x).all())
    assert bool((ball.distance(found, x) <= 0.3 * (1 + 1e-4)).all())
    assert torch.allclose(found.sum((2, 3)), x.sum((2, 3)), rtol=1e-5)
    assert torch.equal(found[2], x[2])
    assert torch.allclose(found[1], x[1], atol=2e-4)
    assert float(found[0].sub(x[0]).abs().max()) > 0.01


def test_entropy_keeps_an_image_inside_the_ball_and_less_of_it_lets_it_out():
    x = pixels(3, (1, 8, 8), 7)
    wanted = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    ball = Wasserstein(0.3)
    cost = [ball.distance(ball.approach(wanted, x, strength=s, sweeps=300)[0], x).mean() for s in (0.1, 3.0, 300.0)]
    assert cost[0] < cost[1] < cost[2]
    assert cost[2] > 0.27


def test_what_is_in_the_ball_stays_where_it_is():
    x, ball = pixels(3, (1, 6, 6)), Wasserstein(0.2)
    near = ball.sample(x, Rng.of(0, torch.arange(3), "here"))
    assert torch.equal(ball.project(near, x), near)


def test_the_farthest_point_is_that_of_a_linear_program():
    x, slope = pixels(2, (1, 3, 3), 9) * 0.1, pixels(2, (1, 3, 3), 10) - 0.5
    _, cost = ways(3, 3)
    from scipy.optimize import linprog

    reached = (Wasserstein(0.4).farthest(x, slope) * slope).sum((1, 2, 3))
    for row in range(2):
        a, s = x[row].double().flatten().numpy(), slope[row].double().flatten().numpy()
        solved = linprog(
            -np.tile(s, 9), A_ub=cost.reshape(1, -1), b_ub=0.4 * a.sum(), A_eq=np.kron(np.eye(9), np.ones(9)), b_eq=a
        )
        assert float(reached[row]) == pytest.approx(-solved.fun, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lamberts_function_of_an_exponential_neither_overflows_nor_vanishes(dtype):
    v = torch.cat([torch.linspace(-50, 1000, 4001), torch.tensor([1e4, 1e6])]).to(dtype)
    y = _omega(v)
    assert torch.allclose(y + y.log(), v, rtol=1e-5, atol=1e-5)
    assert float(_omega(torch.tensor(-1e30, dtype=dtype))) == 0


def victim():
    g, model = torch.Generator().manual_seed(11), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model[1].weight.data, model[1].bias.data = torch.randn(3, 64, generator=g), torch.zeros(3)
    target = Target.of(model.eval().requires_grad_(False), classes=3, shape=(1, 8, 8), name="toy")
    x = pixels(6, (1, 8, 8), 12)
    return target, Images.of(x, target.labels(x))


@pytest.mark.parametrize(
    "options", [{}, {"warm": False, "sweeps": 30}, {"growth": 4.0}, {"window": 3}, {"direction": "linf"}], ids=str
)
def test_the_judge_measures_what_the_attack_claims(options):
    target, images = victim()
    threat = ThreatModel(Access.GRADIENTS, within("wasserstein", 0.3))
    outcome = evade(make("wasserstein", steps=40, **options), target, images, threat)
    verdict = judge(outcome, target, images)
    assert verdict.success.tolist() == [True] * 6
    assert torch.allclose(verdict.distance, outcome.distance.double(), rtol=1e-4)
    assert not bool(verdict.noise.all())


def test_the_judge_refuses_what_no_moves_explain():
    target, images = victim()
    threat = ThreatModel(Access.GRADIENTS, within("wasserstein", 0.3))
    honest = evade(make("wasserstein", steps=40), target, images, threat)
    darker = replace(honest, adv=honest.adv * 0.999)
    wider = replace(honest, adv=images.x.flip(3))
    tighter = replace(honest, threat=replace(threat, ball=within("wasserstein", float(honest.distance.max()) * 0.97)))
    for wrong in (darker, wider, tighter):
        with pytest.raises(BadOutcome, match="beyond eps"):
            judge(wrong, target, images)


def test_a_radius_that_grows_finds_a_nearer_image():
    target, images = victim()
    threat = ThreatModel(Access.GRADIENTS, within("wasserstein", 1.0))
    fixed, grown = (evade(make("wasserstein", steps=200, growth=g), target, images, threat) for g in (1.0, 1.3))
    assert bool((fixed.success & grown.success).all())
    assert float(grown.distance.mean()) < float(fixed.distance.mean())
    with pytest.raises(BadInput, match="growth"):
        evade(make("wasserstein", growth=0.5), target, images, threat)
