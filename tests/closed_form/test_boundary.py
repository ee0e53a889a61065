"""The boundary attack on half-spaces, whose nearest points are known."""

from __future__ import annotations

import pytest
import torch
from test_query_attacks import fire, half_space, pixels

from besiege.attacks.blackbox.boundary import _followed, boundary
from besiege.core.rng import Stream
from besiege.core.threat import INF, Ball


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_it_reaches_the_boundary_of_a_half_space(memory):
    w, score, image = half_space((1, 7, 7))
    x = torch.cat([image(distance) for distance in (0.3, 0.6, 0.9)])
    starts = torch.where(w.view(1, 1, 7, 7) > 0, 0.0, 1.0).float()
    outcome, _ = fire(boundary(memory=memory), score, x, Ball(2, INF), queries=5000, starts=starts)
    true = score(x)
    assert bool(outcome.success.all())
    assert bool((outcome.distance.double() >= true - 1e-6).all())
    assert bool((outcome.distance.double() <= 1.1 * true).all())
    assert bool((outcome.forward <= 5000).all())


def test_a_move_stays_at_its_distance_and_a_step_shortens_it_by_its_share():
    x = torch.full((1, 6, 6), 0.5)
    start = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    walk = boundary(starts=0, source=0.1).method.function(
        x, Ball(2, INF), Stream(1), start=start, starts=0, source=0.1, moves=10
    )
    far, asked = float((start - x).norm()), next(walk)
    for _ in range(9):
        assert float((asked[0] - x).norm()) == pytest.approx(far, rel=1e-5)
        assert float((walk.send(torch.tensor([True]))[0] - x).norm()) == pytest.approx(0.9 * far, rel=1e-5)
        far, asked = 0.9 * far, walk.send(torch.tensor([True]))


def test_lengths_follow_the_share_of_successes():
    assert _followed(1.0, [True] * 11 + [False] * 9, 0.5, 0.2) == 1.5
    assert _followed(1.0, [True] * 10 + [False] * 10, 0.5, 0.2) == 1.0
    assert _followed(1.5, [True] * 3 + [False] * 17, 0.5, 0.2) == 1.0


def test_a_walk_ends_when_its_steps_have_vanished():
    x = pixels(1, (1, 5, 5))[0]
    function = boundary().method.function
    walk = function(x, Ball(2, INF), Stream(1), start=1 - x, starts=0, source=1e-7, least=1e-6)
    with pytest.raises(StopIteration):
        next(walk)
        walk.send(torch.tensor([False]))
