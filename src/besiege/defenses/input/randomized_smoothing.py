"""Randomized smoothing: the class that most noisy copies of an image bear, and a radius that it surely holds in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.stats import beta
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import Access, Answer

ABSTAINS = -1
"""The label of an image whose certificate says nothing."""

DRAWN = 16
"""So many copies of every image are drawn at once, whatever the batch, so that an image keeps its noise."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """(n,) ``label``, and ``radius`` (float64, pixel units of [0, 1]): no image nearer in L2 bears another label."""

    label: Tensor
    radius: Tensor


def randomized_smoothing(
    target: Target,
    images: Images,
    rng: Rng,
    *,
    sigma: float = 0.25,
    samples: int = 100,
    alpha: float = 0.001,
    radius: float = 0.0,
) -> Target:
    """``target`` behind Gaussian noise (Cohen et al. 2019, arXiv:1902.02918); ``images`` calibrate nothing.

    Its scores are the logarithms of the shares that the classes have in ``samples`` votes. An image is rejected
    where the votes, at confidence 1 - ``alpha``, certify less than ``radius``. Votes have no gradient; whoever knows
    the defense takes that of `softened` through the lens `Bpda`.

    Raises:
        BadInput: ``sigma`` is not above 0.
    """
    if not sigma > 0:
        raise BadInput(f"sigma must be above 0, not {sigma}")
    calls = itertools.count()

    def vote(x: Tensor) -> Answer:
        votes = _votes(target, x, _fresh(rng, next(calls), len(x)), sigma, samples)
        certified = sigma * _sure(votes.amax(1), samples, alpha)
        return Answer(((votes + 0.5) / (samples + 0.5 * target.classes)).log().to(x), (radius - certified).to(x))

    return replace(
        target,
        call=vote,
        module=None,
        access=min(target.access, Access.SCORES),
        stochastic=True,
        name=f"randomized smoothing of {target.name}",
    )


def softened(
    target: Target, rng: Rng, *, sigma: float = 0.25, samples: int = 100, radius: float = 0.0
) -> Callable[[Tensor], Answer]:
    """What stands in for the votes where gradients are taken: mean probabilities (Salman et al. 2019, 1906.04584).

    Its excess is that of a certificate with these probabilities for shares of the votes.
    """
    calls = itertools.count()

    def answer(x: Tensor) -> Answer:
        noise = _fresh(rng, next(calls), len(x)).randn(samples, *x.shape[1:]).to(x)
        scores = target.answer((x[:, None] + sigma * noise).flatten(0, 1)).scores
        share = scores.log_softmax(1).view(len(x), samples, -1).logsumexp(1) - math.log(samples)
        largest = share.amax(1).exp().clamp(1e-6, 1 - 1e-6)
        return Answer(share, radius - sigma * torch.special.ndtri(largest))

    return answer


def certify(
    target: Target,
    x: Tensor,
    rng: Rng,
    *,
    sigma: float = 0.25,
    select: int = 100,
    samples: int = 100_000,
    alpha: float = 0.001,
) -> Certificate:
    """Certify images ``x`` (n, c, h, w), whose streams are ``rng``'s (Cohen et al. 2019, algorithm CERTIFY).

    ``select`` votes choose the class; ``samples`` others bound its share from below, wrong with probability ``alpha``
    at most. Where the bound does not pass one half, the certificate abstains.
    """
    label = _votes(target, x, rng, sigma, select).argmax(1)
    votes = _votes(target, x, rng, sigma, samples).gather(1, label[:, None]).squeeze(1)
    radius = sigma * _sure(votes, samples, alpha)
    holds = radius > 0
    return Certificate(torch.where(holds, label, ABSTAINS), torch.where(holds, radius, 0))


def _votes(target: Target, x: Tensor, noise: Rng, sigma: float, samples: int) -> Tensor:
    """(n, classes) float64: how many of each image's noisy copies bear each class."""
    votes = torch.zeros(len(x), target.classes, dtype=torch.float64, device=x.device)
    with torch.no_grad(), target.ready():
        for done in range(0, samples, DRAWN):
            count = min(DRAWN, samples - done)
            copies = (x[:, None] + sigma * noise.randn(count, *x.shape[1:]).to(x)).flatten(0, 1)
            label = torch.cat([target.answer(part).scores.argmax(1) for part in torch.split(copies, target.batch)])
            votes += torch.nn.functional.one_hot(label, target.classes).view(len(x), count, -1).sum(1)
    return votes


def _sure(votes: Tensor, samples: int, alpha: float) -> Tensor:
    """(n,) standard deviations certified: the normal quantile of the share's lower bound (Clopper & Pearson 1934)."""
    lower = beta.ppf(alpha, votes.cpu().numpy(), samples - votes.cpu().numpy() + 1)
    quantile: Tensor = torch.special.ndtri(torch.as_tensor(lower, dtype=torch.float64).nan_to_num(0))
    return quantile.to(votes.device)


def _fresh(rng: Rng, call: int, n: int) -> Rng:
    """Streams for the rows of one call; no two calls share a number."""
    return Rng.of(int(rng.keys[0]), torch.arange(n, device=rng.keys.device) + (call << 32), "randomized-smoothing")
