"""Images with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from besiege.core.errors import BadInput


@dataclass(frozen=True, eq=False)
class Images:
    """``x`` (n, c, h, w) float in [0, 1] and ``y`` (n,) int64 labels.

    ``index`` (n,) numbers the images in the set they came from and names their random streams; ``names``
    holds the classes in label order where the source knows them; ``notes`` says what was decided in reading them.
    ``maps`` (n, h, w) int64 says which region each pixel belongs to, where the source knows (see `colorfool`).
    """

    x: Tensor
    y: Tensor
    index: Tensor
    name: str = "images"
    names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()
    maps: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, y: Tensor, *, name: str = "images", names: Sequence[str] | None = None) -> Images:
        """Check and number a set. Pixels that leave [0, 1] by rounding (1e-6) are clamped.

        Raises:
            BadInput: wrong shape, pixels outside [0, 1] or not finite, labels that do not fit.
        """
        if x.dim() != 4:
            raise BadInput(f"{name}: images must have shape (n, c, h, w), not {tuple(x.shape)}")
        if y.shape != x.shape[:1]:
            raise BadInput(f"{name}: {len(x)} images but labels of shape {tuple(y.shape)}; give one label an image")
        if not len(x):
            raise BadInput(f"{name}: there are no images")
        if not x.is_floating_point():
            raise BadInput(f"{name}: pixels must be floats in [0, 1], not {x.dtype}; divide 8-bit pixels by 255")
        low, high = (float(v) for v in x.aminmax())
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            raise BadInput(
                f"{name}: pixels must lie in [0, 1], but range over [{low:.4g}, {high:.4g}]; "
                "divide 8-bit pixels by 255 and give mean and std to the target instead of normalizing here"
            )
        if y.is_floating_point() or y.is_complex() or int(y.min()) < 0:
            raise BadInput(f"{name}: labels must be whole numbers from 0")
        return cls(x.clamp(0, 1).contiguous(), y.long(), torch.arange(len(x)), name, names)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Images:
        maps = None if self.maps is None else self.maps[rows]
        return replace(self, x=self.x[rows], y=self.y[rows], index=self.index[rows], maps=maps)

    @property
    def digest(self) -> str:
        """A digest of pixels, labels and numbers."""
        found = hashlib.blake2b(str(tuple(self.x.shape)).encode(), digest_size=8)
        for part in (self.x, self.y, self.index):
            found.update(part.cpu().contiguous().numpy().data)
        return found.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.x.shape[1:]
        return c, h, w

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        maps = None if self.maps is None else self.maps.to(device)
        return replace(self, x=self.x.to(device), y=self.y.to(device), index=self.index.to(device), maps=maps)

    def mapped(self, maps: Tensor) -> Images:
        """The same images with ``maps`` (n, h, w) of the region of each pixel, whole numbers from 0 to 255.

        Raises:
            BadInput: other numbers, or not one for each pixel.
        """
        if maps.shape != (len(self), *self.shape[1:]):
            raise BadInput(f"{self.name}: the maps are {tuple(maps.shape)}, the images {(len(self), *self.shape[1:])}")
        if maps.is_floating_point() or maps.is_complex() or int(maps.min()) < 0 or int(maps.max()) > 255:
            raise BadInput(f"{self.name}: a map holds whole numbers from 0 to 255")
        return replace(self, maps=maps.long())

    def shared(self, other: Images) -> int:
        """How many of these images ``other`` has too, to the last digit."""
        mine, theirs = ([x.tobytes() for x in part.x.cpu().contiguous().numpy()] for part in (self, other))
        known = set(theirs)
        return sum(pixels in known for pixels in mine)

    def sample(self, n: int, seed: int = 0) -> Images:
        """``n`` images drawn without replacement, in their first order."""
        if n >= len(self):
            return self
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]
        return self[rows.sort().values]
