"""The certificate of randomized smoothing against what is known in closed form for a linear classifier."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from besiege.core.errors import AccessDenied, BadInput
from besiege.core.images import Images
from besiege.core.lens import Bpda
from besiege.core.meter import Meter
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal
from besiege.defenses.input.randomized_smoothing import Smoothed, _sure, certify, randomized_smoothing

SIGMA = 0.25


class Half(nn.Module):
    """Two classes on either side of the plane where the first pixel is one half."""

    def forward(self, x: Tensor) -> Tensor:
        side = 20 * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([-side, side], 1)


TARGET = Target.of(Half(), classes=2, shape=(1, 2, 2))


def at(*distance: float) -> Tensor:
    """Images so far from the plane, on the side of class 1."""
    x = torch.full((len(distance), 1, 2, 2), 0.5)
    x[:, 0, 0, 0] += torch.tensor(distance)
    return x


def rng(n: int, seed: int = 0) -> Rng:
    return Rng.of(seed, torch.arange(n), "test")


def test_a_linear_classifier_is_certified_almost_to_its_plane() -> None:
    distance = (0.1, 0.3, 0.45, -0.2)
    found = certify(TARGET, at(*distance), rng(4), sigma=SIGMA, samples=20_000)
    assert found.label.tolist() == [1, 1, 1, 0]
    truth = torch.tensor(distance, dtype=torch.float64).abs()
    assert bool((found.radius <= truth).all()) and bool((found.radius >= 0.93 * truth).all())


def test_on_the_plane_it_abstains() -> None:
    found = certify(TARGET, at(0.0, 0.001), rng(2), sigma=SIGMA, samples=1000)
    assert found.label.tolist() == [-1, -1] and found.radius.tolist() == [0, 0]


@pytest.mark.parametrize("votes", [0, 1, 60, 99, 100])
def test_the_bound_is_clopper_and_pearsons(votes: int) -> None:
    exact = binomtest(votes, 100).proportion_ci(confidence_level=1 - 2 * 0.001, method="exact").low
    got = _sure(torch.tensor([float(votes)]).double(), 100, 0.001)
    assert float(got) == pytest.approx(norm.ppf(exact), rel=1e-6) if exact else float(got) == -math.inf


def test_the_certificate_is_rarely_wrong() -> None:
    """Of many certificates no more than alpha pass the truth."""
    x = at(*[0.2] * 400)
    found = certify(TARGET, x, rng(400), sigma=SIGMA, samples=200, alpha=0.05)
    wrong = float((found.radius > 0.2).double().mean())
    assert 0 < wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_an_image_is_certified_alike_alone_and_in_company() -> None:
    x = at(0.1, 0.2, 0.3)
    together = certify(TARGET, x, rng(3), sigma=SIGMA, samples=500)
    alone = [certify(TARGET, x[i : i + 1], rng(3)[torch.tensor([i])], sigma=SIGMA, samples=500) for i in range(3)]
    assert together.label.tolist() == [int(part.label) for part in alone]
    assert together.radius.tolist() == [float(part.radius) for part in alone]


def test_the_defended_target_votes_and_rejects() -> None:
    images = Images.of(at(0.3, 0.02), torch.tensor([1, 1]))
    safe = randomized_smoothing(sigma=SIGMA, samples=200, radius=0.15).bound()(TARGET, images, rng(2))
    answer = safe.answer(images.x)
    assert safe.stochastic and safe.access is Access.SCORES
    assert answer.scores.argmax(1).tolist() == [1, 1]
    assert answer.excess is not None and (answer.excess > 0).tolist() == [False, True]
    assert not torch.equal(safe.answer(images.x).scores, answer.scores)


def test_who_knows_it_follows_the_mean_of_the_probabilities() -> None:
    images = Images.of(at(0.3), torch.tensor([1]))
    meter = Meter(TARGET.granting(Access.GRADIENTS), images.x, Goal(images.y), Ball(INF, 1.0), seeks="optimum")
    _, grad = Bpda(meter, Smoothed(TARGET, sigma=SIGMA, samples=2000).softened).gradient(images.x)
    first = grad.flatten()[0]
    assert float(first) > 0 and float(grad.flatten()[1:].abs().max()) == 0
    share = norm.cdf(0.3 / SIGMA)
    slope = norm.pdf(0.3 / SIGMA) / SIGMA * (1 / share + 1 / (1 - share))
    assert float(first) == pytest.approx(slope, rel=0.15)


def test_who_knows_it_is_not_kept_from_gradients_by_the_votes() -> None:
    images = Images.of(at(0.1), torch.tensor([1]))
    safe = randomized_smoothing(sigma=0.05, samples=50).bound()(TARGET, images, rng(1))
    assert isinstance(safe.module, Smoothed)
    meter = Meter(safe, images.x, Goal(images.y), Ball(INF, 0.2), access=Access.SCORES)
    with pytest.raises(AccessDenied):
        meter.gradient(images.x)
    _, grad = Bpda(meter, safe.module.softened).gradient(images.x)
    assert float(grad.flatten()[0]) > 0


def test_what_is_saved_votes_with_the_same_noise() -> None:
    images = Images.of(at(0.05, -0.02), torch.tensor([1, 0]))
    first = randomized_smoothing(sigma=SIGMA).bound()(TARGET, images, rng(2)).module
    again = Smoothed(TARGET, sigma=SIGMA)
    assert isinstance(first, Smoothed)
    again.restore(first.own())
    assert torch.equal(first(images.x).scores, again(images.x).scores)
    assert not torch.equal(again(images.x).scores, Smoothed(TARGET, sigma=SIGMA)(images.x).scores)


def test_noise_there_must_be() -> None:
    with pytest.raises(BadInput, match="sigma must be above 0"):
        randomized_smoothing(sigma=0.0).bound()(TARGET, Images.of(at(0.1), torch.tensor([1])), rng(1))
