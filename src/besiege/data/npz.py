"""NumPy archives: pixels under ``x`` or ``images``, labels under ``y`` or ``labels``, regions under ``maps``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.data.wanted import Wanted, fit_maps

PIXELS = ("x", "images", "X", "x_test", "data")
LABELS = ("y", "labels", "Y", "y_test", "label", "targets")
MAPS = "maps"
CHANNELS = (1, 3, 4)
Array = np.ndarray[Any, Any]


def read(path: Path, wanted: Wanted) -> Images:
    """Pixels (n, h, w), (n, c, h, w) or (n, h, w, c), whole numbers of 8 or 16 bits or floats in [0, 1]; labels (n,).

    Maps of regions, where there are any, are whole numbers (n, h, w). Objects in the archive are never unpickled.

    Raises:
        BadInput: the file is unreadable, or does not hold such arrays.
    """
    pixels, labels, maps = _arrays(path)
    notes = []
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4:
        raise BadInput(f"{path}: the images must have shape (n, c, h, w) or (n, h, w, c), not {pixels.shape}")
    if labels.shape not in ((len(pixels),), (len(pixels), 1)):
        raise BadInput(f"{path}: {len(pixels)} images but labels of shape {labels.shape}; give one label an image")
    if labels.dtype.kind not in "iu":
        raise BadInput(f"{path}: labels must be whole numbers from 0, not {labels.dtype}")
    first, last = pixels.shape[1] in CHANNELS, pixels.shape[3] in CHANNELS
    if not first and not last:
        raise BadInput(f"{path}: images of shape {pixels.shape[1:]} have no axis of 1, 3 or 4 channels, first or last")
    if first and last:
        notes.append(f"images of shape {pixels.shape[1:]} are read with the channels first")
    if not first:
        pixels = np.moveaxis(pixels, 3, 1)
    size = (len(pixels), *pixels.shape[2:])
    if maps is not None and (maps.dtype.kind not in "iu" or maps.shape != size):
        raise BadInput(f"{path}: maps must be whole numbers of shape {size}, not {maps.dtype} of shape {maps.shape}")
    images = wanted.take(
        len(pixels),
        lambda rows: (_unit(pixels[rows], path), torch.from_numpy(labels[rows].astype(np.int64).reshape(-1))),
        str(path),
        notes=notes,
    )
    if maps is None:
        return images
    return images.mapped(fit_maps(torch.from_numpy(maps[images.index.numpy()].astype(np.int64)), wanted.size))


def _arrays(path: Path) -> tuple[Array, Array, Array | None]:
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path}: is no .npz archive, or is truncated")
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = archive.files
            chosen = [next((key for key in among if key in keys), None) for among in (PIXELS, LABELS)]
            if None in chosen:
                missing = "images (x)" if chosen[0] is None else "labels (y)"
                raise BadInput(f"{path}: holds no {missing}, only {', '.join(keys[:8]) or 'nothing'}")
            return archive[chosen[0]], archive[chosen[1]], archive[MAPS] if MAPS in keys else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise BadInput(f"{path}: holds Python objects, which could run code; store plain arrays") from None
        raise BadInput(f"{path}: unreadable or truncated ({error})") from None


def _unit(pixels: Array, path: Path) -> Tensor:
    """Pixels as float32 in [0, 1]; floats are left as they are."""
    kind = pixels.dtype
    if kind.kind == "f":
        return torch.from_numpy(pixels.astype(np.float32))
    if kind.kind == "b":
        return torch.from_numpy(pixels.astype(np.float32))
    if kind.kind not in "iu":
        raise BadInput(f"{path}: pixels must be numbers, not {kind}")
    top = 65535 if kind == np.uint16 else 255
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > top:
        raise BadInput(f"{path}: whole-number pixels must lie in 0 to {top}, but range over {low} to {high}")
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(top))
