"""The boundary attack on half-spaces, whose nearest points are known."""

from __future__ import annotations

import pytest
import torch
from test_query_attacks import fire, half_space, pixels

from besiege.attacks.blackbox.boundary import _followed, boundary
from besiege.core.rng import Rng
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


class Saying:
    """Answers in turn what it is told to, and keeps what it was asked."""

    def __init__(self, *turns: bool) -> None:
        self.turns, self.asked = turns, []

    def is_adversarial(self, x, rows=None):
        self.asked.append(x)
        return torch.full((len(x),), self.turns[(len(self.asked) - 1) % len(self.turns)])

    def live(self, *state):
        return state


def walk(oracle, x, start, **options):
    function = boundary().method.function
    function(oracle, x, Ball(2, INF), Rng.of(1, torch.arange(len(x)), "boundary"), start=start, starts=0, **options)
    return [(tried - x).flatten(1).norm(dim=1) for tried in oracle.asked]


def test_a_move_stays_at_its_distance_and_a_step_shortens_it_by_its_share():
    x = torch.full((2, 1, 6, 6), 0.5)
    start = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    lengths = walk(Saying(True), x, start, source=0.1, moves=10)
    far = (start - x).flatten(1).norm(dim=1)
    assert len(lengths) == 20
    for k, length in enumerate(lengths):
        assert length.tolist() == pytest.approx((far * 0.9 ** ((k + 1) // 2)).tolist(), rel=1e-5)


def test_a_walk_stays_where_no_step_succeeds_and_ends_when_its_steps_have_vanished():
    x = pixels(1, (1, 5, 5))
    lengths = walk(Saying(True, False), x, 1 - x, source=0.9e-3, least=5e-4, spherical=1e-3)
    assert len(lengths) == 2 * 2 * 20
    assert walk(Saying(False), x, 1 - x, source=1e-7, least=1e-6) == []


def test_lengths_follow_the_share_of_successes():
    found = _followed(torch.tensor([1.0, 1.0, 1.5]), torch.tensor([11, 10, 3]), 0.5, 0.2)
    assert found.tolist() == [1.5, 1.0, 1.0]
