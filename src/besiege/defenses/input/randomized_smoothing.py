"""Randomized smoothing: the class that most noisy copies of an image bear, and a radius that it surely holds in."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from scipy.stats import beta
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.shield import Shield
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


class Smoothed(Shield):
    """Answers with the votes of noisy copies, and rejects what they certify less than ``radius`` of.

    Scores are the logarithms of the shares that the classes have in ``samples`` votes. Softened it answers with mean
    probabilities (Salman et al. 2019, arXiv:1906.04584); the excess is that of a certificate with these for shares.
    """

    stochastic, draws = True, 1
    key: Tensor

    def __init__(
        self, inner: Target, *, sigma: float = 0.25, samples: int = 100, alpha: float = 0.001, radius: float = 0.0
    ) -> None:
        super().__init__(inner)
        if not sigma > 0:
            raise BadInput(f"sigma must be above 0, not {sigma}")
        self.sigma, self.samples, self.alpha, self.radius = sigma, samples, alpha, radius
        self.register_buffer("key", torch.tensor(0))
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Answer:
        """The votes, and by how much the certified radius falls short."""
        votes = _votes(self.inner, x, self.noise(len(x)), self.sigma, self.samples)
        certified = self.sigma * _sure(votes.amax(1), self.samples, self.alpha)
        shares = (votes + 0.5) / (self.samples + 0.5 * self.inner.classes)
        return Answer(shares.log().to(x), (self.radius - certified).to(x))

    def softened(self, x: Tensor) -> Answer:
        """The same where votes are probabilities."""
        noise = self.noise(len(x)).randn(self.samples, *x.shape[1:]).to(x)
        scores = self.inner.answer((x[:, None] + self.sigma * noise).flatten(0, 1)).scores
        share = scores.log_softmax(1).view(len(x), self.samples, -1).logsumexp(1) - math.log(self.samples)
        largest = share.amax(1).exp().clamp(1e-6, 1 - 1e-6)
        return Answer(share, self.radius - self.sigma * torch.special.ndtri(largest))

    def noise(self, n: int) -> Rng:
        """Streams for the rows of one call; no two calls share a number."""
        rows = torch.arange(n, device=self.key.device) + (next(self.calls) << 32)
        return Rng.of(int(self.key), rows, "randomized-smoothing")

    def target(self, name: str) -> Target:
        """The smoothed target: votes have no gradient."""
        return replace(super().target(name), access=min(self.inner.access, Access.SCORES))


@defense(
    "Randomized smoothing",
    paper="arXiv:1902.02918",
    kind="input",
    counters=("fgsm", "bim", "pgd", "deepfool", "cw-l2", "ddn", "fmn"),
    adaptive="the same attack on the mean probabilities of noisy copies; shadow against the certificate",
    shield=Smoothed,
)
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
    """Let ``samples`` copies under Gaussian noise of deviation ``sigma`` vote (Cohen et al. 2019).

    An image is rejected where the votes, at confidence 1 - ``alpha``, certify less than ``radius`` (L2, in pixels of
    [0, 1]). The ``images`` calibrate nothing, and the network is taken as it is: one that has learned under the same
    noise certifies far more.

    Raises:
        BadInput: ``sigma`` is not above 0.
    """
    shield = Smoothed(target, sigma=sigma, samples=samples, alpha=alpha, radius=radius)
    shield.key.copy_(rng.keys[0])
    return shield.to(target.device).target("randomized smoothing")


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
