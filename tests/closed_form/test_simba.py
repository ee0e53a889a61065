"""SimBA: its bases and its queries, on models whose answer is known."""

from __future__ import annotations

import pytest
import torch
from test_query_attacks import fire, pixels

from besiege.attacks.blackbox.simba import _direction, _order, simba
from besiege.core.rng import Rng
from besiege.core.threat import Ball


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4), (2, 1, 6)])
def test_the_bases_are_orthonormal(basis, shape):
    x = pixels(1, shape)
    d = x.numel()
    every = _direction(x.double(), torch.arange(d), basis).flatten(1)
    assert torch.allclose(every @ every.T, torch.eye(d).double(), atol=1e-6)


def test_every_direction_comes_once_and_low_frequencies_first():
    x, rng = pixels(2, (1, 16, 16)), Rng.of(0, torch.arange(2), "simba")
    for basis in ("pixel", "dct"):
        assert torch.equal(_order(x, rng, basis).sort(1).values, torch.arange(256).expand(2, -1))
    first = _order(x, rng, "dct")[:, :4]
    assert torch.equal(first.sort(1).values, torch.tensor([0, 1, 16, 17]).expand(2, -1))


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_each_step_is_one_direction_and_only_improvements_stay(basis):
    """On a plane that never falls: one query where the first way helps, two where the second does or neither."""
    x = torch.full((1, 1, 4, 4), 0.5)
    slope = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attack = simba(iterations=16, step=0.01, basis=basis, again=False)
    outcome, model = fire(attack, lambda z: 5 + (z.double().flatten(1) - 0.5) @ slope, x, Ball(2, 1.0))
    asked = torch.cat(model.asked).flatten(1)
    best, value = asked[0], asked[0].double() @ slope
    for tried in asked[1:]:
        assert float((tried - best).norm()) == pytest.approx(0.01, rel=1e-3)
        if tried.double() @ slope < value:
            best, value = tried, tried.double() @ slope
    assert 17 <= int(outcome.forward) == len(asked) <= 33
    assert float((best - x.flatten()).norm()) <= 0.01 * 4 + 1e-6
