"""A change that is the same for every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Trigger(Protocol):
    """A function on images (n, c, h, w) in [0, 1], applied to each alike."""

    def __call__(self, x: Tensor) -> Tensor:
        """The changed images, in [0, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class Shift:
    """Adds ``delta`` (1, c, h, w)."""

    delta: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """``x + delta``, brought into [0, 1]."""
        return (x + self.delta.to(x)).clamp(0, 1)
