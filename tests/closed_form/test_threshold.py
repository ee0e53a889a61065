"""The threshold attack: what it asks about, and what it finds where the answer is known."""

from __future__ import annotations

import pytest
import torch
from test_query_attacks import fire, half_space, pixels

from besiege.attacks.blackbox.threshold import _squares, threshold
from besiege.core.rng import Rng
from besiege.core.threat import INF, Ball


def test_the_first_candidates_are_squares_of_two_values():
    genes = _squares(pixels(2, (3, 9, 8)), Rng.of(0, torch.arange(2), "threshold"), 6).view(2, 6, 3, 9, 8)
    assert set(genes.unique().tolist()) == {0.0, 1.0}
    for k, side in enumerate((1, 2, 4, 1, 2, 4)):
        blocks = genes[:, k, :, : 8 // side * side].unfold(2, side, side).unfold(3, side, side).flatten(4)
        assert torch.equal(blocks.amin(4), blocks.amax(4))
    assert not torch.equal(genes[0], genes[1])


CASES = [
    {},
    {"blocks": False},
    {"strategy": "de", "population": 100},
    {"strategy": "de", "population": 400, "best": False, "blocks": False},
]


@pytest.mark.parametrize("options", CASES)
def test_it_crosses_a_half_space_within_twice_the_least_radius_and_asks_only_about_the_ball(options):
    w, score, image = half_space((1, 5, 5))
    x = torch.cat([image(distance) for distance in (0.3, 0.31)])
    least = float(score(x).max() / w.abs().sum())
    attack, ball = threshold(iterations=60, **options), Ball(INF, 2 * least)
    outcome, model = fire(attack, score, x, ball)
    assert bool(outcome.success.all())
    asked = torch.cat(model.asked)[:, None]
    assert float((asked - x).abs().flatten(2).amax(2).amin(1).max()) <= 2 * least + 1e-6
    short, _ = fire(threshold(iterations=5), score, x, Ball(INF, 0.9 * least))
    assert not bool(short.success.any())


def test_cma_es_moves_whole_squares_or_single_values():
    x = pixels(1, (2, 20, 17)) * 0.5 + 0.25
    for blocks in (True, False):
        attack = threshold(iterations=3, blocks=blocks)
        _, model = fire(attack, lambda z: 1 + 0 * z.double().flatten(1).sum(1), x, Ball(INF, 0.1))
        moved = torch.cat(model.asked) - x
        assert float(moved.abs().amax()) <= 0.1 + 1e-6
        squares = moved[..., :16].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        same = float((squares.amax(4) - squares.amin(4) < 1e-6).double().mean())
        assert same == 1 if blocks else same < 0.1
        # the deviation is eps in squares, of which a third is beyond and stops at it; a quarter of it elsewhere
        size = float((moved.abs() > 0.05).double().mean())
        assert (0.5 < size < 0.75) if blocks else (0.02 < size < 0.08)
