"""The few-pixel attack: where it begins, what it draws, and what it finds where the answer is known."""

from __future__ import annotations

import pytest
import torch
from test_query_attacks import fire, pixels

from besiege.attacks.blackbox.few_pixel import _spread_out, draw_whole, few_pixel
from besiege.core.rng import Rng
from besiege.core.threat import Ball


def test_colours_are_whole_numbers_of_255_and_none_is_lost_to_rounding():
    x = pixels(256, (3, 4, 5))
    colours = (torch.arange(256) / 255)[:, None].expand(-1, 3)
    genes = torch.cat([torch.full((256, 1), 0.5), torch.full((256, 1), 0.99), colours], 1)
    assert torch.allclose(draw_whole(x, genes)[:, :, 2, 4], colours)
    between = draw_whole(x, torch.cat([genes[:, :2], colours + 0.9 / 255], 1))[:, :, 2, 4]
    assert torch.allclose(between, colours)
    beyond = draw_whole(x[:2], torch.tensor([[-3.0, 7.0, 2.0, -2.0, 0.5]] * 2))
    assert torch.allclose(beyond[:, :, 0, 4], torch.tensor([1.0, 0.0, 127 / 255]))
    kept = torch.ones(4, 5, dtype=torch.bool)
    kept[0, 4] = False
    assert torch.equal(beyond[:, :, kept], x[:2, :, kept])


def test_the_first_candidates_take_each_part_of_every_range_once():
    genes = _spread_out(Rng.of(0, torch.arange(3), "few-pixel"), 20, 7)
    parts = (genes * 20).long().sort(1).values
    assert torch.equal(parts, torch.arange(20)[:, None].expand(3, -1, 7))
    assert not torch.equal(genes[0], genes[1])


@pytest.mark.parametrize("strategy", ["de", "cma"])
@pytest.mark.parametrize("extremes", [True, False])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_as_many_pixels_change_as_asked_and_no_more(strategy, extremes, count):
    """Nothing ever falls, so all 40 generations are asked about; two pixels of a candidate seldom meet."""
    x = pixels(2, (3, 12, 12)) * 0.9 + 0.0123
    attack = few_pixel(pixels=count, strategy=strategy, extremes=extremes, population=8, iterations=5)
    _, model = fire(attack, lambda z: 1 + z.double().flatten(1).mean(1), x, Ball(0, 8))
    asked = torch.cat(model.asked)
    changed = (asked[:, None] != x).any(2)
    sizes, of = changed.flatten(2).sum(2).min(1)
    assert int(sizes.max()) == count
    values = asked.transpose(0, 1)[:, changed[torch.arange(len(asked)), of]] * 255
    assert float((values - values.round()).abs().max()) < 1e-3


def test_cma_es_begins_in_the_paper_at_the_first_pixels_as_they_are():
    x = pixels(1, (3, 12, 12)).mul(255).round().div(255)
    drawn = []

    def score(z):
        drawn.append(z)
        return 1 + 0 * z.double().flatten(1).sum(1)

    fire(few_pixel(strategy="cma", extremes=False, population=200, iterations=1), score, x, Ball(0, 1))
    asked = torch.cat(drawn)
    changed = (asked != x).any(1).flatten(1)
    colours = asked.flatten(2).transpose(1, 2)[changed]
    inside = ((colours > 0) & (colours < 1)).all(1)
    assert float((colours - x[0, :, 0, 0])[inside].abs().mean()) < 2 * 63 / 4 / 255
    # half of the draws lie beyond the upper edge, half beyond the left one
    assert int(changed[:, 0].sum()) >= 20


@pytest.mark.parametrize("options", [{}, {"population": 100, "crossover": 1.0, "extremes": False}, {"strategy": "cma"}])
def test_the_pixels_that_matter_are_found(options):
    """The class falls only where two pixels of 64 turn nearly white; their surroundings point toward them."""
    x = pixels(4, (1, 8, 8)) * 0.1
    down, across = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    near = [1 / (1 + (down - r).abs() + (across - c).abs()).double() for r, c in ((5, 2), (1, 6))]

    def score(z):
        return 1.7 - sum((z.double()[:, 0] * part).flatten(1).amax(1) for part in near)

    outcome, _ = fire(few_pixel(**options), score, x, Ball(0, 2), queries=20000)
    assert bool(outcome.success.all())
    assert outcome.distance.tolist() == [2.0] * 4
    assert bool((outcome.adv[:, 0, [5, 1], [2, 6]] > 0.7).all())
