"""SentiNet: a region that takes its class along to other images, and not by hiding them, is a trigger."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.shield import Shield, threshold
from besiege.core.target import Target
from besiege.core.threat import Answer

SCALE = 10.0
"""The distance from the boundary, 1.5 at most, is multiplied by this to be weighed against a margin of logits."""

BINS = 50
"""The boundary passes over the highest clean image in each bin of confidence; the paper's bins are 0.02 wide."""

GRID = 1001
"""The boundary is looked at in so many points of confidence."""


class Transplants(Shield):
    """Answers as the classifier does, and rejects images whose salient region misleads it on other images too."""

    overlays: Tensor
    inert: Tensor
    curve: Tensor
    limit: Tensor

    def __init__(
        self,
        inner: Target,
        *,
        samples: int = 50,
        level: float = 0.15,
        cells: int = 8,
        rivals: int = 0,
        rate: float = 0.05,
    ) -> None:
        super().__init__(inner)
        self.samples, self.level, self.cells, self.rivals = samples, level, cells, rivals
        self.register_buffer("overlays", torch.zeros(samples, *inner.shape))
        self.register_buffer("inert", torch.zeros(inner.shape))
        self.register_buffer("curve", torch.ones(GRID))
        self.register_buffer("limit", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Answer:
        """The classifier's scores, and the excess of the distance from the boundary."""
        return self._judged(x, soft=False)

    def softened(self, x: Tensor) -> Answer:
        """The same where the share of images misled has the gradient of their mean probability, for a fixed region."""
        return self._judged(x, soft=True)

    def _judged(self, x: Tensor, soft: bool) -> Answer:
        scores = self.inner.answer(x).scores
        above = self.above(self.places(x, soft))
        return Answer(scores, SCALE * (above - self.limit.to(x)))

    def places(self, x: Tensor, soft: bool = False) -> Tensor:
        """(n, 2): the mean confidence under the inert pattern, and the share of overlays that the region misleads."""
        masks, labels = self.regions(x)
        overlays, inert = self.overlays.to(x), self.inert.to(x)
        own = self.inner.answer(overlays).scores.argmax(1)
        found = []
        for image, mask, label in zip(x, masks, labels, strict=True):
            region, hidden = (overlays + mask * (patch - overlays) for patch in (image, inert))
            p = self.inner.answer(region).scores.softmax(1)
            others = own != label
            fooled = (p.argmax(1) == label)[others].to(x).sum() / others.sum().clamp_min(1)
            if soft:
                likely = p[others, label].sum() / others.sum().clamp_min(1)
                fooled = likely + (fooled - likely).detach()
            confidence = self.inner.answer(hidden).scores.softmax(1).amax(1).mean()
            found.append(torch.stack([confidence, fooled]))
        return torch.stack(found)

    def regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, h, w) 1 where an image is salient for its class, 0 elsewhere, and (n,) the classes.

        What is salient for one of its rivals too is left out, unless nothing would remain.
        """
        scores, maps = maps_of(self.inner, x, self.cells)
        order = scores.detach().argsort(dim=1, descending=True, stable=True)
        mask = self._salient(scores, maps, order[:, 0], x)
        for k in range(1, min(self.rivals + 1, self.inner.classes)):
            left = mask * (1 - self._salient(scores, maps, order[:, k], x))
            mask = torch.where(left.flatten(1).any(1).reshape(-1, 1, 1, 1), left, mask)
        return mask, order[:, 0]

    def _salient(self, scores: Tensor, maps: Tensor, labels: Tensor, x: Tensor) -> Tensor:
        heat = F.interpolate(attention(scores, maps, labels), x.shape[2:], mode="bilinear")
        most = heat.flatten(1).amax(1).reshape(-1, 1, 1, 1)
        return ((heat >= self.level * most) & (most > 0)).to(x)

    def above(self, places: Tensor) -> Tensor:
        """(n,) how far places (n, 2) lie above the boundary; below it the distance is negative."""
        line = torch.stack([torch.linspace(0, 1, GRID).to(places), self.curve.to(places)], 1)
        apart = (places[:, None] - line).square().sum(2).amin(1).clamp_min(1e-12).sqrt()
        nearest = (places[:, 0] * (GRID - 1)).round().long().clamp(0, GRID - 1)
        return torch.where(places[:, 1] > line[nearest, 1], apart, -apart)


@defense(
    "SentiNet",
    paper="arXiv:1812.00292",
    kind="input",
    counters=("badnets", "label-consistent"),
    adaptive="a trigger without a small region: blended with the whole image",
    shield=Transplants,
)
def sentinet(
    target: Target,
    images: Images,
    rng: Rng,
    *,
    samples: int = 50,
    level: float = 0.15,
    cells: int = 8,
    rivals: int = 0,
    rate: float = 0.05,
) -> Target:
    """Reject an image whose salient region, put on ``samples`` others, gives them its class (Chou et al. 2020).

    The region is where an attention map, taken at the last layer of at least ``cells`` x ``cells``, passes ``level`` of
    its maximum for the predicted class and not for the ``rivals`` that come next. Over clean images a boundary is
    fitted: how many others are misled, by how sure the network remains where noise fills the region in place of the
    image. Of the clean ``images``, ``samples`` drawn by chance are overlaid and the others, ``rate`` of which may be
    rejected, set the threshold.

    Departs from the paper: rivals are the next classes of the whole image, not those of segments proposed by selective
    search, and none by default, since on the embedded digits one rival let a quarter to a half of 5x5 triggers pass;
    see `attention` for the map; overlays that bear the class already do not count; the threshold is a quantile of the
    clean distances, in place of the mean of those above the boundary, each from a boundary that was fitted to the other
    half of the images: to its own an image lies nearer than one that comes later.

    Raises:
        BadInput: the network has no such map, or there are too few clean images.
    """
    if len(images) < 2 * samples:
        raise BadInput(
            f"sentinet: {samples} images are overlaid and at least as many set the threshold, but only {len(images)} "
            "clean ones are there; give more or fewer samples"
        )
    shield = Transplants(target, samples=samples, level=level, cells=cells, rivals=rivals, rate=rate).to(target.device)
    order = rng.rand().argsort(stable=True)
    shield.overlays.copy_(images.x[order[:samples]])
    shield.inert.copy_(rng[order[:1]].rand(*target.shape)[0])
    with torch.no_grad(), target.ready():
        rest = torch.split(images.x[order[samples:].sort().values], target.batch)
        places = torch.cat([shield.places(part) for part in rest])
    apart = []
    for fitted, others in ((places[::2], places[1::2]), (places[1::2], places[::2])):
        shield.curve.copy_(envelope(fitted))
        apart.append(shield.above(others))
    shield.limit.fill_(threshold(torch.cat(apart), rate))
    shield.curve.copy_(envelope(places))
    return shield.target("sentinet")


def maps_of(target: Target, x: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The scores (n, classes) and the last map (n, k, a, b) with a, b >= ``cells``, joined by a gradient.

    Raises:
        BadInput: the target is no torch module, or none of its layers gives such a map.
    """
    seen: list[Tensor] = []

    def catch(layer: nn.Module, given: object, made: object) -> None:
        if isinstance(made, Tensor) and made.dim() == 4 and min(made.shape[2:]) >= cells:
            seen.append(made)

    layers = (
        [] if target.module is None else [m for m in target.module.modules() if not any(True for _ in m.children())]
    )
    convolves = any(isinstance(layer, nn.Conv2d) for layer in layers)
    handles = [layer.register_forward_hook(catch) for layer in layers]
    try:
        with torch.enable_grad(), target.ready():
            scores = target.answer(x.detach().requires_grad_()).scores
    finally:
        for handle in handles:
            handle.remove()
    if not (convolves and seen and seen[-1].requires_grad):
        raise BadInput(
            f"sentinet looks where a convolutional network looks, but {target.name} shows no map of {cells} x {cells} "
            "or more"
        )
    return scores, seen[-1]


