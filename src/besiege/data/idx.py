"""MNIST-style idx files, plain or gzipped: an image file, with its label file beside it."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.data.wanted import Wanted

TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4"}


def read(path: Path, wanted: Wanted) -> Images:
    """The images in ``path``, or in a folder: its test part (``t10k-images…``) if there is one, else any other.

    Raises:
        BadInput: no such files, or they are truncated or of another kind.
    """
    pixel_file = _in_folder(path) if path.is_dir() else path
    if not pixel_file.is_file():
        raise BadInput(f"{path}: there is no such file")
    pixels, labels = _array(pixel_file), _array(_labels_beside(pixel_file))
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise BadInput(f"{pixel_file}: must hold 8-bit images (n, h, w), not {pixels.dtype} of shape {pixels.shape}")
    if labels.shape != pixels.shape[:1]:
        raise BadInput(f"{pixel_file}: {len(pixels)} images, but its label file holds {labels.shape}")
    return wanted.take(
        len(pixels),
        lambda rows: (
            torch.from_numpy(pixels[rows][:, None] / np.float32(255)),
            torch.from_numpy(labels[rows].astype(np.int64)),
        ),
        str(pixel_file),
    )


def candidates(folder: Path) -> list[Path]:
    """The image files of a folder, the test part first."""
    found = [p for p in sorted(folder.glob("*images*idx3*")) if p.is_file()]
    return sorted(found, key=lambda p: (not p.name.startswith(("t10k", "test")), p.name))


def _in_folder(folder: Path) -> Path:
    found = candidates(folder)
    if not found:
        raise BadInput(f"{folder}: holds no idx images (such as t10k-images-idx3-ubyte.gz)")
    return found[0]


def _labels_beside(pixel_file: Path) -> Path:
    stem = pixel_file.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for name in (stem, f"{stem}.gz"):
        beside = pixel_file.with_name(name)
        if beside.is_file() and beside != pixel_file:
            return beside
    raise BadInput(f"{pixel_file}: its label file {stem}[.gz] is not beside it")


def _array(path: Path) -> np.ndarray[Any, Any]:
    """The array in an idx file: 0, 0, type, number of axes, their lengths (big endian), then the numbers."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: unreadable or truncated ({error})") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in TYPES:
        raise BadInput(f"{path}: is no idx file of whole numbers")
    kind, axes = np.dtype(TYPES[data[2]]), data[3]
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * (len(data[4:]) // 4)], ">u4", count=min(axes, len(data[4:]) // 4)))
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if len(shape) != axes or len(data) != 4 + 4 * axes + size:
        raise BadInput(f"{path}: is truncated or damaged: {len(data)} bytes do not hold what its header announces")
    return np.frombuffer(data, kind, offset=4 + 4 * axes).reshape(shape)
