"""What a search for poison has, and what it says of training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from besiege.core.fit import Fit
from besiege.core.target import Target


@dataclass(frozen=True, eq=False)
class Probe:
    """A network that was trained on the images under suspicion: by ``fit`` under ``seed``, and more can be."""

    target: Target
    fit: Fit
    seed: int = 0
    progress: Callable[[int], None] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Suspicion:
    """``score`` (n,) float, higher for what is more suspect; ``suspect`` (n,) bool, what should go.

    ``plane`` (n, 2) is where an image lies in the first two directions of its class, for a detector that has some.
    """

    score: Tensor
    suspect: Tensor
    plane: Tensor | None = None
