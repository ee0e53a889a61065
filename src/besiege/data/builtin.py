"""The embedded images: what the embedded networks were not trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

from besiege.core.errors import BadInput, nearest
from besiege.core.images import Images
from besiege.data.wanted import Wanted
from besiege.embedded.images import NAMES, digits, digits_rgb

SETS = {"digits": digits, "digits-rgb": digits_rgb}


def read(name: str, wanted: Wanted) -> Images:
    """The test part of ``digits`` or ``digits-rgb`` (see `besiege.embedded.images`)."""
    if name not in SETS:
        raise BadInput(f"there are no embedded images {name!r}; {nearest(name, SETS)}")
    x, y = SETS[name]("test")
    images = wanted.take(len(x), lambda rows: (x[torch.tensor(rows)], y[torch.tensor(rows)]), f"embedded:{name}")
    return images if images.names else replace(images, names=NAMES)
