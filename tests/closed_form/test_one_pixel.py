"""Attacks by differential evolution: what they draw, and what they find on models whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_query_attacks import fire, pixels

from besiege.attacks.blackbox.evolution import _hopeful, _left
from besiege.attacks.blackbox.one_pixel import draw_pixels, one_pixel
from besiege.core.threat import Ball


def test_genes_are_a_row_a_column_and_a_colour():
    x = pixels(2, (3, 4, 5))
    genes = torch.tensor([[0.0, 0.0, 0.1, 0.2, 0.3, 1.0, 1.0, 0.4, 0.5, 0.6], [0.26, 0.41, 0.7, 0.8, 0.9] * 2])
    drawn, expected = draw_pixels(x, genes), x.clone()
    expected[0, :, 0, 0], expected[0, :, 3, 4] = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    expected[1, :, 1, 2] = torch.tensor([0.7, 0.8, 0.9])
    assert torch.equal(drawn, expected)


def test_the_one_pixel_that_matters_is_found_and_no_more_than_allowed_change():
    """The class falls only where one pixel of 64 turns nearly white; its surroundings point toward it."""
    x = pixels(4, (1, 8, 8)) * 0.1
    near = torch.zeros(8, 8).double()
    for row in range(8):
        for column in range(8):
            near[row, column] = 1 / (1 + abs(row - 5) + abs(column - 2))

    def score(z):
        return 0.85 - (z.double()[:, 0] * near).flatten(1).amax(1)

    outcome, model = fire(one_pixel(pixels=1), score, x, Ball(0, 3))
    assert bool(outcome.success.all())
    assert outcome.distance.tolist() == [1.0] * 4
    assert bool((outcome.adv[:, 0, 5, 2] > 0.84).all())
    asked = torch.cat(model.asked)[:, None]
    assert int((asked != x).flatten(2).sum(2).amin(1).max()) <= 1


def test_an_image_whose_odds_do_not_fall_is_given_up_and_the_others_go_on():
    """What the first image is asked changes nothing; the second falls to the same pixel as above."""
    x = pixels(2, (1, 8, 8)) * 0.1
    x[0, :, :, 0] = 0.5
    near = torch.tensor([[1 / (1 + abs(row - 5) + abs(column - 2)) for column in range(8)] for row in range(8)])

    def score(z):
        dull = z.double()[:, 0, :, 0].median(1).values == 0.5
        return torch.where(dull, 3.0, 0.85 - (z.double()[:, 0] * near.double()).flatten(1).amax(1))

    every, _ = fire(one_pixel(pixels=1, population=20, iterations=60, patience=0), score, x, Ball(0, 1))
    some, _ = fire(one_pixel(pixels=1, population=20, iterations=60, patience=200), score, x, Ball(0, 1))
    assert every.success.tolist() == some.success.tolist() == [False, True]
    assert torch.equal(every.adv[1], some.adv[1])
    assert every.forward[1] == some.forward[1]
    assert int(every.forward[0]) >= 20 * 61
    assert 200 <= int(some.forward[0]) <= 200 + 3 * 20


@pytest.mark.parametrize("targeted", [False, True])
def test_hope_is_a_quarter_of_the_odds_that_are_left(targeted):
    oracle = SimpleNamespace(goal=SimpleNamespace(targeted=targeted))

    def loss(odds):
        log = -torch.nn.functional.softplus(odds if targeted else -odds)
        return -log if targeted else log

    first, worse, better, near = (torch.tensor([[4.0, 4.0, 0.5]]) * share for share in (1, 0.81, 0.79, -0.1))
    for last, hopeful in ((worse, []), (better, [0, 1, 2]), (near, [0, 1, 2])):
        past = _left(oracle, loss(first[0]))[:, None].repeat(1, 2)
        assert len(_hopeful(oracle, past, loss(first[0]), 0)) == 3
        assert len(_hopeful(oracle, past, loss(first[0]), 1)) == 3
        assert _hopeful(oracle, past, loss(last[0]), 2).tolist() == hopeful
        torch.testing.assert_close(past[:, 0], last[0], rtol=1e-4, atol=1e-5)