def attention(scores: Tensor, maps: Tensor, labels: Tensor) -> Tensor:
    """(n, 1, a, b) how much each cell of the maps speaks for the classes ``labels`` (n,).

    Each cell's activation is weighed by its own slope (HiResCAM, arXiv:2011.08891). That is Grad-CAM (1610.02391) where
    the network averages the map; where it goes on with dense layers, a mean slope says little about any one cell.
    """
    chosen = torch.zeros_like(scores).scatter_(1, labels[:, None], 1)
    (slope,) = torch.autograd.grad(scores, maps, chosen, retain_graph=True)
    heat: Tensor = (slope * maps.detach().clamp_min(0)).sum(1, keepdim=True).clamp_min(0)
    return heat


def envelope(places: Tensor) -> Tensor:
    """(GRID,) a parabola over the highest of the clean places (n, 2) in each bin, level beyond the outermost ones."""
    bins = (places[:, 0] * BINS).long().clamp(0, BINS - 1)
    top = torch.stack(list(_highest(places.double().cpu(), bins.cpu())))
    powers = torch.arange(3)
    fit = torch.linalg.lstsq(top[:, :1] ** powers, top[:, 1:], driver="gelsd").solution
    at = torch.linspace(0, 1, GRID, dtype=torch.float64).clamp(float(top[:, 0].amin()), float(top[:, 0].amax()))
    curve: Tensor = (at[:, None] ** powers @ fit).squeeze(1).to(places)
    return curve


def _highest(places: Tensor, bins: Tensor) -> Iterator[Tensor]:
    """The place with the most images misled in each bin that has one."""
    for k in torch.unique(bins):
        inside = places[bins == k]
        yield inside[inside[:, 1].argmax()]
