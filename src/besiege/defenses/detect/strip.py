"""STRIP: an answer that stays sure whatever clean image is laid over the input is a trigger's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.shield import Shield, threshold
from besiege.core.target import Target
from besiege.core.threat import Answer

Overlay = Literal["both", "sum", "saturated"]

SCALE = 5.0
"""The entropy, over a clean image's, is multiplied by this to be weighed against a margin of logits."""


class Overlaid(Shield):
    """Answers as the classifier does, and rejects what keeps its class under every clean image laid over it."""

    overlays: Tensor
    usual: Tensor
    limit: Tensor

    def __init__(self, inner: Target, *, copies: int = 100, overlay: Overlay = "both", rate: float = 0.01) -> None:
        super().__init__(inner)
        self.overlay = overlay
        self.register_buffer("overlays", torch.zeros(copies, *inner.shape))
        self.register_buffer("usual", torch.ones(2 if overlay == "both" else 1))
        self.register_buffer("limit", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Answer:
        """The classifier's scores, and how far the entropy is below its threshold."""
        return Answer(self.inner.answer(x).scores, SCALE * (self.limit.to(x) - self.unrest(x)))

    def unrest(self, x: Tensor) -> Tensor:
        """(n,) the entropy over that of the middle clean image, the lesser of those of both kinds of overlays."""
        return (self.entropy(x) / self.usual.to(x)).amin(1)

    def entropy(self, x: Tensor) -> Tensor:
        """(n, kinds) the mean entropy, in bits, of the answers to images (n, c, h, w) under the overlays."""
        laid = x[:, None] + self.overlays.to(x)
        if self.overlay == "saturated":
            laid = laid.clamp(0, 1)
        elif self.overlay == "both":
            plain, cut = laid.tensor_split(2, 1)
            laid = torch.cat([plain, cut.clamp(0, 1)], 1)
        parts = torch.split(laid.flatten(0, 1), self.inner.batch)
        log_p = torch.cat([self.inner.answer(part).scores for part in parts]).log_softmax(1)
        bits = -(log_p.exp() * log_p).sum(1) / torch.log(torch.tensor(2.0))
        kinds = bits.view(len(x), -1).to(x).tensor_split(len(self.usual), 1)
        return torch.stack([kind.mean(1) for kind in kinds], 1)


@defense(
    "STRIP",
    paper="arXiv:1902.06531",
    kind="input",
    counters=("badnets", "blended", "label-consistent"),
    adaptive="a trigger that works on one class alone, or adap-blend",
    shield=Overlaid,
)
def strip(
    target: Target, images: Images, rng: Rng, *, copies: int = 100, overlay: Overlay = "both", rate: float = 0.01
) -> Target:
    """Lay ``copies`` of the clean ``images`` over an input and look at the answers' entropy (Gao et al. 2019).

    Half of the images are laid over; the other half set the threshold, below which ``rate`` of them lie: their own
    quantile, and no normal distribution's. An overlay is the ``sum`` of both images, as in the authors' code.

    Departs from the paper by default, where half of the copies are added so and half are ``saturated``, cut off at 1,
    and the lesser entropy counts: strokes of twice the white drown a white patch on a drawing, and a photograph that
    turns white hides it.

    Raises:
        BadInput: there are fewer than 2 copies, or of images.
    """
    if copies < 2 or len(images) < 2:
        raise BadInput(f"strip lays 2 images over at least, not {min(copies, len(images))}; raise copies or give more")
    order = rng.rand().argsort()
    half = len(images) // 2
    rows = order[torch.arange(copies, device=order.device) % half]
    shield = Overlaid(target, copies=copies, overlay=overlay, rate=rate).to(target.device)
    shield.overlays.copy_(images.x[rows])
    with torch.no_grad(), target.ready():
        clean = torch.cat([shield.entropy(part) for part in torch.split(images.x[order[half:]], 32)])
    shield.usual.copy_(clean.median(0).values.clamp_min(1e-6))
    shield.limit.fill_(-threshold(-(clean / shield.usual).amin(1), rate))
    return shield.target("strip")
