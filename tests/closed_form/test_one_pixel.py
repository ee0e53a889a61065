"""Attacks by differential evolution: what they draw, and what they find on models whose answer is known."""

from __future__ import annotations

import torch
from test_query_attacks import fire, pixels

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
