"""ZOO: its coordinates, the slopes it measures, its ADAM, and what it finds on models whose answer is known."""

from __future__ import annotations

import pytest
import torch
from test_query_attacks import fire, half_space, pixels
from torch import nn

from besiege.attacks.blackbox.zoo import Adam, Grid, Probes, _chosen, probed, zoo
from besiege.core.meter import Meter
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal

PAPER = {"basis": "pixel", "importance": False, "opening": 0, "decay": 1.0, "lr": 0.01, "h": 1e-4}


def smooth(shape, seed=0):
    """A network without a kink, in float32, and its meter for three images."""
    torch.manual_seed(seed)
    d = shape[0] * shape[1] * shape[2]
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, 24), nn.Tanh(), nn.Linear(24, 4)).requires_grad_(False)
    x = pixels(3, shape) * 0.6 + 0.2
    target = Target.of(model, classes=4, shape=shape)
    return Meter(target, x, Goal(model(x).argmax(1)), Ball(2, INF), seeks="minimum"), x


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4), (2, 1, 6)])
def test_the_coordinates_are_orthonormal(basis, shape):
    grid = Grid.of(pixels(1, shape).double(), basis, 3)
    assert grid.count == shape[0] * (shape[1] * shape[2] if basis == "pixel" else min(3, shape[1]) * min(3, shape[2]))
    every = grid.direction(torch.arange(grid.count)).flatten(1)
    assert torch.allclose(every @ every.T, torch.eye(grid.count).double(), atol=1e-6)
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    parts = grid.parts(image)
    assert torch.allclose(parts, image.flatten(1) @ every.T)
    index = torch.arange(grid.count).expand(2, -1).flip(1)
    assert torch.allclose(grid.image(index, parts.flip(1)).flatten(1), parts @ every)


def test_the_lowest_frequencies_are_those_that_stay_under_an_average():
    """The block of one frequency holds the means; that of two tells left from right, and that is all."""
    means = Grid.of(pixels(1, (3, 6, 6)), "dct", 1).direction(torch.arange(3))
    assert torch.allclose(means, torch.eye(3)[:, :, None, None].expand(-1, -1, 6, 6) / 6)
    turns = Grid.of(pixels(1, (1, 6, 6)), "dct", 2).direction(torch.tensor([1]))[0, 0, 0].sign().diff()
    assert int((turns != 0).sum()) == 1


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_the_slopes_measured_in_float32_are_those_of_autograd(basis, loss):
    meter, x = smooth((2, 6, 6))
    grid = Grid.of(x, basis, 6)
    value, grad = Probes(meter, grid, 0.05).gradient(x, loss)
    known, slope = meter.gradient(x, loss)
    assert torch.equal(value, known)
    assert float(torch.cosine_similarity(grad.flatten(1), slope.flatten(1)).min()) > 0.999
    assert torch.allclose(grad.flatten(1).norm(dim=1), slope.flatten(1).norm(dim=1), rtol=0.01)
    part = Grid.of(x, "dct", 3)
    _, low = Probes(meter, part, 0.05).gradient(x, loss)
    every = torch.arange(part.count).expand(3, -1)
    assert torch.allclose(low, part.image(every, part.parts(slope)), atol=0.01 * float(slope.abs().max()))


def test_a_measured_gradient_costs_two_queries_a_coordinate_and_stays_in_the_box():
    meter, x = smooth((1, 4, 4))
    x = x.round()
    asked = []
    call = meter.target.call
    meter.target = Target(lambda z: (asked.append(z), call(z))[1], Access.SCORES, 4, (1, 4, 4), batch=64)
    grid = Grid.of(x, "dct", 3)
    up, down = probed(meter, x, grid, torch.tensor([[0, 4, 8]] * 3), 0.05, torch.arange(3))
    assert up.shape == down.shape == (3, 3)
    assert meter.forward.tolist() == [6] * 3
    assert torch.equal(asked[2], (x + 0.05 * grid.direction(torch.tensor([4] * 3))).clamp(0, 1))
    assert torch.equal(asked[3], (x - 0.05 * grid.direction(torch.tensor([4] * 3))).clamp(0, 1))


def test_each_coordinate_counts_its_own_steps():
    """Against Kingma & Ba's formulas, a coordinate at a time."""
    g = torch.Generator().manual_seed(0)
    adam, slow = Adam(torch.zeros(2, 6)), [[(0.0, 0.0, 0)] * 6 for _ in range(2)]
    for _ in range(30):
        at = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(2)])
        grad = torch.randn(2, 3, generator=g)
        move = adam.step(at, grad)
        for i in range(2):
            for j, slope, found in zip(at[i].tolist(), grad[i].tolist(), move[i].tolist(), strict=True):
                mean, square, taken = slow[i][j]
                mean, square, taken = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2, taken + 1
                slow[i][j] = mean, square, taken
                expected = mean / (1 - 0.9**taken) / ((square / (1 - 0.999**taken)) ** 0.5 + 1e-8)
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert adam.taken.tolist() == [[taken for _, _, taken in row] for row in slow]
    assert len(set(adam.taken.flatten().tolist())) > 2


def test_coordinates_are_chosen_once_each_and_by_how_much_they_changed():
    away = torch.zeros(400, 10)
    away[:, 3] = -1.0
    rng = Rng.of(0, torch.arange(400), "zoo")
    for importance in (True, False):
        assert bool((_chosen(away, rng, 4, importance).sort(1).values.diff(dim=1) > 0).all())
        assert torch.equal(_chosen(away, rng, 10, importance), torch.arange(10).expand(400, -1))
    # weights 1.1 for the one that has changed, 0.1 for each of nine
    assert float((_chosen(away, rng, 1, True) == 3).float().mean()) == pytest.approx(1.1 / 2, abs=0.07)
    assert float((_chosen(away, rng, 1, False) == 3).float().mean()) == pytest.approx(0.1, abs=0.05)


def test_the_norm_on_a_linear_model_is_the_least():
    """The default, and what the paper does; half a pixel's box is never felt."""
    _, score, image = half_space((1, 4, 4))
    x = torch.cat([image(0.2), image(0.4)])
    for attack, most in (
        (zoo(coordinates=6), 1.03),
        (zoo(**PAPER, iterations=40, searches=4, first_c=0.1), 1.15),
        (zoo(**{**PAPER, "lr": 0.3, "h": 0.05}, iterations=20, searches=4, first_c=0.1, solver="newton"), 1.15),
    ):
        outcome, _ = fire(attack, score, x, Ball(2, INF))
        assert bool(outcome.success.all())
        least = outcome.distance / torch.tensor([0.2, 0.4])
        assert float(least.min()) >= 1 - 1e-4
        assert float(least.max()) <= most


def test_the_paper_asks_twice_a_coordinate_and_once_an_iteration():
    x = pixels(2, (1, 6, 6))
    attack = zoo(**PAPER, iterations=5, searches=3, coordinates=7)
    outcome, model = fire(attack, lambda z: 5 + z.double().sum((1, 2, 3)), x, Ball(2, INF))
    assert outcome.forward.tolist() == [3 * 5 * (2 * 7 + 1)] * 2
    first, tried = model.asked[0], torch.stack(model.asked[1:15])
    assert torch.equal(first, x)
    assert bool((((tried - x) != 0).flatten(2).sum(2) <= 1).all())
    assert float((tried - x).abs().max()) == pytest.approx(1e-4, rel=1e-2)
