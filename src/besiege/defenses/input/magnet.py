"""MagNet: autoencoders reject what they cannot draw again, and draw what is left toward the clean images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.shield import Shield, threshold
from besiege.core.target import Target
from besiege.core.threat import Answer

TEMPERATURES = (10.0, 40.0)
SCALE = 10.0
"""A detector's suspicion, in units of its threshold, is multiplied by this to be weighed against a margin of logits."""


class Reformed(Shield):
    """Answers for the image as its autoencoder draws it, and rejects what a detector finds odd.

    With more than one autoencoder each answer is by one of them, drawn by chance.
    """

    limits: Tensor

    def __init__(
        self,
        inner: Target,
        *,
        width: int | None = None,
        coders: int = 1,
        noise: float | None = None,
        epochs: int = 100,
        rate: float = 0.005,
    ) -> None:
        super().__init__(inner)
        channels = inner.shape[0]
        self.coders = nn.ModuleList([autoencoder(channels, width) for _ in range(coders)])
        self.stochastic = coders > 1
        self.register_buffer("limits", torch.ones(coders, 2 + len(TEMPERATURES)))

    def forward(self, x: Tensor) -> Answer:
        """The scores of the image drawn again, and the excess of the detector that objects most."""
        chosen = int(torch.randint(len(self.coders), ())) if self.stochastic else 0
        return self.by(chosen, x)

    def by(self, chosen: int, x: Tensor) -> Answer:
        """The answer by one of the autoencoders."""
        drawn = self.drawn(chosen, x)
        scores = self.inner.answer(drawn).scores
        odd = self.oddities(x, drawn, scores) / self.limits[chosen].to(x)
        return Answer(scores, SCALE * (odd.amax(1) - 1))

    def drawn(self, chosen: int, x: Tensor) -> Tensor:
        """The images (n, c, h, w) as an autoencoder draws them, in [0, 1]."""
        image: Tensor = self.coders[chosen](x.float()).to(x).clamp(0, 1)
        return image

    def oddities(self, x: Tensor, drawn: Tensor, scores: Tensor) -> Tensor:
        """(n, detectors): the mean error and its root mean square, and how far the classifier's answers diverge."""
        delta = (x - drawn).flatten(1)
        own = self.inner.answer(x).scores
        apart = [divergence(own / t, scores / t) for t in TEMPERATURES]
        return torch.stack([delta.abs().mean(1), (delta.square().mean(1) + 1e-12).sqrt(), *apart], 1)


@defense(
    "MagNet",
    paper="arXiv:1705.09064",
    kind="input",
    counters=("fgsm", "bim", "pgd", "deepfool", "cw-l2", "cw-linf", "ead"),
    adaptive="the same attack through the autoencoder and against its detectors",
    shield=Reformed,
)
def magnet(
    target: Target,
    images: Images,
    rng: Rng,
    *,
    width: int | None = None,
    coders: int = 1,
    noise: float | None = None,
    epochs: int = 100,
    rate: float = 0.005,
) -> Target:
    """Train ``coders`` autoencoders of ``width`` channels on four fifths of ``images``, the rest set the thresholds.

    They learn for ``epochs`` to undo noise of deviation ``noise`` (Meng & Chen 2017). By itself it is the paper's: for
    grey images 3 channels, a mean over pairs of pixels and noise of 0.1; for others 32, no mean, and 0.025. Each of
    four detectors (mean error, its mean square, divergence of the answers at temperatures 10 and 40) rejects ``rate``
    of the clean images. Departs from the paper: one autoencoder serves all detectors and the reformer; several are
    trained from different weights, without a term that drives them apart.
    """
    shield = Reformed(target, width=width, coders=coders, noise=noise, epochs=epochs, rate=rate).to(target.device)
    noise = (0.1 if target.shape[0] == 1 else 0.025) if noise is None else noise
    held = torch.arange(len(images), device=images.x.device) % 5 == 0
    for k, coder in enumerate(shield.coders):
        _learn(coder, images[~held].x.float(), noise, epochs, seed=int(rng.keys[0]) + k)
    with torch.no_grad(), target.ready():
        for k in range(coders):
            odd = []
            for part in torch.split(images[held].x, target.batch):
                drawn = shield.drawn(k, part)
                odd.append(shield.oddities(part, drawn, target.answer(drawn).scores))
            every = torch.cat(odd)
            for j in range(every.shape[1]):
                shield.limits[k, j] = max(threshold(every[:, j], rate), 1e-6)
    return shield.target("magnet")


def autoencoder(channels: int, width: int | None) -> nn.Module:
    """The paper's: three convolutions for colour; for digits means over pairs of pixels within, and the way back."""
    if channels > 1:
        width = width or 32
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.Sigmoid(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Sigmoid(),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )
    width = width or 3
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.Sigmoid(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Sigmoid(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(width, channels, 3, padding=1),
        nn.Sigmoid(),
    )


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """(n,) the Jensen-Shannon divergence between the softmax of two sets of logits, in nats."""
    one, other = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(one, other) - torch.log(torch.tensor(2.0))
    pulls = [F.kl_div(middle, part, reduction="none", log_target=True).sum(1) for part in (one, other)]
    return (pulls[0] + pulls[1]) / 2


def _learn(coder: nn.Module, x: Tensor, noise: float, epochs: int, seed: int) -> None:
    """Adam on the squared error between what is drawn of noisy images and the images."""
    draws = torch.Generator().manual_seed(seed % (1 << 62))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 62))
        for layer in coder.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
    optimizer = torch.optim.Adam(coder.parameters(), 1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=draws).to(x.device), 64):
            noisy = (x[rows] + noise * torch.randn(x[rows].shape, generator=draws).to(x.device)).clamp(0, 1)
            optimizer.zero_grad()
            F.mse_loss(coder(noisy), x[rows]).backward()
            optimizer.step()
            rate.step()
    for weight in coder.parameters():
        weight.requires_grad_(False)
