"""Feature squeezing: coarser images must be answered alike, else the image is rejected."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.lens import straight_through
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.shield import Shield, threshold
from besiege.core.target import Target
from besiege.core.threat import Answer

SCALE = 10.0
"""The distance of probabilities, 2 at most, is multiplied by this to be weighed against a margin of logits."""


class Squeezing(Shield):
    """Answers as the classifier does, and rejects where squeezing an image changes its probabilities too much."""

    limit: Tensor

    def __init__(
        self,
        inner: Target,
        *,
        bits: int | None = None,
        median: int = 2,
        patch: int | None = None,
        search: int = 13,
        strength: float = 2.0,
        rate: float = 0.05,
    ) -> None:
        super().__init__(inner)
        grey = inner.shape[0] == 1
        self.bits = (1 if grey else 5) if bits is None else bits
        self.patch = (0 if grey else 3) if patch is None else patch
        self.median, self.search, self.strength = median, search, strength
        self.register_buffer("limit", torch.tensor(0.0))
        if not (self.bits or median or self.patch):
            raise BadInput("feature-squeezing: at least one of bits, median and patch must be above 0")

    def forward(self, x: Tensor) -> Answer:
        """The classifier's scores, and the excess of suspicion."""
        answer = self.inner.answer(x)
        return Answer(answer.scores, SCALE * (self.suspicion(x, answer.scores) - self.limit.to(x)))

    def softened(self, x: Tensor) -> Answer:
        """The same where rounding lets gradients through unchanged."""
        answer = self.inner.answer(x)
        return Answer(answer.scores, SCALE * (self.suspicion(x, answer.scores, soft=True) - self.limit.to(x)))

    def suspicion(self, x: Tensor, scores: Tensor, soft: bool = False) -> Tensor:
        """(n,) the largest L1 distance between the probabilities of an image and of a squeezed one."""
        p = scores.softmax(1)
        apart = [
            (p - self.inner.answer(squeezed).scores.softmax(1)).abs().sum(1) for squeezed in self.squeezed(x, soft)
        ]
        return torch.stack(apart, 1).amax(1)

    def squeezed(self, x: Tensor, soft: bool = False) -> list[Tensor]:
        """The image by each squeezer that is in use."""
        every = []
        if self.bits:
            steps = 2**self.bits - 1
            every.append(straight_through(lambda image: coarse(image, steps))(x) if soft else coarse(x, steps))
        if self.median:
            every.append(median(x, self.median))
        if self.patch:
            every.append(non_local_means(x, self.search, self.patch, self.strength / 255))
        return every


@defense(
    "Feature squeezing",
    paper="arXiv:1704.01155",
    kind="input",
    counters=("fgsm", "bim", "pgd", "deepfool", "cw-l2", "cw-linf", "cw-l0", "jsma"),
    adaptive="the same attack on the classifier and its detector together, rounding let through",
    shield=Squeezing,
)
def feature_squeezing(
    target: Target,
    images: Images,
    rng: Rng,
    *,
    bits: int | None = None,
    median: int = 2,
    patch: int | None = None,
    search: int = 13,
    strength: float = 2.0,
    rate: float = 0.05,
) -> Target:
    """Reject an image where any squeezer moves its probabilities by more than ``rate`` of the clean ``images`` are.

    Squeezers are rounding to ``bits`` bits, a median over windows of ``median`` pixels, and non-local means of patches
    of ``patch`` pixels within ``search``, weighed by ``strength`` in levels of 255; 0 leaves one out (Xu et al. 2018).
    By themselves they are the paper's: 1 bit and the median for grey images, 5 bits, the median and patches of 3 pixels
    for others. What is deployed answers as before: the squeezed images only tell which are rejected.
    """
    shield = Squeezing(target, bits=bits, median=median, patch=patch, search=search, strength=strength, rate=rate)
    with torch.no_grad(), target.ready():
        suspicion = torch.cat(
            [shield.suspicion(part, target.answer(part).scores) for part in torch.split(images.x, target.batch)]
        )
    shield.limit.fill_(threshold(suspicion, rate))
    return shield.to(target.device).target("feature squeezing")


def coarse(x: Tensor, steps: int) -> Tensor:
    """Each value rounded to a multiple of ``1 / steps``."""
    return (x * steps).round() / steps


def median(x: Tensor, side: int) -> Tensor:
    """The median of each window of ``side`` x ``side`` pixels, a channel each; borders are reflected.

    A window of even side reaches one pixel further up and left. Of an even number of values the lower middle one
    counts, so that every value is one of the image's.
    """
    before, after = side // 2, (side - 1) // 2
    padded = F.pad(x, (before, after, before, after), mode="reflect")
    windows = padded.unfold(2, side, 1).unfold(3, side, 1).flatten(4)
    middle: Tensor = windows.median(4).values
    return middle


def non_local_means(x: Tensor, search: int, patch: int, strength: float) -> Tensor:
    """Each pixel as a mean of those within ``search`` x ``search`` around it, weighed by how alike their patches are.

    The weight falls by e where the mean square between patches of ``patch`` x ``patch`` (all channels together) passes
    ``strength`` squared (Buades et al. 2005); borders are reflected.
    """
    reach, half = search // 2, patch // 2
    (h, w), wide = x.shape[2:], F.pad(x, (search // 2,) * 4, mode="reflect")
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            other = wide[:, :, down : down + h, right : right + w]
            square = (other - x).square().mean(1, keepdim=True)
            apart = F.avg_pool2d(F.pad(square, (half,) * 4, mode="reflect"), patch, stride=1)
            weight = (-apart / strength**2).exp()
            total, weights = total + weight * other, weights + weight
    return total / weights
