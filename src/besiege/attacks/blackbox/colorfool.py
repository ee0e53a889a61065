"""ColorFool: random colours of unchanged lightness, natural ones where the region asks for it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from besiege.core.method import evasion
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.threat import INF, Access
from besiege.regions.color import WIDEST, Color, shifted, to_lab
from besiege.regions.segments import by_colors, segmented

SMALLEST = 64
"""An image with a side below this is one region."""


@evasion("ColorFool", paper="arXiv:1911.10891", norms=("color",), access=Access.LABELS, maps=True, channels=3)
def colorfool(
    oracle: Oracle,
    x: Tensor,
    ball: Color,
    rng: Rng,
    *,
    maps: Tensor | None = None,
    regions: Literal["auto", "colors", "whole"] = "auto",
    clusters: int = 8,
    trials: int = 1000,
) -> None:
    """Move a and b of CIE Lab by random amounts, one for each region, ever larger (Shahin Shamsabadi et al. 2020).

    Trial number k moves them by up to k / ``trials`` of what the ball allows. What looks like a person stays as it is,
    what looks like sky, water or plants keeps a natural colour.

    Departs from the paper: its regions come from a segmentation network. Here they are those of the images' ``maps``,
    where the data has some (`besiege.data`): 0 is all else, 1 sky or water, 2 plants, 3 people, and each further number
    a region that takes any colour. Else ``regions="colors"`` groups the pixels of an image into ``clusters`` colours by
    k-means and takes sky and water for blue, plants for green, people for the colours of skin; sand and wood are among
    those too. ``regions="whole"`` makes the image one region without a natural colour, and so does the default where
    there are no maps and a side has fewer than 64 pixels. A colour that sRGB does not have is brought
    back toward the original's instead of being cut off, which would change its lightness. The images are not rounded
    to 8 bits; the judge reports which of them survive that.
    """
    lab = to_lab(x)
    if regions == "auto" and maps is not None:
        masks, least, most = segmented(lab, maps)
    elif regions == "colors" or (regions == "auto" and min(x.shape[2:]) >= SMALLEST):
        masks, least, most = segmented(lab, by_colors(lab, clusters))
    else:
        masks, least, most = _whole(lab)
    for k in range(1, trials + 1):
        lab, masks, least, most, rng = oracle.live(lab, masks, least, most, rng)
        scale = WIDEST * float(ball.eps) * k / trials
        low, high = least.clamp_min(-scale), most.clamp_max(scale)
        move = low + (high - low) * rng.rand(*least.shape[1:]).to(lab)
        oracle.is_adversarial(shifted(lab, _spread(move, masks)))


def _spread(move: Tensor, masks: Tensor) -> Tensor:
    """(n, 2, h, w) what the regions' moves (n, r, 2) come to at each pixel, rounded alike in any batch."""
    total = masks.new_zeros(len(masks), 2, *masks.shape[2:])
    for k in range(masks.shape[1]):
        total += masks[:, k, None] * move[:, k, :, None, None]
    return total


def _whole(lab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(lab[:, :1]), lab.new_full((len(lab), 1, 2), -INF), lab.new_full((len(lab), 1, 2), INF)
