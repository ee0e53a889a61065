"""The embedded images: scikit-learn's handwritten digits, grey and on photographs.

Nothing is shipped but what scikit-learn ships: 1,797 real digits of 13 writers (E. Alpaydin and C. Kaynak 1998,
UCI, CC BY 4.0) and two photographs (china.jpg and flower.jpg, CC BY). A fixed permutation splits the digits into
1,297 to train on and 500 to attack.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Part = Literal["train", "test"]
TRAIN = 1297
SPLIT_SEED = 20261123
NAMES = tuple("0123456789")


def digits(part: Part) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [0, 1], enlarged from 8x8 bilinearly, and labels (n,)."""
    x, y = _small(part)
    return F.interpolate(x, (28, 28), mode="bilinear"), y


def digits_rgb(part: Part, copies: int = 1) -> tuple[Tensor, Tensor]:
    """Images (copies * n, 3, 32, 32) in [0, 1]: ``|digit - patch|``, each on a patch of its own, and labels.

    This is how MNIST-M is made (Ganin et al. 2016, arXiv:1505.07818). Patches to train on come from the left
    of the photographs and those to attack from the right, so the parts share neither digits nor backgrounds.
    """
    from sklearn.datasets import load_sample_images

    x, y = _small(part)
    x, y = F.interpolate(x, (32, 32), mode="bilinear").repeat(copies, 1, 1, 1), y.repeat(copies)
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    draw = np.random.RandomState(SPLIT_SEED + (part == "test"))
    height, width = photos[0].shape[1:]
    seam = width * 2 // 3
    left, right = (0, seam - 32) if part == "train" else (seam, width - 32)
    which = draw.randint(0, len(photos), len(x)).tolist()
    tops = draw.randint(0, height - 31, len(x)).tolist()
    lefts = draw.randint(left, right + 1, len(x)).tolist()
    patches = [photos[k][:, i : i + 32, j : j + 32] for k, i, j in zip(which, tops, lefts, strict=True)]
    return (x - torch.stack(patches)).abs(), y


def _small(part: Part) -> tuple[Tensor, Tensor]:
    """The digits as they are: (n, 1, 8, 8) in [0, 1], and labels (n,)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(x))
    rows = order[:TRAIN] if part == "train" else order[TRAIN:]
    return torch.from_numpy(x[rows]).float().div(16).reshape(-1, 1, 8, 8), torch.from_numpy(y[rows]).long()
