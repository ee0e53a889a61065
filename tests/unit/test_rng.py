"""Streams that belong to an image: alike in any batch, unlike any other, and random."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare, kstest

from besiege.core.rng import Rng, Stream

DRAWS = {
    "bits": lambda r: r.bits(5),
    "rand": lambda r: r.rand(2, 3),
    "randn": lambda r: r.randn(7),
    "signs": lambda r: r.signs(9),
    "below": lambda r: r.below(1000, 4),
}


def rng(*images: int, seed: int = 0, method: str = "m") -> Rng:
    return Rng.of(seed, torch.tensor(images), method)


@pytest.mark.parametrize("draw", DRAWS)
def test_an_image_draws_alike_in_any_batch_and_order(draw):
    draw = DRAWS[draw]
    together = rng(3, 8, 5)
    first, second = draw(together), draw(together)
    alone = rng(8)
    assert torch.equal(draw(alone), first[1:2])
    assert torch.equal(draw(alone), second[1:2])
    assert not torch.equal(first, second)
    turned = rng(5, 3, 8)
    assert torch.equal(draw(turned), first[[2, 0, 1]])


def test_rows_can_be_dropped_in_the_middle():
    whole, part = rng(0, 1, 2, 3), rng(0, 1, 2, 3)
    whole.rand(4)
    part.rand(4)
    rest = part[torch.tensor([1, 3])]
    assert len(rest) == 2
    assert torch.equal(rest.randn(3), whole.randn(3)[[1, 3]])


def test_seeds_images_and_methods_have_streams_of_their_own():
    streams = [rng(0), rng(1), rng(0, seed=1), rng(0, method="other"), rng(1_000_003), rng(0, seed=-1)]
    drawn = [tuple(s.bits(3).flatten().tolist()) for s in streams]
    assert len(set(drawn)) == len(drawn)
    later = rng(0)
    assert set(later.bits(3).flatten().tolist()).isdisjoint(later.bits(3).flatten().tolist())


def test_uniform():
    drawn = rng(*range(200)).rand(100)
    assert drawn.dtype == torch.float32
    assert 0 <= float(drawn.min())
    assert float(drawn.max()) < 1
    assert kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    one_each = torch.cat([rng(i).rand() for i in range(2000)])
    assert kstest(one_each.numpy(), "uniform").pvalue > 1e-3
    first, second = rng(*range(5000)).rand(2).T
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1])) < 0.05


@pytest.mark.parametrize("count", [1, 2, 101])
def test_normal(count):
    drawn = rng(*range(4000 // count + 1)).randn(count)
    assert bool(drawn.isfinite().all())
    assert drawn.shape[1] == count
    assert kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    if count > 100:  # both halves of the transform, and their independence
        left, right = drawn[:, :50], drawn[:, 51:]
        assert abs(float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])) < 0.06


def test_signs_are_even():
    drawn = rng(*range(100)).signs(100)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 0.04


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_whole_numbers_below(high):
    drawn = rng(*range(100)).below(high, 200)
    assert drawn.dtype == torch.int64
    assert 0 <= int(drawn.min())
    assert int(drawn.max()) < high
    counts = drawn.flatten().bincount(minlength=high)
    assert high == 1 or chisquare(counts.numpy()).pvalue > 1e-3


def test_every_bit_is_random():
    bits = rng(*range(50)).bits(100).flatten()
    ones = torch.stack([(bits >> k) & 1 for k in range(64)]).float().mean(1)
    assert float((ones - 0.5).abs().max()) < 0.03


def test_the_generator_of_one_image_is_its_own():
    one, again, other = rng(4, 9).stream(1), rng(9).stream(0), rng(4, 9).stream(0)
    drawn = one.rand(3)
    assert torch.equal(again.rand(3), drawn)
    assert not torch.equal(other.rand(3), drawn)
    stream = Stream(1)
    assert stream.randn(2, 3).shape == (2, 3)
    assert set(stream.signs(50).tolist()) == {-1.0, 1.0}
    assert {stream.below(3) for _ in range(60)} == {0, 1, 2}
