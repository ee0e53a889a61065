"""The parts of an image that may change their colours, and how: sky and water, plants, people, and all else."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from besiege.core.threat import INF

BLUR = 10
"""The edges of the parts are as wide as this many pixels."""

SKIN = 3
"""The number of what stays as it is."""


def by_colors(lab: Tensor, clusters: int) -> Tensor:
    """(n, h, w) for the pixels of images (n, 3, h, w): 0 all else, 1 sky or water, 2 plants, 3 skin.

    The ``clusters`` colours of an image that k-means finds are told apart by their hue.
    """
    return torch.stack([_kinds(one, clusters) for one in lab])


def segmented(lab: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The r regions of ``kinds`` (n, h, w) that may change, and by how much their a and b may move.

    Those of kind 1 stay as blue as they are or get bluer, of 2 as green, and 3 is left out; others take any colour.
    Masks (n, r, h, w) in [0, 1] with soft edges, and the least and the largest moves (n, r, 2).
    """
    regions = [k for k in range(max(SKIN, int(kinds.max()) + 1)) if k != SKIN]
    sharp = torch.stack([kinds == k for k in regions], 1).to(lab)
    around = (BLUR // 2, BLUR - 1 - BLUR // 2) * 2
    masks = F.avg_pool2d(F.pad(sharp, around, mode="replicate"), BLUR, stride=1)
    count = sharp.sum((2, 3)).clamp_min(1)
    mean = torch.einsum("nrhw,nchw->nrc", sharp, lab[:, 1:]) / count[:, :, None]
    least, most = torch.full_like(mean, -INF), torch.full_like(mean, INF)
    most[:, 1] = (-mean[:, 1]).clamp_min(0)
    most[:, 2, 0] = (-mean[:, 2, 0]).clamp_min(0)
    least[:, 2, 1] = (-mean[:, 2, 1]).clamp_max(0)
    return masks, least, most


def _kinds(lab: Tensor, clusters: int) -> Tensor:
    """(h, w) of one image (3, h, w): 0 for all else, 1 sky or water, 2 plants, 3 skin, by the colour of the cluster."""
    pixels = lab.flatten(1).T.double().cpu()
    found = KMeans(min(clusters, len(pixels.unique(dim=0))), n_init=1, random_state=0).fit(pixels.numpy())
    light, a, b = torch.from_numpy(found.cluster_centers_).unbind(1)
    hue, chroma = torch.atan2(b, a).rad2deg() % 360, torch.hypot(a, b)
    kind = torch.zeros_like(light, dtype=torch.int64)
    kind[(hue > 190) & (hue < 300) & (chroma > 6)] = 1
    kind[(hue > 95) & (hue < 170) & (chroma > 10)] = 2
    kind[(hue > 20) & (hue < 75) & (chroma > 12) & (chroma < 45) & (light > 25) & (light < 90)] = 3
    return kind[torch.from_numpy(found.labels_).long()].view(lab.shape[1:]).to(lab.device)
