"""A threat from its text or its parts: a ball in a norm, or a region by its name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from besiege.core.threat import Ball, Norm, number
from besiege.regions.color import Color
from besiege.regions.spatial import Spatial
from besiege.regions.wasserstein import Wasserstein

REGIONS: Mapping[Norm, type[Wasserstein] | type[Spatial] | type[Color]] = {
    "wasserstein": Wasserstein,
    "spatial": Spatial,
    "color": Color,
}


def within(norm: Norm, eps: float | Tensor) -> Ball:
    """The images within ``eps`` in a norm, or in the region of that name."""
    return REGIONS[norm](eps) if norm in REGIONS else Ball(norm, eps)


def parse(text: str) -> Ball:
    """``linf:8/255``, ``l2:0.5``, ``wasserstein:0.1``, ``spatial:1`` or ``color:1``.

    Raises:
        BadInput: no such norm or region, or no radius.
    """
    name, _, eps = text.partition(":")
    name = name.strip().lower()
    return REGIONS[name](number(eps)) if name in REGIONS else Ball.parse(text)
