"""What a user asks of a set of images, whatever it is read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images

OnBad = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Wanted:
    """How many images, drawn by which seed, in which form; ``names`` are the classes in label order, if known.

    ``size`` is (height, width). What is bad is refused or skipped as ``on_bad`` says, and named either way.
    """

    limit: int | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    channels: int | None = None
    on_bad: OnBad = "refuse"
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise BadInput(f"the limit must be at least 1 image, not {self.limit}")
        if self.size is not None and min(self.size) < 1:
            raise BadInput(f"the size must be at least 1x1, not {self.size[0]}x{self.size[1]}")
        if self.channels not in (None, 1, 3, 4):
            raise BadInput(f"images have 1, 3 or 4 channels, not {self.channels}")
        if self.on_bad not in ("refuse", "skip"):
            raise BadInput(f"bad images are to 'refuse' or to 'skip', not {self.on_bad!r}")

    def order(self, n: int) -> list[int]:
        """In which order n images are taken until there are enough; a larger limit takes the same ones and more."""
        if self.limit is None or self.limit >= n:
            return list(range(n))
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).tolist()

    def take(
        self,
        n: int,
        read: Callable[[list[int]], tuple[Tensor, Tensor]],
        name: str,
        *,
        notes: Sequence[str] = (),
    ) -> Images:
        """A set of n images of one size, of which ``read`` gives the chosen rows' pixels in [0, 1] and labels."""
        rows = sorted(self.order(n)[: self.limit])
        x, y = read(rows)
        images = Images.of(fit(x, self.size, self.channels), y, name=name, names=self.names)
        return replace(images, index=torch.tensor(rows), notes=tuple(notes))


def fit(x: Tensor, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """Images (n, c, h, w) with the ``channels`` and ``size`` (height, width) asked for.

    Grey becomes colour by repetition, colour grey by its luma (ITU-R 601); an alpha channel is dropped, or added
    opaque. Scaling is bilinear with antialias, to exactly the size: nothing is cropped.
    """
    c = x.shape[1]
    if channels is not None and channels != c:
        colour = x[:, :3]
        if channels == 1:
            x = (colour * x.new_tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
        else:
            x = colour if c >= 3 else colour.repeat(1, 3, 1, 1)
            x = x if channels == 3 else torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if size is not None and tuple(x.shape[2:]) != tuple(size):
        x = F.interpolate(x, size, mode="bilinear", antialias=True).clamp(0, 1)
    return x


def fit_maps(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Maps of regions (n, h, w), each pixel of the ``size`` (height, width) asked for in the region nearest to it."""
    if size is None or tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None].double(), size, mode="nearest-exact")[:, 0].long()
