"""The images that come about by other colours of the same lightness: the colour region and its distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.threat import Ball, Norm, Uniform, rowwise

WIDEST = 127.0
"""How far a and b of CIE Lab may move at eps 1."""

LIGHTER = 0.01
"""By how much, of 100, the lightness of a pixel may differ."""

HALVINGS = 8
"""A colour that no screen shows is brought back toward the original's; its share is found to 1 in 2 to this power."""

XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
"""Linear sRGB to CIE XYZ."""

WHITE = (0.95047, 1.0, 1.08883)
"""The illuminant D65."""

TO_WHITE = tuple(tuple(part / white for part in row) for row, white in zip(XYZ, WHITE, strict=True))
"""Linear sRGB to XYZ as shares of white."""

FROM_WHITE: list[list[float]] = torch.linalg.inv(torch.tensor(TO_WHITE, dtype=torch.float64)).tolist()
"""And back."""


@dataclass(frozen=True, eq=False)
class Color(Ball):
    """The images (3 channels, sRGB in [0, 1]) whose every pixel keeps its lightness L of CIE Lab.

    At ``eps`` 1 a and b of each pixel move by up to 127, as in Shahin Shamsabadi et al. 2020 (arXiv:1911.10891);
    another ``eps`` scales that. `distance` is the largest share that a pixel takes of it, inf where one of them became
    lighter or darker.
    """

    norm: Norm = field(default="color", init=False)
    eps: float | Tensor

    def sized(self, eps: float | Tensor) -> Color:
        """The region of another size."""
        return Color(eps)

    @property
    def reach(self) -> float | Tensor:
        """The radius, and what rounding may add to it."""
        return self.eps * 1.001 + 1e-5

    def distance(self, adv: Tensor, x: Tensor) -> Tensor:
        """(n,) the largest move of a or b in units of 127."""
        moved = (to_lab(adv.double()) - to_lab(x.double())).abs().flatten(2)
        far = moved[:, 1:].amax((1, 2)) / WIDEST
        return torch.where(moved[:, 0].amax(1) <= LIGHTER, far, math.inf).to(x)

    def size(self, delta: Tensor) -> Tensor:
        """Refused: a difference of images has no colour."""
        raise NotImplementedError("a distance of colours is one of two images, not of their difference")

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """The colours of ``adv`` at the lightness of ``x``, brought near enough to those of ``x``."""
        lab, most = to_lab(x), self._most(x)
        return shifted(lab, (to_lab(adv.clamp(0, 1)) - lab)[:, 1:].clamp(-most, most))

    def farthest(self, x: Tensor, direction: Tensor) -> Tensor:
        """Of one shift of a and b for all pixels, the image furthest along ``direction``."""
        best, gain, lab = x, x.new_full((len(x),), -math.inf), to_lab(x)
        side = torch.linspace(-1, 1, 17).to(x)
        for share in torch.cartesian_prod(side, side):
            moved = shifted(lab, (share.view(1, 2, 1, 1) * self._most(x)).expand_as(lab[:, 1:]))
            further = (moved * direction).flatten(1).sum(1)
            best = torch.where(rowwise(further > gain, x), moved, best)
            gain = torch.maximum(gain, further)
        return best

    def sample(self, x: Tensor, rng: Uniform) -> Tensor:
        """One shift of a and b for all pixels, drawn uniformly."""
        lab = to_lab(x)
        return shifted(lab, ((2 * rng.rand(2, 1, 1).to(x) - 1) * self._most(x)).expand_as(lab[:, 1:]))

    def _most(self, x: Tensor) -> Tensor:
        """(1, 1, 1, 1) or (n, 1, 1, 1) the largest move."""
        return WIDEST * torch.as_tensor(self.eps, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)


def to_lab(x: Tensor) -> Tensor:
    """CIE Lab (n, 3, h, w) of sRGB images in [0, 1].

    Raises:
        BadInput: they have not three channels.
    """
    if x.shape[1] != 3:
        raise BadInput(f"a colour has 3 channels, but the images have {x.shape[1]}")
    linear = torch.where(x > 0.04045, _power((x.clamp_min(0.04045) + 0.055) / 1.055, 2.4), x / 12.92)
    ratio = _mixed(linear, TO_WHITE)
    root = torch.where(ratio > 216 / 24389, _power(ratio.clamp_min(1e-3), 1 / 3), (24389 / 27 * ratio + 16) / 116)
    across, up, deep = root.unbind(1)
    return torch.stack([116 * up - 16, 500 * (across - up), 200 * (up - deep)], 1)


def shifted(lab: Tensor, move: Tensor) -> Tensor:
    """The sRGB images of ``lab`` (n, 3, h, w), a and b moved by ``move`` (n, 2, h, w) as far as [0, 1] has them."""
    reached = _linear(lab, move)
    beyond = ((reached < 0) | (reached > 1)).any(1)
    if bool(beyond.any()):
        at, way = (part.movedim(1, 3)[beyond].T[None, :, :, None] for part in (lab, move))
        share = torch.zeros_like(at[:, :1])
        for k in range(1, HALVINGS + 1):
            tried = _linear(at, way * (share + 0.5**k))
            share += 0.5**k * ((tried >= 0) & (tried <= 1)).all(1, keepdim=True)
        reached = reached.movedim(1, 3).index_put((beyond,), _linear(at, way * share)[0, :, :, 0].T).movedim(3, 1)
    bright = reached.clamp(0, 1)
    return torch.where(bright > 0.0031308, 1.055 * _power(bright.clamp_min(1e-3), 1 / 2.4) - 0.055, 12.92 * bright)


def _power(x: Tensor, exponent: float) -> Tensor:
    """``x`` to the power of ``exponent``, by way of float64: single powers differ in the last bit with the batch."""
    return (x.double() ** exponent).to(x)


def _linear(lab: Tensor, move: Tensor) -> Tensor:
    """Linear sRGB, beyond [0, 1] where the colour is none of it."""
    up = (lab[:, 0] + 16) / 116
    root = torch.stack([up + (lab[:, 1] + move[:, 0]) / 500, up, up - (lab[:, 2] + move[:, 1]) / 200], 1)
    ratio = torch.where(root > 6 / 29, root**3, (116 * root - 16) * 27 / 24389)
    return _mixed(ratio, FROM_WHITE)


def _mixed(x: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """(n, 3, h, w) the channels of ``x`` weighed by each row of ``weights`` (3, 3), rounded alike in any batch."""
    one, two, three = x.unbind(1)
    return torch.stack([one * a + two * b + three * c for a, b, c in weights], 1)
